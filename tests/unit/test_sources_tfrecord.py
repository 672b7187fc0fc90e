"""TFRecord files: intact ones as TensorFlow reads them, damaged ones as far as they go."""

import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.errors import ConfigError, ImageError, KithError
from tests.unit.records_for_tests import (
    FOOTER_BYTES,
    HEADER_BYTES,
    crc32c,
    example,
    frame,
    masked_crc,
    write_records,
)
from transforms.sources.base import ImageRecord, ImageShard, UnreadableRegion
from transforms.sources.conversion import convert
from transforms.sources.tfrecord import TFRecordSource

IMAGES = [f"image number {i}".encode() * (i + 1) for i in range(5)]
EXAMPLES = [example(image_id=f"id-{i}", image__encoded=data) for i, data in enumerate(IMAGES)]


def source_of(path: Path, **settings: Any) -> TFRecordSource:
    return TFRecordSource(format="tfrecord", paths=(str(path),), **settings)


def read_all(
    path: Path, metadata: dict[str, str] | None = None, **settings: Any
) -> list[ImageRecord | UnreadableRegion]:
    source = source_of(path, **settings)
    (shard,) = source.list_shards(0, "unused")
    return list(source.read(shard, metadata or {}))


def records_of(items: Sequence[ImageRecord | UnreadableRegion]) -> list[ImageRecord]:
    records = [item for item in items if isinstance(item, ImageRecord)]
    assert len(records) == len(items)
    return records


def one_record(payload: bytes, tmp_path: Path, **settings: Any) -> ImageRecord:
    path = write_records(tmp_path / "one.tfrecord", [payload])
    (record,) = records_of(read_all(path, **settings))
    return record


def reason_of(record: ImageRecord) -> str:
    assert record.error is not None
    assert record.data == b""
    return record.error.reason


def frame_start(number: int) -> int:
    """Where a record of EXAMPLES begins in an uncompressed file."""
    return sum(HEADER_BYTES + len(payload) + FOOTER_BYTES for payload in EXAMPLES[:number])


@pytest.mark.parametrize("compression", ["auto", "none"])
def test_plain_files_are_read_in_order(tmp_path: Path, compression: str) -> None:
    path = write_records(tmp_path / "shop" / "a.tfrecord", EXAMPLES)
    records = records_of(read_all(path, compression=compression))
    assert [r.data for r in records] == IMAGES
    assert [r.image_id for r in records] == [f"id-{i}" for i in range(5)]
    assert [r.row for r in records] == [0, 1, 2, 3, 4]
    assert {r.source_shard for r in records} == {"shop/a.tfrecord"}
    assert {(r.item_id, r.error) for r in records} == {(None, None)}


@pytest.mark.parametrize("compression", ["auto", "gzip"])
def test_gzip_files_are_read_in_order(tmp_path: Path, compression: str) -> None:
    path = write_records(tmp_path / "a.tfrecord.gz", EXAMPLES, compress=True)
    records = records_of(read_all(path, compression=compression))
    assert [(r.row, r.data) for r in records] == list(enumerate(IMAGES))


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(gzip.compress(frame(payload)) for payload in EXAMPLES))
    assert [r.data for r in records_of(read_all(path))] == IMAGES


def test_a_plain_length_that_spells_gzips_magic_is_not_taken_for_gzip(tmp_path: Path) -> None:
    length = 0x088B1F
    shell = len(example(image_id="big", image__encoded=b"x" * length)) - length
    data = b"x" * (length - shell)
    payload = example(image_id="big", image__encoded=data)
    path = write_records(tmp_path / "a.tfrecord", [EXAMPLES[0]])
    # The reference checksum takes a second for half a megabyte, so the library's serves here.
    crc = int(google_crc32c.value(payload))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    header = struct.pack("<Q", len(payload))
    header += struct.pack("<I", masked_crc(header))
    path.write_bytes(header + payload + struct.pack("<I", masked) + frame(EXAMPLES[1]))
    assert path.read_bytes()[:3] == b"\x1f\x8b\x08"
    big, second = records_of(read_all(path))
    assert (big.image_id, big.data) == ("big", data)
    assert second.data == IMAGES[1]


def test_auto_looks_at_each_file_for_itself(tmp_path: Path) -> None:
    write_records(tmp_path / "a.tfrecord", EXAMPLES[:2])
    write_records(tmp_path / "b.tfrecord", EXAMPLES[2:], compress=True)
    source = source_of(tmp_path / "*.tfrecord")
    shards = source.list_shards(0, "unused")
    records = [record for shard in shards for record in records_of(list(source.read(shard, {})))]
    assert [r.data for r in records] == IMAGES


