"""Tests of the web UI in Chromium, against a running TorchServe."""
