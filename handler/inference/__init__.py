"""Compute probabilities, features and embeddings from the model's input."""
