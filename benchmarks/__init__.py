"""Every program that measures; each writes a page of `results`."""
