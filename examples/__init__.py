"""Examples: custom models from training to serving, near-duplicates, another server."""
