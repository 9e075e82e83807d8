"""The tests: unit (no server) and integration (a real TorchServe)."""
