"""What others do with the same images; each module runs in an environment of its own.

A peer imports nothing of Kith. `python -m benchmarks.peers.NAME --help` says what it takes; the last
line that it prints is one JSON object: images, seconds (without imports and without loading the
network), note, versions.
"""
