"""Makes the benchmark's catalogue: thousands of JPEGs cut from nine photographs, in TFRecord shards.

`python -m benchmarks.photographs` writes them once into a cache folder and prints where. Every image
depends on its number alone, so the first 2,000 of 20,000 are the 2,000; the bytes are the same on
every machine with the same Pillow. They are near-twins of each other: fit for throughput and memory,
not for quality.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

ORIGINALS = Path(__file__).parent / "photographs"
DEFAULT_COUNT = 2_000
# Of about 109 MB each; TensorFlow's guide asks for 100 MB or more a file.
DEFAULT_SHARDS = 2
LONG_SIDE, SHORT_SIDE = 800, 600
QUALITIES = (75, 85, 92)
SMALLEST_CROP, LARGEST_CROP = 0.55, 0.95
# `turns`: baseline and progressive take turns, which is what photographs in the wild are like.
CODINGS = ("turns", "baseline")
# Raised when the same numbers give other images than before.
REVISION = 1


def default_folder() -> Path:
    """Returns the folder of everything that benchmarks keep between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "kith-benchmarks"


def load_originals(folder: Path = ORIGINALS) -> list[Image.Image]:
    """Reads the photographs, in the order of their names."""
    originals = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            originals.append(image.convert("RGB"))
    if not originals:
        raise SystemExit(f"{folder} holds no photographs, wanted the nine of the repository.")
    return originals


def make_photograph(number: int, originals: list[Image.Image], coding: str = "turns") -> bytes:
    """Returns one JPEG: a random crop of 55 to 95 % of a photograph's sides, at 800 x 600 px.

    Photographs and qualities take turns, and by default baseline and progressive coding; an upright
    photograph stays upright (600 x 800).
    """
    original = originals[number % len(originals)]
    random = np.random.default_rng([REVISION, number])
    wide = original.width >= original.height
    size = (LONG_SIDE, SHORT_SIDE) if wide else (SHORT_SIDE, LONG_SIDE)
    scale = min(original.width / size[0], original.height / size[1])
    scale *= random.uniform(SMALLEST_CROP, LARGEST_CROP)
    width, height = size[0] * scale, size[1] * scale
    left = random.uniform(0, original.width - width)
    top = random.uniform(0, original.height - height)
    box = (left, top, left + width, top + height)
    turn = number // len(originals)
    found = original.resize(size, Image.Resampling.BICUBIC, box=box)
    data = io.BytesIO()
    quality = QUALITIES[turn % len(QUALITIES)]
    progressive = coding == "turns" and bool(turn // len(QUALITIES) % 2)
    found.save(data, "JPEG", quality=quality, progressive=progressive)
    return data.getvalue()


def image_id(number: int) -> str:
    """Returns the id of an image by its number."""
    return f"photograph-{number:06d}"


def shard_numbers(count: int, shards: int) -> list[range]:
    """Splits the numbers 0 to `count` into consecutive ranges whose lengths differ by at most one."""
    bounds = [count * shard // shards for shard in range(shards + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def catalogue_name(count: int, shards: int, coding: str = "turns") -> str:
    """Returns the name of a catalogue's folder: it changes with everything that decides its bytes."""
    digest = hashlib.sha256(f"{REVISION} {PIL.__version__}".encode())
    for path in sorted(ORIGINALS.glob("*.jpg")):
        digest.update(path.read_bytes())
    kind = "photographs" if coding == "turns" else f"photographs-{coding}"
    return f"{kind}-{count}-{shards}-{digest.hexdigest()[:8]}"


def make_catalogue(
    folder: Path,
    count: int,
    shards: int,
    say: Callable[[str], None] = lambda text: None,
    coding: str = "turns",
) -> Path:
    """Writes the shards into a folder of their own below `folder`, unless they are there already.

    A record holds `image/encoded` and `image_id`. The catalogue appears whole or not at all; it
    lies beside `catalogue.json`, which says what it is.
    """
    if not 1 <= shards <= count:
        raise ValueError(f"count is {count} and shards {shards}, wanted at least one image a shard.")
    place = folder / catalogue_name(count, shards, coding)
    if (place / "catalogue.json").is_file():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        originals = load_originals()
        total = 0
        for shard, numbers in enumerate(shard_numbers(count, shards)):
            path = writing / f"images-{shard:05d}-of-{shards:05d}.tfrecord"
            total += _write_shard(path, numbers, originals, coding)
            say(f"{numbers.stop:,} of {count:,} photographs")
        about = {"images": count, "shards": shards, "jpeg_bytes": total, "pillow": PIL.__version__}
        (writing / "catalogue.json").write_text(json.dumps(about) + "\n")
        try:
            writing.rename(place)
        except OSError:
            if not (place / "catalogue.json").is_file():
                raise  # Otherwise another run was faster, with the same bytes.
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return place


def _write_shard(path: Path, numbers: range, originals: list[Image.Image], coding: str) -> int:
    """Writes one TFRecord file and returns the bytes of its JPEGs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    total = 0
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, data in zip(numbers, _photographs(numbers, originals, coding), strict=True):
            example = tf.train.Example()
            features = example.features.feature
            features["image/encoded"].bytes_list.value.append(data)
            features["image_id"].bytes_list.value.append(image_id(number).encode())
            writer.write(example.SerializeToString(deterministic=True))
            total += len(data)
    return total


def _photographs(numbers: range, originals: list[Image.Image], coding: str) -> Iterator[bytes]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda number: make_photograph(number, originals, coding), numbers)


def main(arguments: list[str] | None = None) -> None:
    """Makes a catalogue and prints its folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photographs", description=__doc__)
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="how many images")
    parser.add_argument("--shards", type=int, default=DEFAULT_SHARDS, help="in how many files")
    parser.add_argument("--coding", choices=CODINGS, default=CODINGS[0], help="of the JPEGs")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where to keep them")
    options = parser.parse_args(arguments)
    try:
        place = make_catalogue(
            options.folder,
            options.count,
            options.shards,
            lambda text: print(text, file=sys.stderr),
            options.coding,
        )
    except ValueError as error:
        parser.error(str(error))
    print(place)


if __name__ == "__main__":
    main()
