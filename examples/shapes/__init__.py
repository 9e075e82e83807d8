"""Trains, packs and serves a multi-label ResNet for images of several shapes."""
