"""Runs in the container image: reads the configuration, plans resources, runs the processes."""
