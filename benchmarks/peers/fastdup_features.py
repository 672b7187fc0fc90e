"""fastdup: only its extraction of features, with its own network (576 numbers), from files.

It reads no TFRecords, so that the images are written out first; that is not timed. Its statistics of
images are switched off. What it does cannot be told apart from the loading of its network.
"""

import argparse
import os
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.records import find_records, read_record, report


def main() -> None:
    """Extracts features of the images of the shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    os.environ["SENTRY_OPT_OUT"] = "1"  # It would report the run to its makers.
    import fastdup

    images = options.out / "images"
    images.mkdir(parents=True)
    places = find_records(options.shards, options.limit)
    for place in places:
        image_id, data = read_record(place)
        (images / f"{image_id}.jpg").write_bytes(data)
    work = options.out / "work"
    start = time.perf_counter()
    fastdup.run(
        str(images), str(work), num_threads=options.threads, run_mode=1, turi_param="run_stats=0"
    )
    seconds = time.perf_counter() - start
    names, _ = fastdup.load_binary_feature(str(work))
    if len(names) != len(places):
        raise SystemExit(f"fastdup made {len(names)} vectors, wanted {len(places)}.")
    report(len(names), seconds, "its own network, from files", {"fastdup": version("fastdup")})


if __name__ == "__main__":
    main()
