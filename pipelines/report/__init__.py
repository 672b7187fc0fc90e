"""The report of one run: a single HTML page that opens from disk without a network."""
