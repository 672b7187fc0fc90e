"""WebDataset tars: samples as the convention groups them, and damaged archives as far as they go."""

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.sources.base import ImageRecord, UnreadableRegion
from transforms.sources.webdataset import WebDatasetSource

BLOCK = 512
IMAGES = [f"image number {i}".encode() * 99 * (i + 1) for i in range(5)]
MEMBERS = [
    (f"shop/{i}.{extension}", content)
    for i, data in enumerate(IMAGES)
    for extension, content in (("jpg", data), ("json", json.dumps({"n": i}).encode()))
]


def tar_of(members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def header_of(data: bytes, name: str) -> int:
    """Where the header of a member begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


def source_of(path: Path, **settings: Any) -> WebDatasetSource:
    return WebDatasetSource(format="webdataset", paths=(str(path),), **settings)


def read_all(
    path: Path, metadata: dict[str, str] | None = None, **settings: Any
) -> list[ImageRecord | UnreadableRegion]:
    source = source_of(path, **settings)
    (shard,) = source.list_shards(0, "unused")
    return list(source.read(shard, metadata or {}))


def write(path: Path, members: Sequence[tuple[str, bytes]] = MEMBERS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def records_of(items: Sequence[ImageRecord | UnreadableRegion]) -> list[ImageRecord]:
    records = [item for item in items if isinstance(item, ImageRecord)]
    assert [record.row for record in records] == list(range(len(records)))
    return records


def regions_of(items: Sequence[ImageRecord | UnreadableRegion]) -> list[UnreadableRegion]:
    return [item for item in items if isinstance(item, UnreadableRegion)]


def only_record(path: Path, metadata: dict[str, str] | None = None, **settings: Any) -> ImageRecord:
    (record,) = read_all(path, metadata, **settings)
    assert isinstance(record, ImageRecord)
    return record


def reason_of(record: ImageRecord) -> str:
    assert record.error is not None
    assert record.data == b""
    return record.error.reason


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("compress", [False, True])
def test_samples_are_read_in_order(tmp_path: Path, kind: int, compress: bool) -> None:
    data = tar_of(MEMBERS, kind)
    path = tmp_path / "tars" / ("a.tar.gz" if compress else "a.tar")
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data) if compress else data)
    items = read_all(path, {"n": "int64"})
    assert regions_of(items) == []
    records = records_of(items)
    assert [r.data for r in records] == IMAGES
    assert [r.image_id for r in records] == [f"shop/{i}" for i in range(5)]
    assert [r.metadata for r in records] == [{"n": i} for i in range(5)]
    assert {(r.source_shard, r.item_id, r.error) for r in records} == {
        (f"tars/{path.name}", None, None)
    }


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_whole(tmp_path: Path, kind: int) -> None:
    names = ["a" * 150, "ü/日本", "b/" * 90 + "c" * 120]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([(f"{name}.png", b"x") for name in names], kind))
    items = read_all(path)
    assert regions_of(items) == []
    assert [r.image_id for r in records_of(items)] == names


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.jpg", "a.cls", "b.PNG", "b.json"], {"a": "a.jpg", "b": "b.PNG"}),
        (["x.y/a.b.jpg", "x.y/a.jpg"], {"x.y/a": "x.y/a.jpg"}),
        (["a.png", "a.jpg"], {"a": "a.jpg"}),
        (["./a.webp", "d/a.tif"], {"./a": "./a.webp", "d/a": "d/a.tif"}),
        (["README", ".hidden.jpg", "d/._a.jpg", "a.gif"], {"a": "a.gif"}),
        (["a.left.jpg"], {"a": None}),
        (["a.json"], {"a": None}),
    ],
)
def test_members_are_grouped_by_the_first_dot(
    tmp_path: Path, names: list[str], wanted: dict[str, str | None]
) -> None:
    path = write(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    records = records_of(read_all(path))
    assert {r.image_id: r.data.decode() or None for r in records} == wanted
    for record in records:
        assert (record.error is None) == bool(record.data)
        assert record.error is None or record.error.reason == "missing_image"


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]
    records = records_of(read_all(write(tmp_path / "a.tar", members)))
    assert [(r.image_id, r.data) for r in records] == [
        ("a", b"1"), ("a", b"2"), ("b", b"3"), ("a", b"4"),
    ]  # fmt: skip


def test_other_members_and_fields_may_be_named(tmp_path: Path) -> None:
    values = {"sku": 7, "product": "p", "Brand": "acme", "colour": None}
    members = [("1.left.jpg", b"L"), ("1.right.jpg", b"R"), ("1.meta", json.dumps(values).encode())]
    path = write(tmp_path / "a.tar", members)
    fields = {
        "image": ["right.jpg", "left.jpg"],
        "json_member": "meta",
        "image_id": "sku",
        "item_id": "product",
        "metadata": {"brand": "Brand"},
    }
    kinds = {"brand": "string", "colour": "string", "size": "int64"}
    record = only_record(path, kinds, fields=fields)
    assert (record.image_id, record.item_id, record.data) == ("7", "p", b"R")
    assert record.metadata == {"brand": "acme", "colour": None, "size": None}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "bad_metadata"),
        (b"", "bad_metadata"),
        (b"\xff\xfe\xff", "bad_metadata"),
        (b"[1]", "bad_metadata"),
        (b"[" * 100_000, "bad_metadata"),
        (b'{"n": "many"}', "bad_metadata"),
        (b'{"n": [1]}', "bad_metadata"),
        (b'{"n": {}}', "bad_metadata"),
        (b'{"n": NaN}', "bad_metadata"),
        (b'{"n": 1e999}', "bad_metadata"),
        (b'{"n": true}', None),
        (b'{"n": null}', None),
        (b"{}", None),
    ],
)
def test_metadata_that_does_not_fit_costs_its_image_only(
    tmp_path: Path, content: bytes, reason: str | None
) -> None:
    members = [("a.jpg", b"1"), ("a.json", content), ("b.jpg", b"2"), ("b.json", b'{"n": 5}')]
    first, second = records_of(read_all(write(tmp_path / "a.tar", members), {"n": "int64"}))
    assert (first.error and first.error.reason) == reason
    assert first.image_id == "a"
    assert (second.data, second.metadata) == (b"2", {"n": 5})


def test_text_without_a_form_in_utf8_costs_its_image_only(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.json", b'{"n": "\\ud800", "id": "\\ud800"}')]
    path = write(tmp_path / "a.tar", members)
    record = only_record(path, {"n": "string"})
    assert (reason_of(record), record.image_id) == ("bad_metadata", "a")
    record = only_record(path, fields={"image_id": "id"})
    assert (reason_of(record), record.image_id) == ("bad_metadata", None)


@pytest.mark.parametrize("values", [b"{}", b'{"id": ""}', b'{"id": null}'])
def test_a_sample_without_the_id_asked_for_is_one_failure(tmp_path: Path, values: bytes) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", values)])
    record = only_record(path, fields={"image_id": "id"})
    assert (reason_of(record), record.image_id) == ("missing_id", None)
    assert record.error is not None
    assert record.error.message.endswith("Set images.sources.fields.image_id.")


@pytest.mark.parametrize("value", [b"7.0", b"true", b"[]"])
def test_an_id_that_is_neither_text_nor_a_whole_number_is_one_failure(
    tmp_path: Path, value: bytes
) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", b'{"id": %s}' % value)])
    assert reason_of(only_record(path, fields={"image_id": "id"})) == "bad_metadata"


def test_a_name_that_is_not_utf8_is_one_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("b\udcff.jpg", b"1"), ("c.jpg", b"2")], tarfile.GNU_FORMAT))
    first, second = records_of(read_all(path))
    assert (reason_of(first), first.image_id) == ("bad_metadata", None)
    assert second.data == b"2"


def test_links_directories_and_devices_are_no_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("d/l.jpg", tarfile.SYMTYPE),
            ("d/f.jpg", tarfile.FIFOTYPE),
            ("d/h.jpg", tarfile.LNKTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere"
            archive.addfile(member)
        member = tarfile.TarInfo("d/z.jpg")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"z"))
    path = tmp_path / "a.tar"
    path.write_bytes(buffer.getvalue())
    *links, good = records_of(read_all(path))
    assert [(r.image_id, reason_of(r)) for r in links] == [
        ("d/l", "missing_image"), ("d/h", "missing_image"),
    ]  # fmt: skip
    assert links[0].error is not None
    assert "is a link" in links[0].error.message
    assert good.data == b"z"


@pytest.mark.parametrize("byte", [0, 124, 148, 156, 257, 511])
@pytest.mark.parametrize("compress", [False, True])
def test_reading_goes_on_behind_a_damaged_header(tmp_path: Path, byte: int, compress: bool) -> None:
    data = bytearray(tar_of(MEMBERS))
    start, behind = header_of(bytes(data), "shop/2.jpg"), header_of(bytes(data), "shop/2.json")
    data[start + byte] ^= 0x15
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(bytes(data)) if compress else bytes(data))
    items = read_all(path, {"n": "int64"})
    (region,) = regions_of(items)
    assert region.offset == start
    assert region.error == (
        f"The archive cannot be read from byte {start} on: the header of a member does not match its "
        f"checksum. {behind - start} bytes were passed over up to byte {behind}, where the next "
        "member begins."
    )
    records = records_of(items)
    assert [r.data for r in records] == [*IMAGES[:2], b"", *IMAGES[3:]]
    assert (records[2].image_id, reason_of(records[2])) == ("shop/2", "missing_image")


def test_a_lost_json_leaves_the_image_without_metadata(tmp_path: Path) -> None:
    data = bytearray(tar_of(MEMBERS))
    data[header_of(bytes(data), "shop/1.json")] ^= 1
    (tmp_path / "a.tar").write_bytes(bytes(data))
    items = read_all(tmp_path / "a.tar", {"n": "int64"})
    assert len(regions_of(items)) == 1
    records = records_of(items)
    assert [r.data for r in records] == IMAGES
    assert [r.metadata["n"] for r in records] == [0, None, 2, 3, 4]


@pytest.mark.parametrize("removed", [1, 100, 512, 700])
def test_missing_bytes_cost_what_they_touch(tmp_path: Path, removed: int) -> None:
    data = bytearray(tar_of(MEMBERS))
    start = header_of(bytes(data), "shop/1.jpg")
    del data[start + 3 : start + 3 + removed]
    (tmp_path / "a.tar").write_bytes(bytes(data))
    items = read_all(tmp_path / "a.tar")
    assert [region.offset for region in regions_of(items)][:1] == [start]
    found = {r.image_id: r.data for r in records_of(items) if r.error is None}
    assert found == {f"shop/{i}": IMAGES[i] for i in (0, 2, 3, 4)}


@pytest.mark.parametrize("removed", [1, 100, 512, 700])
def test_an_image_that_lacks_bytes_costs_itself_only(tmp_path: Path, removed: int) -> None:
    data = bytearray(tar_of(MEMBERS))
    start = header_of(bytes(data), "shop/3.jpg") + BLOCK + 5
    del data[start : start + removed]
    (tmp_path / "a.tar").write_bytes(bytes(data))
    items = read_all(tmp_path / "a.tar", {"n": "int64"})
    records = records_of(items)
    assert [r.data for r in records] == [*IMAGES[:3], b"", IMAGES[4]]
    assert (records[3].image_id, reason_of(records[3])) == ("shop/3", "corrupt_record")
    assert [r.metadata["n"] for r in records if not r.error] == [0, 1, 2, 4]


def test_a_zeroed_header_is_a_region_and_not_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_of(MEMBERS))
    start = header_of(bytes(data), "shop/1.jpg")
    behind = header_of(bytes(data), "shop/1.json")
    data[start:behind] = bytes(behind - start)
    (tmp_path / "a.tar").write_bytes(bytes(data))
    items = read_all(tmp_path / "a.tar")
    assert [region.offset for region in regions_of(items)] == [start]
    assert [r.data for r in records_of(items)] == [IMAGES[0], b"", *IMAGES[2:]]
    data[start + BLOCK : behind] = b"\xee" * (behind - start - BLOCK)
    (tmp_path / "a.tar").write_bytes(bytes(data))
    assert [r.data for r in records_of(read_all(tmp_path / "a.tar"))] == [IMAGES[0], b"", *IMAGES[2:]]


def test_archives_may_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(MEMBERS[:4]) + tar_of(MEMBERS[4:]))
    items = read_all(tmp_path / "a.tar")
    assert regions_of(items) == []
    assert [r.data for r in records_of(items)] == IMAGES


def test_a_truncated_archive_is_read_up_to_the_cut(tmp_path: Path) -> None:
    data = tar_of(MEMBERS)
    path = tmp_path / "a.tar"
    ends = {name: header_of(data, name) + BLOCK + len(content) for name, content in MEMBERS}
    last = max(ends.values())
    for cut in [0, 1, 511, *range(512, len(data), 317), last, last + 600]:
        path.write_bytes(data[:cut])
        items = read_all(path)
        wanted = [IMAGES[i] for i in range(5) if ends[f"shop/{i}.jpg"] <= cut]
        assert [r.data for r in records_of(items) if r.error is None] == wanted
        regions = regions_of(items)
        complete = cut >= -(-last // BLOCK) * BLOCK + BLOCK
        assert len(regions) == (0 if complete else 1), cut
        if regions:
            assert regions[0].offset is not None
            assert regions[0].offset <= cut
            assert f"from byte {regions[0].offset} on" in regions[0].error


@pytest.mark.parametrize("cut", [2000, 5000, 9000])
def test_a_truncated_gzip_stream_is_read_up_to_the_cut(tmp_path: Path, cut: int) -> None:
    import random

    images = [random.Random(i).randbytes(2000) for i in range(6)]
    data = tar_of([(f"{i}.jpg", image) for i, image in enumerate(images)])
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(data)[:cut])
    items = read_all(path)
    found = [r.data for r in records_of(items)]
    assert found == images[: len(found)]
    # Headers compress to next to nothing, the images not at all.
    assert len(found) in {(cut - 600) // 2000, cut // 2010}
    (region,) = regions_of(items)
    assert region.offset == len(found) * (BLOCK + 2048)
    assert "the gzip stream is damaged (the file ends before the stream does)" in region.error


def test_a_damaged_extended_name_does_not_give_the_image_another_id(tmp_path: Path) -> None:
    name = "a" * 120
    data = bytearray(tar_of([(f"{name}.jpg", b"1"), ("b.jpg", b"2")]))
    at = bytes(data).index(b" path=")
    data[at] = 0x41
    (tmp_path / "a.tar").write_bytes(bytes(data))
    items = read_all(tmp_path / "a.tar")
    assert [(r.image_id, r.data) for r in records_of(items)] == [("b", b"2")]
    assert "the full name of a member cannot be read" in regions_of(items)[0].error


def test_large_members_that_are_not_needed_are_passed_over(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.mp4", bytes(3 << 20)), ("b.jpg", b"2")]
    records = records_of(read_all(write(tmp_path / "a.tar", members)))
    assert [r.data for r in records] == [b"1", b"2"]


def test_fetch_counts_samples_as_read_does(tmp_path: Path) -> None:
    data = bytearray(tar_of(MEMBERS))
    data[header_of(bytes(data), "shop/1.jpg")] ^= 1
    path = tmp_path / "c" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(bytes(data))
    source = source_of(path)
    (shard,) = source.list_shards(2, "unused")
    read = {r.row: r.data for r in records_of(list(source.read(shard, {}))) if r.data}
    assert read == {i: IMAGES[i] for i in (0, 2, 3, 4)}
    assert source.fetch(shard.name, range(9)) == read
    assert source.fetch(shard.name, [3]) == {3: IMAGES[3]}
    assert source.fetch(shard.name, [1]) == {}


def test_every_file_is_one_shard_whose_token_is_its_content(tmp_path: Path) -> None:
    write(tmp_path / "shop" / "b.tar", MEMBERS[:2])
    write(tmp_path / "shop" / "x" / "a.tar", MEMBERS[2:4])
    source = source_of(tmp_path / "shop" / "**" / "*.tar")
    before = source.list_shards(3, "unused")
    assert [s.name for s in before] == ["shop/b.tar", "shop/x/a.tar"]
    write(tmp_path / "shop" / "b.tar", MEMBERS[2:4])
    after = source.list_shards(3, "unused")
    assert [a.token == b.token for a, b in zip(before, after, strict=True)] == [False, True]


@given(st.binary(max_size=3000))
def test_any_bytes_are_read_to_an_end(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(data)
    assert all(isinstance(item, ImageRecord | UnreadableRegion) for item in read_all(path))


@given(data=st.data())
def test_damage_costs_no_sample_that_it_does_not_touch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(tar_of(MEMBERS))
    bounds = [header_of(bytes(content), f"shop/{i}.jpg") for i in range(5)] + [len(content)]
    start = data.draw(st.integers(0, bounds[-1] - 1))
    stop = min(start + data.draw(st.integers(1, 2000)), len(content))
    content[start:stop] = data.draw(st.binary(max_size=64))
    path = tmp_path_factory.getbasetemp() / "touched.tar"
    path.write_bytes(bytes(content))
    found = {r.image_id: r.data for r in records_of(read_all(path))}
    for i in range(5):
        if stop <= bounds[i] or bounds[i + 1] <= start:
            assert found[f"shop/{i}"] == IMAGES[i]
