"""The index: what to build, training, assignment, layout, shards."""
