"""Tables of image URIs: order, shards and their tokens, what is missing, what fails for a while."""

import errno
import gzip
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from index_builder.errors import ConfigError, ImageError, KithError
from transforms.sources import fetching
from transforms.sources.base import ImageRecord
from transforms.sources.table import TableSource

ROWS = 10
DATA = [f"picture {i}".encode() for i in range(ROWS)]
CUT = gzip.compress(b"image_id,uri\na,b\n" * 99, mtime=0)[:-20]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with pictures, and a CSV table that names them."""
    folder = tmp_path / "shop"
    (folder / "pictures").mkdir(parents=True)
    lines = ["image_id,uri,price"]
    for i, data in enumerate(DATA):
        (folder / "pictures" / f"{i}.jpg").write_bytes(data)
        lines.append(f"id-{i},pictures/{i}.jpg,{i}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder


def source_of(path: Path, **settings: Any) -> TableSource:
    return TableSource(
        format="table", paths=(str(path),), **{"rows_per_shard": 4, "fetch_backoff_sec": 0} | settings
    )


def read_all(path: Path, metadata: dict[str, str] | None = None, **settings: Any) -> list[ImageRecord]:
    source = source_of(path, **settings)
    scratch = str(path.parent.parent / "listings")
    return [
        item for shard in source.list_shards(0, scratch) for item in source.read(shard, metadata or {})
    ]


def reason_of(record: ImageRecord) -> str:
    assert record.error is not None
    assert record.data == b""
    return record.error.reason


def write_table(folder: Path, **columns: Any) -> Path:
    path = folder / "images.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def to_parquet(shop: Path, row_group_size: int = 3) -> Path:
    path = shop / "images.parquet"
    names = [f"pictures/{i}.jpg" for i in range(ROWS)]
    ids = [f"id-{i}" for i in range(ROWS)]
    table = pa.table({"price": list(range(ROWS)), "uri": names, "image_id": ids})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("threads", [1, 16])
def test_images_are_read_in_order(shop: Path, kind: str, threads: int) -> None:
    path = to_parquet(shop) if kind == "parquet" else shop / "images.csv"
    if kind == "csv.gz":
        path = shop / "images.csv.gz"
        path.write_bytes(gzip.compress((shop / "images.csv").read_bytes()))
    records = read_all(path, {"price": "int64"}, fetch_threads=threads)
    assert [r.data for r in records] == DATA
    assert [r.image_id for r in records] == [f"id-{i}" for i in range(ROWS)]
    assert [r.row for r in records] == list(range(ROWS))
    assert [r.metadata for r in records] == [{"price": i} for i in range(ROWS)]
    assert [r.source_shard for r in records] == [f"shop/{path.name}#{i // 4:05d}" for i in range(ROWS)]
    assert {(r.item_id, r.error) for r in records} == {(None, None)}


def test_shards_are_ranges_of_rows(shop: Path, tmp_path: Path) -> None:
    (shop / "more.csv").write_text("image_id,uri\n")
    source = source_of(shop / "*.csv")
    shards = source.list_shards(3, str(tmp_path / "listings"))
    assert [(s.name, s.start, s.stop) for s in shards] == [
        ("shop/images.csv#00000", 0, 4),
        ("shop/images.csv#00001", 4, 8),
        ("shop/images.csv#00002", 8, 10),
        ("shop/more.csv#00000", 0, 0),
    ]
    assert {s.source for s in shards} == {3}
    assert list(source.read(shards[-1], {})) == []
    listings = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "listings").iterdir()}
    assert len(listings) == 2
    assert source.list_shards(3, str(tmp_path / "listings")) == shards
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "listings").iterdir()}
    assert again == listings


def test_a_shard_is_read_from_its_listing_whatever_became_of_the_table(
    shop: Path, tmp_path: Path
) -> None:
    source = source_of(shop / "images.csv")
    shards = source.list_shards(0, str(tmp_path / "listings"))
    (shop / "images.csv").write_text("image_id,uri\nother,pictures/0.jpg\n")
    assert [r.data for shard in shards for r in source.read(shard, {})] == DATA


def same_tokens(source: TableSource, before: list[Any], scratch: Path) -> list[bool]:
    after = source.list_shards(0, str(scratch))
    return [a.token == b.token for a, b in zip(before, after, strict=True)]


def test_the_token_of_one_shard_changes_with_an_image_or_a_row(shop: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "listings"
    source = source_of(shop / "images.csv")
    before = source.list_shards(0, str(scratch))
    (shop / "pictures" / "5.jpg").write_bytes(b"another")
    assert same_tokens(source, before, scratch) == [True, False, True]
    (shop / "pictures" / "5.jpg").write_bytes(DATA[5])
    assert same_tokens(source, before, scratch) == [True, True, True]
    (shop / "pictures" / "9.jpg").unlink()
    assert same_tokens(source, before, scratch) == [True, True, False]
    (shop / "pictures" / "9.jpg").write_bytes(DATA[9])
    text = (shop / "images.csv").read_text()
    (shop / "images.csv").write_text(text.replace("0.jpg,0\n", "0.jpg,99\n"))
    assert same_tokens(source, before, scratch) == [False, True, True]


def test_with_a_version_no_image_is_looked_at(shop: Path, tmp_path: Path) -> None:
    ids, uris = ["a", "b", "c"], [f"pictures/{i}.jpg" for i in range(3)]

    def write(versions: list[str | None]) -> Path:
        return write_table(shop, image_id=ids, uri=uris, etag=pa.array(versions, pa.string()))

    scratch = tmp_path / "listings"
    source = source_of(write(["1", "1", "1"]), columns={"version": "etag"}, rows_per_shard=1)
    before = source.list_shards(0, str(scratch))
    for name in uris:
        (shop / name).unlink()
    assert same_tokens(source, before, scratch) == [True, True, True]
    write(["1", "2", "1"])
    assert same_tokens(source, before, scratch) == [True, False, True]
    # Without a version the image itself decides.
    write(["1", "1", None])
    missing = source.list_shards(0, str(scratch))
    (shop / uris[2]).write_bytes(b"there")
    assert same_tokens(source, missing, scratch) == [True, True, False]


def test_uris_may_be_relative_absolute_or_urls(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "up.jpg").write_bytes(b"up")
    fsspec.filesystem("memory").pipe("/bucket/m.jpg", b"memory")
    inside = shop / "pictures" / "1.jpg"
    uris = ["pictures/0.jpg", str(inside), f"file://{inside}", "../up.jpg", "memory://bucket/m.jpg"]
    uris.append(uris[0])
    path = write_table(shop, image_id=list("abcdef"), uri=uris)
    records = read_all(path)
    assert [r.data for r in records] == [DATA[0], DATA[1], DATA[1], b"up", b"memory", DATA[0]]


def test_an_image_that_is_not_there_is_one_failure(shop: Path) -> None:
    (shop / "pictures" / "3.jpg").unlink()
    records = read_all(shop / "images.csv")
    assert [r.data for r in records] == [*DATA[:3], b"", *DATA[4:]]
    assert (records[3].image_id, reason_of(records[3])) == ("id-3", "unreadable_file")
    assert records[3].error is not None
    assert str(shop / "pictures" / "3.jpg") in records[3].error.message


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (None, "missing_image"),
        ("", "missing_image"),
        ("pictures", "unreadable_file"),
        ("pictures/0.jpg/x", "unreadable_file"),
        ("nosuchprotocol://a/b", "unreadable_file"),
        ("x" * 5000, "unreadable_file"),
        ("a\0b", "unreadable_file"),
        (b"\xff", "bad_metadata"),
    ],
)
def test_a_uri_that_leads_nowhere_is_one_failure(shop: Path, uri: Any, reason: str) -> None:
    kind = pa.binary() if isinstance(uri, bytes) else pa.string()
    good = b"pictures/1.jpg" if isinstance(uri, bytes) else "pictures/1.jpg"
    path = write_table(shop, image_id=["a", "b"], uri=pa.array([uri, good], kind))
    first, second = read_all(path)
    assert (reason_of(first), first.image_id) == (reason, "a")
    assert second.data == DATA[1]


def test_a_uri_of_another_type_is_one_failure_each(shop: Path) -> None:
    records = read_all(write_table(shop, image_id=["a", "b"], uri=[1, 2]))
    assert [reason_of(r) for r in records] == ["missing_image"] * 2


def test_rows_that_do_not_fit_are_one_failure_each(shop: Path) -> None:
    path = shop / "images.csv"
    lines = [
        "image_id,item_id,uri,price",
        ",i,pictures/0.jpg,1",
        "b,,pictures/1.jpg,",
        "c,i,pictures/2.jpg,cheap",
        "d,i",
        '"e ""5"",\nf",i,pictures/3.jpg,7',
        "g,i,pictures/4.jpg,8,9",
        "h,i,,8",
        "ü,i,pictures/5.jpg,8",
        "",
        "too,few",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\n\xff,i,pictures/6.jpg,1\n")
    columns = {"item_id": "item_id"}
    records = read_all(path, {"price": "int64"}, columns=columns)
    assert [r.row for r in records] == list(range(10))
    assert [r.error and r.error.reason for r in records] == [
        "missing_id", None, "bad_metadata", "bad_row", None,
        "bad_row", "missing_image", None, "bad_row", "bad_metadata",
    ]  # fmt: skip
    assert [r.image_id for r in records] == [
        None, "b", "c", None, 'e "5",\nf', None, "h", "ü", None, None
    ]  # fmt: skip
    assert [r.data for r in records if r.error is None] == [DATA[1], DATA[3], DATA[5]]
    assert (records[1].item_id, records[1].metadata) == (None, {"price": None})
    assert (records[4].item_id, records[4].metadata) == ("i", {"price": 7})
    assert records[3].error is not None
    assert records[3].error.message == "Line 5 of the table has 2 fields, wanted 4: 'd,i'"


@pytest.mark.parametrize("place", [0, 1, 1999, 2000])
def test_a_misfit_keeps_its_place_in_a_long_table(shop: Path, tmp_path: Path, place: int) -> None:
    lines = [f"id-{i},pictures/0.jpg,{'x' * 9000}" for i in range(2000)]
    lines.insert(place, "misfit")
    (shop / "images.csv").write_text("image_id,uri,text\n" + "\n".join(lines) + "\n")
    source = source_of(shop / "images.csv", rows_per_shard=1000)
    shards = source.list_shards(0, str(tmp_path / "listings"))
    assert [(s.start, s.stop) for s in shards] == [(0, 1000), (1000, 2000), (2000, 2001)]
    found = [r for shard in shards for r in source.read(shard, {})]
    assert [r.row for r in found] == list(range(2001))
    assert [r.row for r in found if r.error] == [place]
    ids = [f"id-{i}" for i in range(2000)]
    assert [r.image_id for r in found if not r.error] == ids


def test_other_columns_and_delimiters(shop: Path) -> None:
    (shop / "images.csv").write_text("sku;product;Brand;file\n007;p;acme;pictures/0.jpg\n")
    columns = {
        "image_id": "sku",
        "item_id": "product",
        "uri": "file",
        "metadata": {"brand": "Brand"},
    }
    kinds = {"brand": "string", "size": "int64"}
    (record,) = read_all(shop / "images.csv", kinds, columns=columns, delimiter=";")
    # Text stays as it is written: 007 is no number.
    assert (record.image_id, record.item_id, record.data) == ("007", "p", DATA[0])
    assert record.metadata == {"brand": "acme", "size": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image_id,url\na,b\n", "has the columns 'image_id', 'url', wanted also 'uri'. Set "),
        (b"image_id;uri\na;b\n", "has the columns 'image_id;uri', wanted also 'image_id'. Set "),
        (b"image_id,uri,uri\na,b,c\n", "has the column 'uri' 2 times, wanted each once. Rename one."),
    ],
)
def test_a_table_of_other_columns_is_refused(shop: Path, content: bytes, message: str) -> None:
    (shop / "images.csv").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_all(shop / "images.csv")
    assert str(caught.value).startswith(f"{shop}/images.csv {message}")


def test_a_column_asked_for_later_is_refused_too(shop: Path) -> None:
    read_all(shop / "images.csv")
    with pytest.raises(ConfigError, match="wanted also 'etag'"):
        read_all(shop / "images.csv", columns={"version": "etag"})


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 20, b"\x1f\x8b\x08" + bytes(30), CUT])
def test_a_table_that_cannot_be_read_is_refused(shop: Path, content: bytes) -> None:
    (shop / "images.csv").write_bytes(content)
    with pytest.raises(KithError, match="cannot be read as a table, wanted Parquet or CSV: ") as caught:
        read_all(shop / "images.csv")
    assert not isinstance(caught.value, ConfigError)


def test_how_fast_images_are_fetched_is_no_part_of_what_is_read(shop: Path) -> None:
    slow = source_of(shop / "images.csv", fetch_threads=1, fetch_attempts=9, name="other")
    fast = source_of(shop / "*.csv", fetch_threads=64, fetch_backoff_sec=1)
    assert slow.reading() == fast.reading()
    for settings in ({"delimiter": ";"}, {"columns": {"uri": "url"}}, {"rows_per_shard": 9}):
        assert source_of(shop / "images.csv", **settings).reading() != fast.reading()


def test_fetch_returns_the_same_bytes(shop: Path, tmp_path: Path) -> None:
    (shop / "pictures" / "3.jpg").unlink()
    for path in (shop / "images.csv", to_parquet(shop)):
        source = source_of(path)
        shards = source.list_shards(0, str(tmp_path / "listings"))
        for shard in shards:
            read = {r.row: r.data for r in source.read(shard, {}) if r.data}
            assert source.fetch(shard.name, range(shard.start, shard.stop)) == read
        assert source.fetch(shards[1].name, [9, 3, 5, 99]) == {5: DATA[5], 9: DATA[9]}
    for content in (b"", b"image_id,other\na,b\n"):
        (shop / "images.csv").write_bytes(content)
        assert source_of(shop / "images.csv").fetch("shop/images.csv#00000", [0]) == {}
    (shop / "images.csv").unlink()
    assert source_of(shop / "images.csv").fetch("shop/images.csv#00000", [0]) == {}


class FlakyFileSystem(MemoryFileSystem):
    """Files in memory that cannot be had at first; `failures` says how often, `error` how."""

    protocol = "flaky"
    cachable = False
    failures = 0
    error: Exception = TimeoutError("timed out")
    asked: ClassVar[Counter[str]] = Counter()
    running = 0
    most = 0
    lock = threading.Lock()

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        with self.lock:
            kind = type(self)
            kind.running += 1
            kind.most = max(kind.most, kind.running)
            kind.asked[path] += 1
            number = kind.asked[path]
        try:
            threading.Event().wait(0.005)
            if number <= self.failures:
                raise self.error
            return path.rsplit("/", 1)[-1].encode()
        finally:
            with self.lock:
                kind.running -= 1

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": 1, "type": "file", "md5Hash": "AAAA"}


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    for name, value in [("failures", 0), ("asked", Counter()), ("running", 0), ("most", 0)]:
        monkeypatch.setattr(FlakyFileSystem, name, value)
    return FlakyFileSystem


def flaky_table(shop: Path, count: int = 8) -> Path:
    names = [f"flaky://bucket/{i}" for i in range(count)]
    return write_table(shop, image_id=[str(i) for i in range(count)], uri=names)


class HttpError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("timed out"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.EIO, "I/O"),
        HttpError(503),
        HttpError(429),
    ],
)
def test_what_fails_for_a_while_is_fetched_again(
    shop: Path, flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(flaky, "error", error)
    monkeypatch.setattr(flaky, "failures", 2)
    records = read_all(flaky_table(shop))
    assert [r.data.decode() for r in records] == [str(i) for i in range(8)]
    assert set(flaky.asked.values()) == {3}
    flaky.asked.clear()
    monkeypatch.setattr(flaky, "failures", 3)
    records = read_all(flaky_table(shop))
    assert {reason_of(r) for r in records} == {"fetch_failed"}
    assert set(flaky.asked.values()) == {3}
    assert records[0].error is not None
    assert records[0].error.message == (
        f"flaky://bucket/0 could not be fetched in 3 attempts: {type(error).__name__}: {error}"
    )


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), HttpError(403), ValueError("x")]
)
def test_what_another_attempt_does_not_change_is_not_tried_again(
    shop: Path, flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(flaky, "error", error)
    monkeypatch.setattr(flaky, "failures", 1)
    assert {reason_of(r) for r in read_all(flaky_table(shop))} == {"unreadable_file"}
    assert set(flaky.asked.values()) == {1}


def test_the_pause_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)

    def fail() -> bytes:
        raise TimeoutError

    with pytest.raises(ImageError, match="in 5 attempts: TimeoutError$"):
        fetching.try_again(fail, "u", 5, 0.5)
    assert pauses == [0.5, 1, 2, 4]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_are_fetched_at_a_time_than_allowed(
    shop: Path, flaky: type[FlakyFileSystem], threads: int
) -> None:
    records = read_all(flaky_table(shop, 40), fetch_threads=threads, rows_per_shard=40)
    assert [r.data.decode() for r in records] == [str(i) for i in range(40)]
    assert flaky.most == threads


def test_no_more_are_fetched_ahead_than_allowed(
    shop: Path, tmp_path: Path, flaky: type[FlakyFileSystem]
) -> None:
    source = source_of(flaky_table(shop, 40), fetch_threads=2, rows_per_shard=40)
    (shard,) = source.list_shards(0, str(tmp_path / "listings"))
    assert not flaky.asked
    records = cast(Generator[ImageRecord, None, None], source.read(shard, {}))
    for read in range(1, 6):
        next(records)
        threading.Event().wait(0.05)
        assert sum(flaky.asked.values()) <= read + 4
    # A reader that stops early leaves nothing running.
    records.close()
    assert flaky.running == 0
    assert sum(flaky.asked.values()) < 12