def test_a_file_that_is_not_of_the_stated_compression_is_one_region(tmp_path: Path) -> None:
    packed = write_records(tmp_path / "packed", EXAMPLES, compress=True)
    plain = write_records(tmp_path / "plain", EXAMPLES)
    (lost,) = read_all(packed, compression="none")
    assert isinstance(lost, UnreadableRegion)
    assert lost.error.startswith("The framing is lost at byte 0: ")
    (lost,) = read_all(plain, compression="gzip")
    assert isinstance(lost, UnreadableRegion)
    assert lost.error.startswith(f"The gzip stream of {plain} is damaged: ")


@pytest.mark.parametrize("compress", [False, True])
def test_an_empty_file_has_no_images(tmp_path: Path, compress: bool) -> None:
    assert read_all(write_records(tmp_path / "a.tfrecord", [], compress=compress)) == []


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_tensorflow_writes_and_reads_the_same_records(tmp_path: Path, compression: str) -> None:
    import tensorflow as tf

    path = str(tmp_path / "a.tfrecord")
    with tf.io.TFRecordWriter(path, compression) as writer:
        for payload in EXAMPLES:
            writer.write(payload)
    theirs = [tensor.numpy() for tensor in tf.data.TFRecordDataset(path, compression)]
    assert theirs == EXAMPLES
    wanted = []
    for payload in theirs:
        features = tf.train.Example.FromString(payload).features.feature
        wanted.append(
            (
                features["image_id"].bytes_list.value[0].decode(),
                features["image/encoded"].bytes_list.value[0],
            )
        )
    assert [(r.image_id, r.data) for r in records_of(read_all(Path(path)))] == wanted
    if not compression:
        # The writer of these tests makes the same bytes.
        assert write_records(tmp_path / "b", EXAMPLES).read_bytes() == Path(path).read_bytes()


def test_the_checksum_of_the_test_files_is_crc32c() -> None:
    # The check value of the CRC catalogue.
    assert crc32c(b"123456789") == 0xE3069283


def test_features_may_have_other_names(tmp_path: Path) -> None:
    payload = example(sku="s1", product="p1", jpeg=b"data", Brand="acme", colour="red")
    features = {
        "image": "jpeg",
        "image_id": "sku",
        "item_id": "product",
        "metadata": {"brand": "Brand"},
    }
    path = write_records(tmp_path / "a.tfrecord", [payload])
    (record,) = records_of(
        read_all(path, {"brand": "string", "colour": "string", "size": "int64"}, features=features)
    )
    assert (record.image_id, record.item_id, record.data) == ("s1", "p1", b"data")
    assert record.metadata == {"brand": "acme", "colour": "red", "size": None}


@pytest.mark.parametrize(("value", "wanted"), [(7, "7"), (-(2**63), str(-(2**63))), ("ü/7", "ü/7")])
def test_ids_are_texts_or_whole_numbers(tmp_path: Path, value: int | str, wanted: str) -> None:
    payload = example(image_id=value, item=value, image__encoded=b"x")
    record = one_record(payload, tmp_path, features={"item_id": "item"})
    assert (record.image_id, record.item_id, record.error) == (wanted, wanted, None)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        ("red", "string", "red"),
        (7, "string", "7"),
        ("7", "int64", 7),
        (2**62 + 1, "int64", 2**62 + 1),
        (3.0, "int64", 3),
        (0.5, "float64", 0.5),
        ("1e3", "float64", 1000.0),
        (7, "float64", 7.0),
        (1, "bool", True),
        ("0", "bool", False),
        ("true", "bool", True),
        ("False", "bool", False),
        (["first", "second"], "string", "first"),
        ([], "string", None),
        ("", "string", ""),
    ],
)
def test_metadata_has_the_configured_type(
    tmp_path: Path, value: Any, kind: str, wanted: object
) -> None:
    path = write_records(tmp_path / "a", [example(image_id="a", image__encoded=b"x", c=value)])
    (record,) = records_of(read_all(path, {"c": kind}))
    assert record.error is None
    assert record.metadata == {"c": wanted}
    assert type(record.metadata["c"]) is type(wanted)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("many", "int64"),
        ("", "int64"),
        (0.5, "int64"),
        (math.inf, "int64"),
        (math.nan, "bool"),
        ("yes", "bool"),
        (2, "bool"),
        ("cheap", "float64"),
        (b"\xff\xfe", "string"),
    ],
)
def test_metadata_of_another_type_fails_that_image_only(tmp_path: Path, value: Any, kind: str) -> None:
    good = example(image_id="b", image__encoded=b"y")
    bad = example(image_id="a", image__encoded=b"x", c=value)
    path = write_records(tmp_path / "a.tfrecord", [bad, good])
    first, second = records_of(read_all(path, {"c": kind}))
    assert reason_of(first) == "bad_metadata"
    assert first.error is not None
    assert first.error.message.startswith("Feature 'c' is ")
    # The id was read, so the row in `failures` can be found by it.
    assert first.image_id == "a"
    assert (second.data, second.error) == (b"y", None)


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(), st.binary()))
def test_any_value_converts_or_says_why_not(value: Any) -> None:
    kinds = {"string": str, "int64": int, "float64": float, "bool": bool}
    for kind, wanted in kinds.items():
        try:
            found = convert(value, "c", kind)
        except ImageError as error:
            assert error.reason == "bad_metadata"
        else:
            assert type(found) is wanted


