"""The pure library: dataset contracts, training, sharding, joining and evaluating, without Beam or TensorFlow."""
