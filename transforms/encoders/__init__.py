"""The networks that turn images into vectors, by name."""
