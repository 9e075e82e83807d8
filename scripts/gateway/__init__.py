"""The gateway: nginx as a reverse proxy in front of one or several TorchServes."""
