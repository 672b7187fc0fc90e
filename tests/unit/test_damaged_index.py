"""A join of an index that is not whole, or not one: refused with a reason, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder import library
from index_builder.errors import DatasetError
from index_builder.index.shards import open_index, open_shard
from index_builder.library import IndexSpec, JoinSpec
from index_builder.search import neighbors


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indexes of the same shape, `index` and `other`, with three shards each."""
    folder = tmp_path_factory.mktemp("sound")
    for seed, name in enumerate(("index", "other")):
        vectors = np.random.default_rng(seed).normal(size=(120, 12))
        ids = [f"i{row:03d}" for row in range(120)]
        source = library.import_arrays(vectors, ids, str(folder / f"{name}-embeddings"))
        library.build(source, str(folder / name), IndexSpec(nlist=6, shards=3))
    return folder


@pytest.fixture
def index(sound: Path, tmp_path: Path) -> Path:
    """A copy of the index, free to be damaged."""
    return shutil.copytree(sound / "index", tmp_path / "index")


def shard(index: Path, number: int, suffix: str = "faiss") -> Path:
    return index / f"shard-{number:05d}.{suffix}"


def delete(index: Path, sound: Path) -> None:
    shard(index, 2).unlink()


def delete_two(index: Path, sound: Path) -> None:
    shard(index, 0, "parquet").unlink()
    (index / "trained.npz").unlink()


def truncate(index: Path, sound: Path) -> None:
    shard(index, 1).write_bytes(shard(index, 1).read_bytes()[:-1000])


def truncate_rows(index: Path, sound: Path) -> None:
    shard(index, 1, "parquet").write_bytes(shard(index, 1, "parquet").read_bytes()[:200])


def take_another_layout(index: Path, sound: Path) -> None:
    shutil.copy(sound / "other" / "layout.npz", index)


def take_another_manifest(index: Path, sound: Path) -> None:
    shutil.copy(sound / "other" / "_manifest.json", index)


def edit(index: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = index / "_manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def drop_a_part(index: Path, sound: Path) -> None:
    edit(index, lambda value: value["parts"].pop())


def change_a_checksum(index: Path, sound: Path) -> None:
    edit(index, lambda value: value["parts"][1]["files"][0].update(sha256="0" * 64))


def drop_the_manifest(index: Path, sound: Path) -> None:
    (index / "_manifest.json").unlink()


def take_a_newer_schema(index: Path, sound: Path) -> None:
    edit(index, lambda value: value.update(schema_version=99))


def become_embeddings(index: Path, sound: Path) -> None:
    shutil.copy(sound / "index-embeddings" / "_manifest.json", index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete, r"1 of its files .*: shard-00002\.faiss is missing\. Delete the folder and run"),
        (delete_two, r"(2 of its files .*trained\.npz is missing; shard-00000\.parquet is missing"
                     r"|trained\.npz is missing, but .*_manifest\.json lists it)"),
        (truncate, r"1 of its files .*: shard-00001\.faiss has \d+ bytes, wanted \d+"),
        (truncate_rows, r"shard-00001\.parquet has 200 bytes, wanted"),
        (take_another_layout, r"layout\.npz does not match its checksum"),
        (take_another_manifest, r"(trained|layout)\.npz does not match its checksum"),
        (drop_a_part, r"_manifest\.json is damaged: its content digest is"),
        (change_a_checksum, r"_manifest\.json is damaged: its content digest is"),
        (drop_the_manifest, r"is not a complete index dataset: it has no _manifest\.json"),
        (take_a_newer_schema, r"has schema version 99, this version of Kith reads 1"),
        (become_embeddings, r"holds a dataset of kind 'embeddings', wanted 'index'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_damage_is_seen_before_any_work(
    damage: Callable[[Path, Path], None], message: str, index: Path, sound: Path, tmp_path: Path
) -> None:
    damage(index, sound)
    with pytest.raises(DatasetError, match=message):
        library.join(str(index), str(tmp_path / "n"), JoinSpec(3))
    assert not (tmp_path / "n").exists()


def test_a_shard_of_another_index_is_refused(index: Path, sound: Path, tmp_path: Path) -> None:
    mine, other = shard(index, 1), shard(sound / "other", 1)
    content = other.read_bytes()[: mine.stat().st_size]
    # Of the same size, so that only a look inside tells them apart.
    mine.write_bytes(content + bytes(mine.stat().st_size - len(content)))
    with pytest.raises(DatasetError, match=r"shard-00001\.faiss"):
        library.join(str(index), str(tmp_path / "n"), JoinSpec(3))
    assert not list((tmp_path / "n").glob("_manifest.json"))
    assert not list((tmp_path / "n").glob(".writing-*"))


def test_what_read_a_damaged_shard_is_made_again(index: Path, sound: Path, tmp_path: Path) -> None:
    path, folder = shard(index, 2), tmp_path / "n"
    good = path.read_bytes()
    with open_shard(open_index(str(index)), 2, ()) as opened:
        code = opened.vectors().slice(0, 20).matrix()
    place = good.index(code.tobytes()[: 2 * code.shape[1]])
    # Vectors turned round: nothing but the checksum tells, and that is for the shard's own task to see.
    turned = (-code).tobytes()
    path.write_bytes(good[:place] + turned + good[place + len(turned) :])
    with pytest.raises(DatasetError, match=r"shard-00002\.faiss does not match its checksum"):
        library.join(str(index), str(folder), JoinSpec(3))
    finished = {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}
    assert sorted(finished) == ["part-00000.parquet", "part-00001.parquet"]
    path.write_bytes(good)
    library.join(str(index), str(folder), JoinSpec(3))
    library.join(str(sound / "index"), str(tmp_path / "straight"), JoinSpec(3))
    assert contents(folder) == contents(tmp_path / "straight")
    assert any(content != (folder / name).read_bytes() for name, content in finished.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pages_that_cannot_be_read_are_a_message(index: Path, tmp_path: Path) -> None:
    path = shard(index, 2, "parquet")
    good = path.read_bytes()
    path.write_bytes(good[:4] + bytes(len(good) // 2) + good[4 + len(good) // 2 :])
    with pytest.raises(DatasetError, match=r"shard-00002\.parquet (cannot be read|does not match)"):
        library.join(str(index), str(tmp_path / "n"), JoinSpec(3))
    assert not list(tmp_path.glob("n/*.parquet"))


def test_finding_no_neighbors_is_refused() -> None:
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k is {k}, wanted at least 1"):
            JoinSpec(k)


def test_another_join_is_not_overwritten(sound: Path, tmp_path: Path) -> None:
    folder = library.join(str(sound / "index"), str(tmp_path / "n"), JoinSpec(3))
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    for name, spec in (("index", JoinSpec(4)), ("other", JoinSpec(3))):
        with pytest.raises(DatasetError, match="holds another dataset"):
            library.join(str(sound / name), folder, spec)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    with pytest.raises(DatasetError, match=f"kind '{neighbors.KIND}', wanted 'index'"):
        library.join(folder, str(tmp_path / "m"), JoinSpec(3))
