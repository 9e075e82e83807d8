"""Measurements: the engine alone, the settings one by one, and whole servers beside their peers."""
