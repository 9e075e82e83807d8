"""Finds near-duplicate images in a folder by their embeddings."""
