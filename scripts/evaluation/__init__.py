"""Evaluate a served model: `make evaluate`."""
