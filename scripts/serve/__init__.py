"""Start, stop, scale and check one TorchServe; plan its workers for the machine."""
