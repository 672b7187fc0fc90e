"""Finding neighbours over the shards of an index, under the rules."""
