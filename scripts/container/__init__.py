"""The image: built with docker or podman, whichever is there, and run for a try."""
