"""nginx before several TorchServes: nodes come and go, and no client notices."""
