"""Runs in the image: what is served, within which limits, and its processes."""
