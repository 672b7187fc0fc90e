"""Excluded pairs: files in, one sorted part a query shard out, and what is refused."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.datasets import manifests
from index_builder.errors import ConfigError, DatasetError
from index_builder.rules import exclusions
from index_builder.rules.exclusions import (
    ExclusionSpec,
    IdShards,
    exclusions_identity,
    find_exclusions,
    prepare_exclusions,
    read_exclusions,
)

SHARDS = [["a", "b"], [], ["c", "d", "e"]]


def write_pairs(path: Path, pairs: Sequence[tuple[str | None, str | None]]) -> str:
    """Writes a file of pairs, a few a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [pa.array([pair[side] for pair in pairs], pa.string()) for side in (0, 1)]
    pq.write_table(pa.table(columns, names=["query_id", "neighbor_id"]), path, row_group_size=2)
    return str(path)


def shards_of(shards: list[list[str]]) -> IdShards:
    """Wraps lists of ids."""
    return IdShards(len(shards), lambda number: pa.array(shards[number], pa.string()))


def prepare(
    tmp_path: Path,
    pairs: Sequence[tuple[str | None, str | None]],
    shards: list[list[str]] = SHARDS,
    candidates: list[list[str]] | None = None,
    *,
    symmetric: bool = False,
    ignore_unknown: bool = False,
) -> list[list[tuple[str, str]]]:
    """Prepares pairs; returns those of every shard."""
    path = write_pairs(tmp_path / "pairs.parquet", pairs)
    spec = ExclusionSpec((path,), symmetric=symmetric, ignore_unknown=ignore_unknown)
    folder = str(tmp_path / "exclusions")
    others = None if candidates is None else shards_of(candidates)
    manifest = prepare_exclusions(find_exclusions(spec), folder, "identity", shards_of(shards), others)
    assert [part.rows for part in manifest.parts] == [
        len(read_exclusions(folder, number)) for number in range(len(shards))
    ]
    tables = [read_exclusions(folder, number) for number in range(len(shards))]
    columns = [[table[name].to_pylist() for name in ("query_id", "neighbor_id")] for table in tables]
    return [list(zip(*both, strict=True)) for both in columns]


def test_a_shard_gets_the_pairs_of_its_queries_sorted_and_once(tmp_path: Path) -> None:
    pairs = [("d", "a"), ("a", "d"), ("a", "b"), ("d", "a"), ("e", "a"), ("a", "a")]
    assert prepare(tmp_path, pairs) == [
        [("a", "a"), ("a", "b"), ("a", "d")],
        [],
        [("d", "a"), ("e", "a")],
    ]


def test_symmetric_pairs_count_in_both_directions(tmp_path: Path) -> None:
    assert prepare(tmp_path, [("d", "a"), ("b", "c")], symmetric=True) == [
        [("a", "d"), ("b", "c")],
        [],
        [("c", "b"), ("d", "a")],
    ]


def test_an_item_with_images_in_several_shards_is_in_all_of_them(tmp_path: Path) -> None:
    shards = [["i1", "i2", "i1"], ["i1"], ["i3"]]
    assert prepare(tmp_path, [("i1", "i3")], shards) == [[("i1", "i3")], [("i1", "i3")], []]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_pairs_in_groups_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ids = st.sampled_from("abcdef")
    shards = data.draw(st.lists(st.lists(ids, max_size=4), min_size=1, max_size=4))
    pairs = data.draw(st.lists(st.tuples(ids, ids), max_size=12))
    symmetric = data.draw(st.booleans())
    known = {name for shard in shards for name in shard}
    wanted = {pair for pair in pairs if pair[0] in known}
    if symmetric:
        wanted |= {(b, a) for a, b in pairs if b in known}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exclusions, "_GROUP_IDS", data.draw(st.integers(1, 8)))
        patch.setattr(exclusions, "_BLOCK_PAIRS", data.draw(st.integers(1, 8)))
        folder = tmp_path_factory.mktemp("pairs")
        found = prepare(folder, pairs, shards, symmetric=symmetric, ignore_unknown=True)
    assert found == [sorted(pair for pair in wanted if pair[0] in shard) for shard in shards]


def test_unknown_ids_stop_before_anything_is_written(tmp_path: Path) -> None:
    pairs = [("a", "b"), ("x", "a"), ("a", "y"), ("b", "a"), (None, "a")]
    with pytest.raises(DatasetError) as caught:
        prepare(tmp_path, pairs)
    assert str(caught.value) == (
        "join.rules.exclude: 3 of 5 pairs name an image_id that is not there, the first ('x', 'a'), "
        "('a', 'y'), (None, 'a'); wanted ids of the datasets that are joined. Correct the files, or "
        "set join.rules.exclude.unknown_ids: ignore."
    )
    assert not (tmp_path / "exclusions").exists()


def test_only_the_first_unknown_pairs_are_listed(tmp_path: Path) -> None:
    pairs = [("a", f"x{number}") for number in range(9)]
    with pytest.raises(DatasetError, match=r"9 of 9 .*\('a', 'x4'\); wanted"):
        prepare(tmp_path, pairs)


