"""Decode encoded images to the model's input, within limits of pixels, time and memory."""
