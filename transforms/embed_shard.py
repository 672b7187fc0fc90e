"""From a shard of images to its parts of the embeddings and failures datasets, in one pass.

Rows are written in the order of the shard, whether they are encoded, taken over from the previous
dataset or equal to an earlier image of the shard.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from index_builder.datasets.embeddings import ROW_GROUP_ROWS, vector_dtype
from index_builder.errors import ImageError
from transforms.decoding import DecodePolicy
from transforms.encode import EncodeAhead, Encoded
from transforms.encoders.encoder import Encoder
from transforms.failures import UNREADABLE_REGION, Failure
from transforms.part_sink import PartSink
from transforms.pixel_rules import check_size
from transforms.prepare import Prepared, PreparedImage, failure_of
from transforms.reuse import FoundVector, PreviousVectors, SeenVectors
from transforms.sources.base import ImageRecord


@dataclasses.dataclass
class ShardBooks:
    """Where every image of a shard went: read = embedded + reused + failed."""

    read: int = 0
    embedded: int = 0
    reused: int = 0
    regions: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Row:
    """An image on its way to the sink, in the order of the shard.

    `result` comes with its batch, or at once where nothing is to be encoded; a row that is the same
    picture as an earlier one that is still on its way waits for that one, `first`.
    """

    record: ImageRecord
    digest: bytes
    width: int = 0
    height: int = 0
    format: str = ""
    result: FoundVector | ImageError | None = None
    reused: bool = False
    first: "_Row | None" = None


class ShardEncoder:
    """Takes the prepared images of one shard and passes finished rows to a sink.

    `known` tells the decode threads which pictures need no decoding.
    """

    def __init__(
        self,
        encoder: Encoder,
        batch_size: int,
        policy: DecodePolicy,
        previous: PreviousVectors | None,
        normalize: bool = True,
    ) -> None:
        self.books = ShardBooks()
        self._batch_size = batch_size
        self._policy = policy
        self._previous = previous
        self._seen = SeenVectors(encoder.dim, vector_dtype(normalize))
        self._ahead = EncodeAhead(encoder, normalize)
        self._rows: deque[_Row] = deque()
        self._under_way: dict[bytes, _Row] = {}
        self._pixels: list[NDArray[np.uint8]] = []
        self._batch: list[_Row] = []
        self._batches: deque[list[_Row]] = deque()

    def known(self, digest: bytes) -> bool:
        """Tells whether the vector of a picture can be had without the picture; for any thread."""
        return self._seen.has(digest) or (self._previous is not None and self._previous.has(digest))

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return self._ahead.calls

    def run(self, images: Iterable[Prepared], sink: PartSink, progress: Callable[[int], None]) -> None:
        """Encodes all images into the sink; `progress` gets the number of rows now and then."""
        for image in images:
            self._take(image)
            if len(self._batch) == self._batch_size:
                self._encode()
                progress(self._drain(sink))
            elif len(self._rows) > ROW_GROUP_ROWS:
                # Reused rows must not pile up behind a batch that never fills.
                if self._batch:
                    self._encode()
                self._settle(self._ahead.finish())
                progress(self._drain(sink))
        if self._batch:
            self._encode()
        self._settle(self._ahead.finish())
        progress(self._drain(sink))
        sink.finish()

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._ahead.close()
        self._seen.close()
        if self._previous is not None:
            self._previous.close()

    def _take(self, image: Prepared) -> None:
        """Puts an image into the row order, and into the batch if it has to be encoded."""
        if isinstance(image, Failure):
            if image.reason == UNREADABLE_REGION:
                self.books.regions += 1
            else:
                self.books.read += 1
            self.books.failures.append(image)
            return
        self.books.read += 1
        digest = image.content_sha256
        row = _Row(image.record, digest)
        self._rows.append(row)
        first = self._under_way.get(digest)
        if first is not None:
            row.first, row.reused = first, True
        elif self._seen.has(digest):
            row.result, row.reused = self._seen.read(digest), True
        elif self._previous is not None and self._previous.has(digest):
            row.result, row.reused = self._admitted(self._previous.read(digest)), True
        else:
            # A known image stays known, so one that is not has its pixels.
            assert isinstance(image, PreparedImage), image
            row.width, row.height, row.format = image.width, image.height, image.format
            self._under_way[digest] = row
            self._pixels.append(image.pixels)
            self._batch.append(row)

    def _admitted(self, found: FoundVector) -> FoundVector | ImageError:
        """A vector of the previous dataset, unless tonight's policy refuses its picture."""
        try:
            check_size(found.width, found.height, self._policy.max_pixels)
        except ImageError as error:
            return error
        return found

    def _encode(self) -> None:
        """Sends the batch off, and settles the rows of an earlier one."""
        self._batches.append(self._batch)
        pixels, self._pixels, self._batch = self._pixels, [], []
        self._settle(self._ahead.submit(pixels))

    def _settle(self, batches: Iterable[list[Encoded]]) -> None:
        for results in batches:
            for row, result in zip(self._batches.popleft(), results, strict=True):
                if isinstance(result, ImageError):
                    row.result = result
                else:
                    row.result = FoundVector(result, row.width, row.height, row.format)
                    self._seen.add(row.digest, row.result)
                del self._under_way[row.digest]

    def _drain(self, sink: PartSink) -> int:
        """Passes on the rows that are settled, up to the first that is not; returns their number."""
        count = 0
        while self._rows:
            row = self._rows[0]
            result = row.result if row.first is None else row.first.result
            if result is None:
                break
            self._rows.popleft()
            count += 1
            if isinstance(result, ImageError):
                stage = "decode" if row.reused and row.first is None else "encode"
                self.books.failures.append(failure_of(row.record, stage, result))
                continue
            sink.add(row.record, row.digest, result)
            if row.reused:
                self.books.reused += 1
            else:
                self.books.embedded += 1
        return count
