"""Batch classification on Ray; needs `make setup-batch`."""
