"""Gathering what the report page shows: figures, failures, and the pictures of its examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from index_builder.datasets import manifests, storage
from index_builder.errors import KithError
from index_builder.index.shards import open_index
from index_builder.search.join import lookup_rows
from pipelines.config import Config
from pipelines.publish import read_pointer
from pipelines.report.page import render_page, thumbnail
from pipelines.stage import dataset_folder
from transforms import failures
from transforms.sources.base import ImageSource

_MOST_FAILURES = 200


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page of a run shows beside its `run.json`: figures, failures, pictures by image id."""

    evaluation: Mapping[str, Any]
    failed: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, str]

    def write(self, path: str, run: Mapping[str, Any]) -> None:
        """Writes the page of a run."""
        page = render_page(run, self.evaluation, self.failed, self.pictures)
        storage.write_bytes(path, page.encode())


def gather_page(
    evaluation: Mapping[str, Any],
    failures_folder: str,
    index_folder: str | None,
    sources: Sequence[ImageSource],
    max_pixels: int,
) -> Page:
    """Gathers what a page shows; the pictures of its examples are read from the sources again.

    A run that was refused for its embeddings has neither an evaluation, which is empty then, nor an
    index.
    """
    failed = read_failures(failures_folder, _MOST_FAILURES)
    places = {} if index_folder is None else _places(evaluation, index_folder)
    places |= {
        row["image_id"]: (row["source_shard"], row["row"])
        for row in failed
        if row["image_id"] is not None and row["row"] is not None
    }
    return Page(evaluation, failed, _thumbnails(places, sources, max_pixels))


def read_failures(folder: str, most: int) -> list[dict[str, Any]]:
    """Returns the first rows of a failures dataset."""
    rows: list[dict[str, Any]] = []
    for part in manifests.load(folder, failures.KIND).parts:
        if len(rows) >= most:
            break
        if part.rows:
            path = storage.join(folder, part.file(".parquet").path)
            with storage.open_arrow(path) as file:
                rows += pq.read_table(file).slice(0, most - len(rows)).to_pylist()
    return rows


def _places(evaluation: Mapping[str, Any], index_folder: str) -> dict[str, tuple[str, int]]:
    """Returns where the examples' images are: image id to source shard and row."""
    rows: set[int] = set()
    for example in evaluation["examples"]:
        rows.add(example["query"]["row"])
        rows.update(neighbor["row"] for neighbor in example["neighbors"])
    wanted = np.array(sorted(rows), dtype=np.int64)
    found = lookup_rows(open_index(index_folder), wanted, ("image_id", "source_shard", "row"))
    return {row["image_id"]: (row["source_shard"], row["row"]) for row in found.to_pylist()}


def _thumbnails(
    places: Mapping[str, tuple[str, int]], sources: Sequence[ImageSource], max_pixels: int
) -> dict[str, str]:
    """Returns the small pictures that can be had, by image id."""
    by_shard: dict[str, dict[int, str]] = {}
    for image_id, (shard, row) in places.items():
        by_shard.setdefault(shard, {})[row] = image_id
    by_label = {source.label: source for source in sources}
    pictures = {}
    for shard, rows in by_shard.items():
        source = by_label.get(shard.partition("/")[0])
        if source is None:
            continue
        for row, data in source.fetch(shard, sorted(rows)).items():
            picture = thumbnail(data, max_pixels)
            if picture is not None:
                pictures[rows[row]] = picture
    return pictures


def rewrite_report(config: Config, run_id: str | None, output: str | None) -> str:
    """Writes the page of a finished run again, by default the published one; returns its path.

    Raises KithError where there is no such run.
    """
    if run_id is None:
        pointer = read_pointer(config.workspace)
        if pointer is None:
            raise KithError(
                f"Nothing is published in {config.workspace}. Run kith nightly first, or name a run "
                "with --run."
            )
        run_id = str(pointer["run"])
    folder = storage.join(config.workspace, "runs", run_id)
    try:
        run = storage.read_json(storage.join(folder, "run.json"))
    except FileNotFoundError as error:
        raise KithError(
            f"{folder} holds no run.json, so there is no finished run {run_id!r}. Look into "
            f"{storage.join(config.workspace, 'runs')} for the runs there are."
        ) from error
    places = {
        kind: dataset_folder(config.workspace, kind, identity)
        for kind, identity in run["fingerprints"].items()
    }
    evaluation: Mapping[str, Any] = {}
    if "evaluation" in places:
        evaluation = storage.read_json(storage.join(places["evaluation"], "evaluation.json"))
    path = output or storage.join(folder, "report.html")
    images = config.images
    gather_page(
        evaluation, places["failures"], places.get("index"), images.sources, images.max_pixels
    ).write(path, run)
    return path
