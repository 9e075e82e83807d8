"""Many pictures on Ray; needs `make setup-batch`."""
