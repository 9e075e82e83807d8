"""The command `classify`, as `python -m classification_client`."""

from classification_client.command import start

start()
