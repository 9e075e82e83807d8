"""From the model's input to probabilities, features and embeddings."""
