"""Build the container image with docker or podman."""
