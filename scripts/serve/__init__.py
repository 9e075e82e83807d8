"""One TorchServe: start, stop, scale, status; how many workers suit the machine."""
