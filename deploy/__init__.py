"""What a cluster or a container engine takes: images, manifests, monitoring."""
