"""The container image, built and run; needs docker or podman."""
