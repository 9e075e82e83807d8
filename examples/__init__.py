"""Models of one's own, from training to serving."""
