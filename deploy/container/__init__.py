"""What runs in the image: the first process, and what it decides from the container's limits."""
