"""Code in the container image that reads the configuration, plans resources and runs processes."""
