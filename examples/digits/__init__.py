"""Handwritten digits: a DenseNet trained, packed, served, and checked against what was trained."""
