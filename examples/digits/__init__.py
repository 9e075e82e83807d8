"""Trains a DenseNet on handwritten digits, serves it, and compares the server with PyTorch."""
