"""An index larger than the memory limit, built and joined in bounded memory, as it was predicted."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.embeddings import EmbeddingSchema
from index_builder.datasets.manifests import Manifest, Part
from index_builder.scoring.vectors import unit_float16

ROWS, DIM, PARTS = 200_000, 448, 2
GROUP_ROWS = 2048
LIMIT = 64 << 20
# What the data may add to what the kernels take: a quarter of the limit is left for those.
MOST_OF_DATA = 48 << 20
SETTINGS = {
    "index": {
        "memory_limit_gib": LIMIT / 2**30,
        "nlist": 120,
        "nprobe": 1,
        "training_rows": 5000,
    },
    "join": {"k": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and made embeddings of 179 MB of numbers."""
    return make_catalogue(tmp_path_factory.mktemp("bounded"), ROWS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What building and joining a small catalogue add to their processes: the kernels' own memory.

    Compiling them, once a machine, takes more; so it is done before anything is measured.
    """
    for name in ("compiling", "compiled"):
        small = make_catalogue(tmp_path_factory.mktemp(name), 4 * GROUP_ROWS)
        built, _ = kith(small, "build", "--embeddings", str(small / "embeddings"))
        joined, _ = kith(small, "join", "--index", built["index"])
    return {"build": added(built), "join": added(joined)}


def make_catalogue(root: Path, count: int) -> Path:
    """Makes embeddings of so many rows in a folder, and a configuration; returns the folder."""
    source = root / "embeddings"
    source.mkdir()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, DIM))
    base, _ = unit_float16(
        centres[rng.integers(40, size=GROUP_ROWS)] + rng.standard_normal((GROUP_ROWS, DIM))
    )
    schema, parts = EmbeddingSchema(DIM), []
    for number in range(PARTS):
        name = f"part-{number:05d}.parquet"
        with embeddings.parquet_writer(str(source / name), schema.arrow()) as writer:
            for start in range(0, count // PARTS, GROUP_ROWS):
                rows = min(GROUP_ROWS, count // PARTS - start)
                names = [f"image-{number}-{start + row:06d}" for row in range(rows)]
                columns: dict[str, Any] = dict.fromkeys(schema.arrow().names, [1] * rows)
                columns |= {"image_id": names, "item_id": names}
                columns |= dict.fromkeys(("source_shard", "format"), ["made"] * rows)
                columns["content_sha256"] = [bytes(32)] * rows
                # The same numbers in another order are another vector of unit length.
                vectors = np.roll(base[:rows], number * 50 + start // GROUP_ROWS, axis=1)
                writer.write_table(schema.table(vectors, columns))
        file = manifests.describe_file(str(source), name)
        parts.append(Part(name.removesuffix(".parquet"), "key", count // PARTS, (file,)))
    columns_of = embeddings.describe_schema(schema.arrow())
    manifest = Manifest(embeddings.KIND, "f" * 64, {}, columns_of, tuple(parts), {"dim": DIM})
    manifests.commit(str(source), manifest)
    (root / "c.yaml").write_text(yaml.safe_dump({"workspace": str(root / "w")} | SETTINGS))
    return root


def kith(folder: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """Runs one command as a process of its own; returns its JSON and its peak resident bytes."""
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'pipelines.cli', *sys.argv[1:]])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)"
    )
    command = [*arguments, "--config", str(folder / "c.yaml"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document, peak = done.stdout.splitlines()
    return json.loads(document), int(peak) * 1024


def added(result: dict[str, Any]) -> int:
    """Returns the memory that a stage added to its process, in bytes."""
    actual = result["actual"]
    return int(actual["memory_bytes"] - actual["memory_at_start_bytes"])


def check_prediction(name: str, result: dict[str, Any], peak: int) -> None:
    """Holds predicted against actual."""
    predicted, actual = result["predicted"], result["actual"]
    ratio = predicted["memory_bytes"] / actual["memory_bytes"]
    slower = actual["seconds"] / predicted["seconds"]
    print(f"{name}: memory predicted / actual {ratio:.2f}, time actual / predicted {slower:.2f}")
    print(f"{name}: {added(result) / 2**20:.1f} MiB added")
    assert 1 / 1.3 < ratio < 1.3
    # Other work on the machine counts, so time is held loosely here.
    assert 0.1 < slower < 10
    # What the stage says of itself is what is seen from outside.
    assert actual["memory_bytes"] == pytest.approx(peak, rel=0.15)


def test_a_corpus_larger_than_the_limit(folder: Path, kernels: dict[str, int]) -> None:
    print({stage: f"{size / 2**20:.1f} MiB by kernels" for stage, size in kernels.items()})
    source = manifests.load(str(folder / "embeddings"), embeddings.KIND)
    assert source.bytes > 2.5 * LIMIT
    built, peak = kith(folder, "build", "--embeddings", str(folder / "embeddings"))
    assert built["rows"] == ROWS
    check_prediction("build", built, peak)
    assert added(built) - kernels["build"] < MOST_OF_DATA
    assert built["figures"]["shards"] >= 5
    index = manifests.load(built["index"], "index")
    assert index.properties["largest_shard_over_mean"] <= 1.2
    sizes = [part.files[0].bytes for part in index.parts if part.name != "shared"]
    assert max(sizes) * len(sizes) / sum(sizes) <= 1.2

    joined, peak = kith(folder, "join", "--index", built["index"])
    assert joined["figures"]["filled"] == ROWS
    check_prediction("join", joined, peak)
    assert added(joined) - kernels["join"] < MOST_OF_DATA
    # The corpus is several times what any task of it took.
    assert index.bytes > 2.5 * LIMIT


def test_resource_figures_are_in_kilobytes() -> None:
    # What `kith` above relies on: ru_maxrss counts kilobytes on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 50 << 20
