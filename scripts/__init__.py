"""The commands behind the Makefile; each module is one, run as `python -m scripts.NAME`."""
