"""The pure library: datasets, training, sharding, joining, evaluating; no Beam, no TensorFlow."""
