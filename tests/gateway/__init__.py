"""The gateway in front of a real TorchServe; needs nginx."""
