"""Long runs against the image stage and a real server; a short form of each is a test."""
