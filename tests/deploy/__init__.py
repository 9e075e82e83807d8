"""Manifests, Dockerfiles, systemd units and monitoring."""
