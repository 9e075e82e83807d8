"""Long searches for failures; a short form of each is a test."""
