"""Pairs of vectors, scored: fast products propose, exact scores decide, the k best are kept."""