def test_unknown_ids_may_be_ignored_and_are_counted(tmp_path: Path) -> None:
    pairs = [("a", "b"), ("x", "a"), ("b", "y"), (None, "a")]
    found = prepare(tmp_path, pairs, ignore_unknown=True)
    assert found[0] == [("a", "b"), ("b", "y")]
    manifest = manifests.load(str(tmp_path / "exclusions"), exclusions.KIND)
    assert manifest.properties == {"pairs_read": 4, "pairs_unknown": 3}


@pytest.mark.parametrize(
    ("symmetric", "pair", "known"),
    [
        (False, ("q", "x"), True),
        (False, ("x", "q"), False),
        (True, ("x", "q"), True),
        (True, ("q", "q"), False),
        (False, ("x", "x"), False),
    ],
)
def test_queries_and_candidates_of_two_datasets(
    symmetric: bool, pair: tuple[str, str], known: bool, tmp_path: Path
) -> None:
    if known:
        found = prepare(tmp_path, [pair], [["q"]], [["w"], ["x"]], symmetric=symmetric)
        assert ("q", "x") in found[0]
    else:
        with pytest.raises(DatasetError, match="1 of 1 pairs name an image_id that is not there"):
            prepare(tmp_path, [pair], [["q"]], [["w"], ["x"]], symmetric=symmetric)


def test_the_same_pairs_give_the_same_bytes_and_are_not_made_again(tmp_path: Path) -> None:
    pairs = [("d", "a"), ("a", "d"), ("a", "b")]
    prepare(tmp_path / "one", pairs)
    prepare(tmp_path / "two", [*pairs[::-1], pairs[0]])
    names = sorted(path.name for path in (tmp_path / "one" / "exclusions").glob("*.parquet"))
    assert names == [f"part-{number:05d}.parquet" for number in range(3)]
    contents = [
        [(tmp_path / side / "exclusions" / name).read_bytes() for name in names]
        for side in ("one", "two")
    ]
    assert contents[0] == contents[1]
    made = (tmp_path / "one" / "exclusions" / names[0]).stat().st_mtime_ns
    prepare(tmp_path / "one", [("e", "e")])
    assert (tmp_path / "one" / "exclusions" / names[0]).stat().st_mtime_ns == made


def test_ids_that_are_numbers_or_dictionaries_are_text(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1, 2]), "b": pa.array(["2", "1"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "pairs.parquet")
    spec = ExclusionSpec((str(tmp_path / "pairs.parquet"),), columns=("a", "b"))
    prepare_exclusions(find_exclusions(spec), str(tmp_path / "e"), "identity", shards_of([["1", "2"]]))
    assert read_exclusions(str(tmp_path / "e"), 0)["neighbor_id"].to_pylist() == ["2", "1"]


def test_what_decides_is_in_the_fingerprint_and_places_are_not(tmp_path: Path) -> None:
    first = write_pairs(tmp_path / "one.parquet", [("a", "b")])
    second = write_pairs(tmp_path / "elsewhere" / "two.parquet", [("a", "b")])
    rules = [find_exclusions(ExclusionSpec((path,))).rule() for path in (first, second)]
    assert rules[0] == rules[1]
    write_pairs(tmp_path / "one.parquet", [("a", "c")])
    assert find_exclusions(ExclusionSpec((first,))).rule() != rules[0]
    symmetric = find_exclusions(ExclusionSpec((second,), symmetric=True)).rule()
    made = {
        exclusions_identity(rules[0], "q", "c"),
        exclusions_identity(symmetric, "q", "c"),
        exclusions_identity(rules[0], "other", "c"),
        exclusions_identity(rules[0], "q", "other"),
    }
    assert len(made) == 4


def test_files_that_cannot_be_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="join.rules.exclude.paths: no file matches"):
        find_exclusions(ExclusionSpec((str(tmp_path / "none*.parquet"),)))
    path = write_pairs(tmp_path / "pairs.parquet", [("a", "b")])
    with pytest.raises(ConfigError) as caught:
        find_exclusions(ExclusionSpec((path,), columns=("query_id", "other")))
    assert str(caught.value) == (
        f"join.rules.exclude.neighbor_column: {path} has 0 columns 'other', wanted one; its columns "
        "are query_id, neighbor_id. Correct the name or the file."
    )
    pq.write_table(pa.table({"query_id": [1.5], "neighbor_id": ["a"]}), path)
    with pytest.raises(ConfigError, match="'query_id' as double, wanted ids as text or whole numbers"):
        find_exclusions(ExclusionSpec((path,)))
    Path(path).write_bytes(b"PAR1 and no more")
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        find_exclusions(ExclusionSpec((path,)))


def test_a_prepared_part_that_was_changed_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, [("a", "b")])
    write_pairs(tmp_path / "exclusions" / "part-00000.parquet", [("a", "c")])
    with pytest.raises(DatasetError, match="does not match its checksum"):
        read_exclusions(str(tmp_path / "exclusions"), 0)
