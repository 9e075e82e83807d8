"""Parts of `make evaluate`."""
