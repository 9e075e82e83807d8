"""Finds pictures in a folder that are nearly the same, by their embeddings."""
