"""Container images, manifests and monitoring for clusters and container engines."""
