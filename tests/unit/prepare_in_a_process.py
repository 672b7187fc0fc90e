"""Prepares a dozen pictures with marks on disk, in a process that may die of one of them.

Usage: python -m tests.unit.prepare_in_a_process MARKS_FOLDER TIMEOUT_SEC MARKED..., where MARKED are
the ordinals of the images that carry the marker of `tests.faulty_decoder`. Prints a JSON list with
one entry an image: the SHA-256 of its pixels, or [reason, error].
"""

import hashlib
import json
import sys

from tests.faulty_decoder import MARKER
from tests.unit.images_for_tests import encode, picture
from transforms.decoding import DecodePolicy
from transforms.in_flight import InFlightMarks
from transforms.prepare import Preparation, PreparedImage, prepare_images
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord

IMAGES = 12
THREADS = 3


def main(folder: str, timeout_sec: float, marked: set[int]) -> None:
    """Prepares the pictures and prints what came out."""
    records = [
        ImageRecord(f"id-{n}", "shard", n, encode(picture(seed=n), "PNG") + MARKER * (n in marked))
        for n in range(IMAGES)
    ]
    preparation = Preparation(DecodePolicy(), Preprocessing((8, 8)))
    results: list[object] = []
    with InFlightMarks.open(folder, "part-0", THREADS) as marks:
        for image in prepare_images(
            records, preparation, THREADS, 6, marks=marks, timeout_sec=timeout_sec
        ):
            if isinstance(image, PreparedImage):
                results.append(hashlib.sha256(image.pixels.tobytes()).hexdigest())
            else:
                results.append([image.reason, image.error])  # type: ignore[union-attr]
        marks.finish()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), {int(text) for text in sys.argv[3:]})
