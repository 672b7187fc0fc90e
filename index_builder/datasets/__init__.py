"""Datasets as files: storage, manifests, embeddings, metadata tables, samples of their rows."""
