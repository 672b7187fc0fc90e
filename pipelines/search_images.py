"""Searching a published index for new images, with the very encoder that embedded its items."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from index_builder.datasets import storage
from index_builder.errors import ConfigError, FingerprintError, ImageError, KithError
from index_builder.index.shards import IndexDataset, open_index
from index_builder.search.join import JoinSpec
from index_builder.search.search import describe_neighbors, search_vectors
from pipelines.config import Config
from pipelines.engine_choice import engine_in
from pipelines.find_groups import add_groups
from pipelines.reuse import differences
from transforms.embed import EmbedSpec
from transforms.encode import encode_batch
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.registry import load_encoder
from transforms.failures import Failure
from transforms.prepare import PreparedImage, failure_of, prepare_image
from transforms.sources.base import ImageRecord


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The neighbours of one image, best first, or why there are none."""

    image: str
    neighbors: list[dict[str, object]]
    failure: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON values."""
        failed = None
        if self.failure is not None:
            failed = {"reason": self.failure.reason, "error": self.failure.error}
        return {"image": self.image, "neighbors": self.neighbors, "failure": failed}


def search_images(
    config: Config,
    index_folder: str,
    images: Sequence[str],
    k: int,
    nprobe: int | None = None,
    columns: tuple[str, ...] = (),
) -> list[SearchResult]:
    """Searches an index for images given by path, local or `gs://`.

    Raises ConfigError for a missing image or column, FingerprintError when the configuration's
    encoder is not the one that the index was made with.
    """
    index, _ = add_groups(config, open_index(index_folder), JoinSpec(k, columns=columns))
    spec = config.embed_spec(_engine_for(config, index))
    check_encoder_fits(index, spec)
    known = [field["name"] for field in index.schema]
    for name in columns:
        if name not in known:
            raise ConfigError(
                f"The column {name!r} is not in the index {index_folder}, which has "
                f"{', '.join(known)}. Choose one of those."
            )
    records = [_read(path) for path in images]
    prepared = [prepare_image(record, spec.preparation) for record in records]
    results: dict[int, SearchResult] = {}
    found = [(i, image) for i, image in enumerate(prepared) if isinstance(image, PreparedImage)]
    for i, image in enumerate(prepared):
        if isinstance(image, Failure):
            results[i] = SearchResult(images[i], [], image)
    encoder = load_encoder(spec.encoder, spec.batch_size, spec.choice) if found else None
    for start in range(0, len(found), spec.batch_size):
        batch = found[start : start + spec.batch_size]
        assert encoder is not None
        encoded = encode_batch(encoder, np.stack([image.pixels for _, image in batch]), spec.normalize)
        usable, vectors = [], []
        for (i, image), vector in zip(batch, encoded, strict=True):
            if isinstance(vector, ImageError):
                results[i] = SearchResult(images[i], [], failure_of(image.record, "encode", vector))
            else:
                usable.append(i)
                vectors.append(vector)
        if usable:
            top = search_vectors(index, np.stack(vectors), k, nprobe)
            for i, neighbors in zip(usable, describe_neighbors(index, top, columns), strict=True):
                results[i] = SearchResult(images[i], neighbors)
    return [results[i] for i in range(len(images))]


def _engine_for(config: Config, index: IndexDataset) -> EngineChoice:
    """Returns the configuration's engine; with `auto` the one that the index was made with."""
    section = config.encoder
    if section.engine != "auto":
        return EngineChoice(section.engine, section.precision)
    return EngineChoice(
        engine_in(index.manifest.properties["encoder"], index.folder), section.precision
    )


def check_encoder_fits(index: IndexDataset, spec: EmbedSpec) -> None:
    """Raises FingerprintError when an index was made with another encoder or preprocessing."""
    differing = differences(index.manifest.properties["encoder"], spec.encoder_fingerprint())
    if differing:
        raise FingerprintError(
            f"The encoder of the configuration is not the one that {index.folder} was made with, so "
            f"their vectors cannot be compared ({differing}). Use the configuration of that index, or "
            "build an index with this one."
        )


def _read(path: str) -> ImageRecord:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"The image {path} does not exist. Give the path of an image file."
        ) from error
    except OSError as error:
        raise KithError(f"The image {path} cannot be read: {error}. Check the path.") from error
    return ImageRecord(path, path, 0, data)
