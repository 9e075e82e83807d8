"""Measure how good a served model is: `make evaluate`."""