def test_a_number_too_large_for_int64_fails_that_image(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a", [example(image_id="a", image__encoded=b"x", c=str(2**63))])
    (record,) = records_of(read_all(path, {"c": "int64"}))
    assert reason_of(record) == "bad_metadata"


@pytest.mark.parametrize(
    "payload",
    [
        example(image__encoded=b"x"),
        example(image_id="", image__encoded=b"x"),
        example(image_id=[], image__encoded=b"x"),
        b"",
    ],
    ids=["absent", "empty", "no values", "empty record"],
)
def test_a_record_without_an_id_is_one_failure(tmp_path: Path, payload: bytes) -> None:
    record = one_record(payload, tmp_path)
    assert reason_of(record) == "missing_id"
    assert record.image_id is None
    assert record.error is not None
    assert record.error.message.endswith("Set images.sources.features.image_id.")


def test_an_id_that_is_no_text_is_one_failure(tmp_path: Path) -> None:
    record = one_record(example(image_id=b"\xff", image__encoded=b"x"), tmp_path)
    assert reason_of(record) == "bad_metadata"
    assert record.image_id is None


@pytest.mark.parametrize(
    "payload",
    [
        example(image_id="a", other="x"),
        example(image_id="a", image__encoded=[]),
        example(image_id="a", image__encoded=3),
    ],
    ids=["absent", "no values", "a number"],
)
def test_a_record_without_an_image_is_one_failure(tmp_path: Path, payload: bytes) -> None:
    record = one_record(payload, tmp_path)
    assert reason_of(record) == "missing_image"
    assert record.image_id == "a"
    assert record.error is not None
    assert record.error.message.startswith("Feature 'image/encoded' holds no image; the record has ")


def test_a_payload_that_is_no_example_is_one_failure(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a", [EXAMPLES[0], b"\x89PNG\r\n", EXAMPLES[1]])
    records = records_of(read_all(path))
    assert [r.data for r in records] == [IMAGES[0], b"", IMAGES[1]]
    assert reason_of(records[1]) == "not_an_example"
    assert records[1].row == 1


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["payload", "checksum"])
def test_a_damaged_payload_costs_one_record(tmp_path: Path, compress: bool, place: str) -> None:
    data = bytearray(b"".join(map(frame, EXAMPLES)))
    data[frame_start(3) - 1 if place == "checksum" else frame_start(2) + HEADER_BYTES + 8] ^= 1
    path = tmp_path / "a.tfrecord"
    path.write_bytes(gzip.compress(bytes(data)) if compress else bytes(data))
    records = records_of(read_all(path))
    assert [r.row for r in records] == [0, 1, 2, 3, 4]
    assert reason_of(records[2]) == "corrupt_record"
    assert records[2].image_id is None
    assert [r.data for r in records if r.error is None] == [IMAGES[i] for i in (0, 1, 3, 4)]


def write_damaged(path: Path, data: bytes, compress: bool = False) -> Path:
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


def whole_file() -> bytearray:
    return bytearray(b"".join(map(frame, EXAMPLES)))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("byte", range(HEADER_BYTES))
def test_reading_goes_on_behind_a_damaged_header(tmp_path: Path, byte: int, compress: bool) -> None:
    data = whole_file()
    data[frame_start(2) + byte] ^= 0x10
    first, second, region, *rest = read_all(write_damaged(tmp_path / "a", bytes(data), compress))
    records = records_of([first, second, *rest])
    assert [r.data for r in records] == [IMAGES[i] for i in (0, 1, 3, 4)]
    assert [r.row for r in records] == [0, 1, 2, 3]
    assert region == UnreadableRegion(
        records[0].source_shard,
        f"The framing is lost at byte {frame_start(2)}: the length of the record does not match its "
        f"checksum. {frame_start(3) - frame_start(2)} bytes were passed over up to byte "
        f"{frame_start(3)}, where the next whole record begins.",
        frame_start(2),
    )


def test_a_damaged_last_header_ends_the_file_there(tmp_path: Path) -> None:
    data = whole_file()
    data[frame_start(4)] ^= 1
    *records, region = read_all(write_damaged(tmp_path / "a", bytes(data)))
    assert [r.data for r in records_of(records)] == IMAGES[:4]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(4)
    assert region.error.endswith(f"follows in the {len(data) - frame_start(4)} bytes up to the end.")


def test_a_length_that_runs_past_the_file_costs_its_record_only(tmp_path: Path) -> None:
    data = whole_file()
    length = struct.pack("<Q", 1 << 20)
    at = frame_start(1)
    data[at : at + HEADER_BYTES] = length + struct.pack("<I", masked_crc(length))
    first, region, *rest = read_all(write_damaged(tmp_path / "a", bytes(data)))
    assert [r.data for r in records_of([first, *rest])] == [IMAGES[i] for i in (0, 2, 3, 4)]
    assert isinstance(region, UnreadableRegion)
    assert (region.offset, region.error[:31]) == (at, f"The framing is lost at byte {at}: "[:31])
    assert "the file ends inside the record (1048576 bytes long)" in region.error


@pytest.mark.parametrize("place", [0, 1, 20, 21])
@pytest.mark.parametrize("removed", [1, 3, 12, 16])
def test_missing_bytes_cost_no_record_that_is_whole(tmp_path: Path, place: int, removed: int) -> None:
    data = whole_file()
    at = frame_start(2) + place
    del data[at : at + removed]
    items = read_all(write_damaged(tmp_path / "a", bytes(data)))
    whole = {item.data for item in items if isinstance(item, ImageRecord) and item.error is None}
    assert whole == {IMAGES[i] for i in (0, 1, 3, 4)}
    (region,) = [item for item in items if isinstance(item, UnreadableRegion)]
    assert region.offset is not None
    assert frame_start(2) <= region.offset <= frame_start(3)


def test_a_record_with_a_bad_checksum_inside_a_gap_belongs_to_it(tmp_path: Path) -> None:
    data = whole_file()
    data[frame_start(1)] ^= 1
    data[frame_start(3) - 1] ^= 1
    first, region, *rest = read_all(write_damaged(tmp_path / "a", bytes(data)))
    assert [r.data for r in records_of([first, *rest])] == [IMAGES[i] for i in (0, 3, 4)]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(1)


def test_a_bad_payload_before_a_bad_header_is_a_row_of_its_own(tmp_path: Path) -> None:
    data = whole_file()
    data[frame_start(1) + HEADER_BYTES] ^= 1
    data[frame_start(2)] ^= 1
    first, second, region, *rest = read_all(write_damaged(tmp_path / "a", bytes(data)))
    records = records_of([first, second, *rest])
    assert reason_of(records[1]) == "corrupt_record"
    assert [r.data for r in records] == [IMAGES[0], b"", IMAGES[3], IMAGES[4]]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(2)


@pytest.mark.parametrize(
    "filler",
    [b"\0", b"\xff", b"\1\0\0\0\0\0\0\0", bytes(range(256)), b"\7\0\0\0\0\0\0\0" + bytes(4)],
    ids=["zeros", "ones", "small numbers", "all bytes", "lengths"],
)
def test_any_gap_is_passed_over_in_one_step(tmp_path: Path, filler: bytes) -> None:
    # Wider than what is looked at in one go, and of a length that is no multiple of anything.
    size = (5 << 19) + 13
    gap = (filler * (size // len(filler) + 1))[:size]
    data = frame(EXAMPLES[0]) + gap + frame(EXAMPLES[1]) + frame(EXAMPLES[2])
    first, region, *rest = read_all(write_damaged(tmp_path / "a", data))
    assert [r.data for r in records_of([first, *rest])] == IMAGES[:3]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(1)
    assert f" {len(gap)} bytes were passed over up to byte {frame_start(1) + len(gap)}," in region.error


@pytest.mark.parametrize("shift", range(20))
def test_a_record_on_the_bounds_of_what_is_looked_at_is_found(tmp_path: Path, shift: int) -> None:
    before = (1 << 20) - 19 + shift
    first, *records = read_all(write_damaged(tmp_path / "a", b"\xee" * before + frame(EXAMPLES[3])))
    assert isinstance(first, UnreadableRegion)
    assert [r.data for r in records_of(records)] == [IMAGES[3]]


def test_an_empty_payload_is_a_record(tmp_path: Path) -> None:
    data = b"\xee" * 99 + frame(b"") + frame(EXAMPLES[0])
    _, empty, good = read_all(write_damaged(tmp_path / "a", data))
    assert isinstance(empty, ImageRecord)
    assert reason_of(empty) == "missing_id"
    assert isinstance(good, ImageRecord)
    assert good.row == 1


@given(data=st.data())
def test_damage_costs_no_record_that_it_does_not_touch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = whole_file()
    start = data.draw(st.integers(0, len(content) - 1))
    stop = data.draw(st.integers(start + 1, min(len(content), start + 200)))
    content[start:stop] = data.draw(st.binary(max_size=200))
    path = tmp_path_factory.getbasetemp() / "touched.tfrecord"
    items = read_all(write_damaged(path, bytes(content)))
    found = [item for item in items if isinstance(item, ImageRecord)]
    assert [item.row for item in found] == list(range(len(found)))
    assert {IMAGES[i] for i in range(5) if stop <= frame_start(i) or frame_start(i + 1) <= start} <= {
        item.data for item in found
    }


def test_a_truncated_file_is_read_up_to_the_cut(tmp_path: Path) -> None:
    data = b"".join(map(frame, EXAMPLES))
    path = tmp_path / "a.tfrecord"
    starts = [frame_start(i) for i in range(6)]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        whole = sum(stop <= cut for stop in starts[1:])
        items = read_all(path)
        assert [r.data for r in records_of(items[:whole])] == IMAGES[:whole]
        if cut in starts:
            assert len(items) == whole
        else:
            (region,) = items[whole:]
            assert isinstance(region, UnreadableRegion)
            assert region.offset == starts[whole]
            assert f"at byte {starts[whole]}:" in region.error


@pytest.mark.parametrize("cut", [5000, 10000, 16000, 25000])
def test_a_truncated_gzip_stream_is_read_up_to_the_cut(tmp_path: Path, cut: int) -> None:
    # Random bytes do not compress: a byte of the file is about a byte of the content.
    import random

    images = [random.Random(i).randbytes(5000) for i in range(6)]
    payloads = [example(image_id=f"{i}", image__encoded=data) for i, data in enumerate(images)]
    path = write_records(tmp_path / "a.gz", payloads, compress=True)
    path.write_bytes(path.read_bytes()[:cut])
    *records, region = read_all(path)
    found = [r.data for r in records_of(records)]
    each = len(frame(payloads[0]))
    assert found == images[: (cut - 100) // each]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == len(found) * each
    assert region.error.startswith(f"The gzip stream of {path} is damaged: the file ends before ")
    assert f"nothing is read from byte {region.offset} on" in region.error


def test_a_gzip_stream_that_ends_between_records_is_one_region_too(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.gz", EXAMPLES, compress=True)
    path.write_bytes(path.read_bytes()[:-3])
    *records, region = read_all(path)
    assert [r.data for r in records_of(records)] == IMAGES
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(5)


@pytest.mark.parametrize("place", [-8, -1])
def test_a_wrong_checksum_of_a_gzip_stream_is_one_region(tmp_path: Path, place: int) -> None:
    path = write_records(tmp_path / "a.gz", EXAMPLES, compress=True)
    data = bytearray(path.read_bytes())
    data[place] ^= 1  # the checksum and length of the whole stream
    path.write_bytes(bytes(data))
    *records, region = read_all(path)
    # The records have checksums of their own, and all of them hold.
    assert [r.data for r in records_of(records)] == IMAGES
    assert isinstance(region, UnreadableRegion)
    assert region.offset == frame_start(5)
    assert "incorrect" in region.error


def test_gzip_members_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    halves = [b"".join(map(frame, part)) for part in (EXAMPLES[:2], EXAMPLES[2:])]
    path.write_bytes(gzip.compress(halves[0]) + bytes(7) + gzip.compress(halves[1]) + bytes(600))
    assert [r.data for r in records_of(read_all(path))] == IMAGES
    path.write_bytes(gzip.compress(halves[0]) + b"garbage")
    *records, region = read_all(path)
    assert [r.data for r in records_of(records)] == IMAGES[:2]
    assert isinstance(region, UnreadableRegion)
    assert region.offset == len(halves[0])


@given(st.binary(max_size=200), st.sampled_from(["auto", "none", "gzip"]))
def test_any_bytes_are_read_to_an_end(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, compression: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tfrecord"
    path.write_bytes(data)
    items = read_all(path, compression=compression)
    assert all(isinstance(item, ImageRecord | UnreadableRegion) for item in items)
    assert bool(items) == bool(data)


def test_fetch_returns_the_same_bytes(tmp_path: Path) -> None:
    plain = write_records(tmp_path / "c" / "plain", EXAMPLES)
    write_records(tmp_path / "c" / "packed", EXAMPLES, compress=True)
    data = bytearray(plain.read_bytes())
    data[frame_start(1) + HEADER_BYTES + 8] ^= 1
    (tmp_path / "c" / "broken").write_bytes(bytes(data)[: frame_start(4) + 5])
    source = source_of(tmp_path / "c" / "*")
    for shard in source.list_shards(0, "unused"):
        read = {r.row: r.data for r in source.read(shard, {}) if isinstance(r, ImageRecord)}
        good = {row: value for row, value in read.items() if value}
        assert source.fetch(shard.name, range(5)) == good
        assert source.fetch(shard.name, [3]) == {3: IMAGES[3]}
        assert source.fetch(shard.name, [2, 0]) == {0: IMAGES[0], 2: IMAGES[2]}
        assert source.fetch(shard.name, [99]) == {}
    assert source.fetch("c/broken", [1, 4]) == {}


@pytest.mark.parametrize("compress", [False, True])
def test_fetch_counts_rows_as_read_does_behind_a_gap(tmp_path: Path, compress: bool) -> None:
    data = whole_file()
    data[frame_start(1)] ^= 1
    source = source_of(write_damaged(tmp_path / "a", bytes(data), compress))
    (shard,) = source.list_shards(0, "unused")
    read = {r.row: r.data for r in source.read(shard, {}) if isinstance(r, ImageRecord)}
    assert read == dict(enumerate(IMAGES[i] for i in (0, 2, 3, 4)))
    assert source.fetch(shard.name, range(9)) == read
    assert source.fetch(shard.name, [2]) == {2: IMAGES[3]}


def test_every_file_is_one_shard_whose_token_is_its_content(tmp_path: Path) -> None:
    names = ["2/b.tfrecord", "10/a.tfrecord", "a b/ü.tfrecord"]
    for i, name in enumerate(names):
        write_records(tmp_path / "shop" / name, EXAMPLES[: i + 1])
    source = source_of(tmp_path / "shop" / "**" / "*.tfrecord")
    shards = source.list_shards(3, "unused")
    assert [s.name for s in shards] == [f"shop/{name}" for name in sorted(names)]
    assert {s.source for s in shards} == {3}
    assert len({s.token for s in shards}) == 3

    write_records(tmp_path / "shop" / names[1], EXAMPLES)
    tokens = [s.token for s in source.list_shards(3, "unused")]
    assert [a == b.token for a, b in zip(tokens, shards, strict=True)] == [False, True, True]
    write_records(tmp_path / "shop" / names[1], EXAMPLES[:2])
    assert source.list_shards(3, "unused") == shards


def test_a_missing_file_and_an_empty_glob_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"{tmp_path}/none.tfrecord does not exist, wanted image files"
    ):
        source_of(tmp_path / "none.tfrecord").list_shards(0, "unused")
    with pytest.raises(KithError, match="The catalogue is empty: no file matches") as caught:
        source_of(tmp_path / "*.tfrecord").list_shards(0, "unused")
    assert not isinstance(caught.value, ConfigError)


def test_a_shard_that_is_gone_by_now_is_an_error_not_an_empty_shard(tmp_path: Path) -> None:
    shard = ImageShard(0, "a/gone", "md5:0", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError):
        list(source_of(tmp_path / "gone").read(shard, {}))
