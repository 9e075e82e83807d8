"""Run the command `classify` with `python -m classification_client`."""

from classification_client.command import start

start()
