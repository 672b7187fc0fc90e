"""DICOM against pydicom: its own test files, and files of every pixel rule written here."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from index_builder.errors import ImageError
from tests.unit import images_for_tests as make
from transforms.decoding import DecodePolicy, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FILES = Path(pydicom.__file__).parent / "data" / "test_files"

# Files with pixels that are failures here, and why.
REFUSED = {
    "GDCMJ2K_TextGBR.dcm": "corrupt",  # OpenJPEG finds its code stream broken, as pydicom does.
    "JPEG2000-embedded-sequence-delimiter.dcm": "corrupt",  # Made so that its stated size is absurd.
    "MR_truncated.dcm": "truncated",
}
# Files that pydicom alone cannot decode: JPEG-LS, lossless and 12-bit JPEG, a bad frame number.
WITHOUT_SECOND_OPINION = {
    "JPEG-lossy.dcm",
    "JPEGLSNearLossless_08.dcm",
    "JPEGLSNearLossless_16.dcm",
    "JPGExtended.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jls_lossy_line.dcm",
    "SC_rgb_jls_lossy_sample.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "badVR.dcm",
}


def files_with_pixels() -> Iterator[Path]:
    for path in sorted(path for path in FILES.rglob("*") if path.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
        if "Rows" in dataset and "PixelData" in dataset and path.read_bytes()[128:132] == b"DICM":
            yield path


def by_pydicom(dataset: Dataset, frame: int = 0) -> NDArray[np.float64]:
    """What the stated rules make of pydicom's pixels, [h, w, 3] from 0 to 255, not rounded."""
    stored = dataset.pixel_array
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        stored = stored[frame]
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        shown = apply_color_lut(stored, dataset)
        return shown / float(2 ** (8 * shown.itemsize) - 1) * 255
    if dataset.SamplesPerPixel == 3:
        return stored / float(2**dataset.BitsAllocated - 1) * 255
    values = apply_modality_lut(stored, dataset).astype(float)
    if "WindowCenter" in dataset:
        low, high = stated_range(dataset)
        shown = (apply_voi_lut(apply_modality_lut(stored, dataset), dataset) - low) / (high - low)
    elif dataset.BitsStored == 8 and not dataset.PixelRepresentation:
        shown = stored / 255.0
    else:
        shown = (values - values.min()) / (values.max() - values.min() or 1.0)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return np.repeat(shown[..., None] * 255, 3, axis=2)


def stated_range(dataset: Dataset) -> tuple[float, float]:
    """The range that pydicom's windows map to: that of the stored values, rescaled."""
    bits = dataset.BitsStored
    ends = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    )
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return ends[0] * slope + intercept, ends[1] * slope + intercept


@pytest.mark.parametrize("path", list(files_with_pixels()), ids=lambda path: path.name)
def test_files_of_pydicom(path: Path) -> None:
    data = path.read_bytes()
    if path.name in REFUSED:
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        assert caught.value.reason == REFUSED[path.name]
        return
    pixels = decode_image(data).pixels
    if path.name in WITHOUT_SECOND_OPINION:
        assert pixels.max() > pixels.min()
        return
    wanted = by_pydicom(pydicom.dcmread(path))
    assert pixels.shape == wanted.shape
    # Half a step of rounding; one where colours are converted or a palette has 16 bits.
    assert float(np.abs(pixels - wanted).max()) <= 1.0


def test_every_exception_is_a_file() -> None:
    names = {path.name for path in files_with_pixels()}
    assert names >= WITHOUT_SECOND_OPINION | set(REFUSED)
    assert len(names) > 60


def dataset_of(
    frames: NDArray[Any], *, bits: int | None = None, photometric: str = "", **tags: Any
) -> Dataset:
    """A dataset of [frames, h, w] or [frames, h, w, 3] stored values."""
    dataset = Dataset()
    dataset.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    dataset.PhotometricInterpretation = photometric or ("RGB" if frames.ndim == 4 else "MONOCHROME2")
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    if frames.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = frames.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    dataset.PixelData = frames.astype(frames.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def written(dataset: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    buffer = io.BytesIO()
    implicit = syntax == ImplicitVRLittleEndian
    little = syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(
        buffer, dataset, implicit_vr=implicit, little_endian=little, enforce_file_format=True
    )
    return buffer.getvalue()


def assert_as_pydicom(dataset: Dataset, most: float = 0.51) -> NDArray[np.uint8]:
    data = written(dataset)
    pixels = decode_image(data).pixels
    assert float(np.abs(pixels - by_pydicom(pydicom.dcmread(io.BytesIO(data)))).max()) <= most
    return pixels


RNG = np.random.default_rng(7)
DEEP = RNG.integers(0, 4096, (1, 13, 17)).astype(np.uint16)
SIGNED = (DEEP.astype(np.int32) - 2048).astype(np.int16)
COLOUR = make.picture()[None]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("frames", [DEEP, SIGNED, (DEEP >> 4).astype(np.uint8), SIGNED.astype(np.int8)])
@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"RescaleSlope": 2, "RescaleIntercept": -1024},
        {"RescaleSlope": 0.5, "RescaleIntercept": 10, "WindowCenter": 40, "WindowWidth": 400},
        {"WindowCenter": [100, 5], "WindowWidth": [300, 6]},
        {"WindowCenter": 100.5, "WindowWidth": 300, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 20, "WindowWidth": 300, "VOILUTFunction": "SIGMOID"},
    ],
)
def test_grey(frames: NDArray[Any], photometric: str, tags: dict[str, Any]) -> None:
    bits = 12 if frames.itemsize == 2 else 8
    assert_as_pydicom(dataset_of(frames, bits=bits, photometric=photometric, **tags))


def test_window_by_hand() -> None:
    stored = np.array([[[0, 50, 100, 101, 150, 200, 4000]]], np.uint16)
    data = written(dataset_of(stored, bits=12, WindowCenter=100, WindowWidth=101))
    # From 49.5 to 149.5: (value - 99.5) / 100 + 0.5, in steps of 255.
    np.testing.assert_array_equal(decode_image(data).pixels[0, :, 0], [0, 1, 129, 131, 255, 255, 255])
    step = written(dataset_of(stored, bits=12, WindowCenter=100, WindowWidth=1))
    np.testing.assert_array_equal(decode_image(step).pixels[0, :, 0], [0, 0, 255, 255, 255, 255, 255])


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 100, "WindowWidth": 0},
        {"WindowCenter": 100},
        {"RescaleSlope": 0, "RescaleIntercept": 5},
    ],
)
def test_unusable_window_and_slope_count_as_none(tags: dict[str, Any]) -> None:
    plain = decode_image(written(dataset_of(DEEP, bits=12))).pixels
    np.testing.assert_array_equal(
        decode_image(written(dataset_of(DEEP, bits=12, **tags))).pixels, plain
    )
    assert (plain.min(), plain.max()) == (0, 255)


def test_negative_slope_turns_the_order_of_values() -> None:
    pixels = decode_image(written(dataset_of(DEEP, bits=12, RescaleSlope=-1))).pixels
    plain = decode_image(written(dataset_of(DEEP, bits=12))).pixels.astype(int)
    np.testing.assert_allclose(pixels, 255 - plain, atol=1)


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_transfer_syntaxes_give_the_same_pixels(syntax: UID) -> None:
    for frames, tags in ((SIGNED, {"WindowCenter": 7, "WindowWidth": 900}), (COLOUR, {})):
        wanted = decode_image(written(dataset_of(frames, **tags))).pixels
        dataset = dataset_of(frames, **tags)
        if syntax == RLELossless:
            written(dataset)
            dataset.compress(RLELossless)
        np.testing.assert_array_equal(decode_image(written(dataset, syntax)).pixels, wanted)


def test_big_endian_words_and_bytes() -> None:
    deep = dataset_of(DEEP, bits=12)
    wanted = decode_image(written(deep)).pixels
    deep.PixelData = DEEP.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(written(deep, ExplicitVRBigEndian)).pixels, wanted)
    bytes_in_words = dataset_of(COLOUR)
    bytes_in_words.PixelData = np.frombuffer(COLOUR.tobytes(), "<u2").astype(">u2").tobytes()
    bytes_in_words["PixelData"].VR = "OW"
    data = written(bytes_in_words, ExplicitVRBigEndian)
    np.testing.assert_array_equal(decode_image(data).pixels, COLOUR[0])


FRAMES = [
    RNG.integers(0, 256, (5, 6, 7)).astype(np.uint8),
    RNG.integers(0, 65536, (4, 5, 3)).astype(np.uint16),
    RNG.integers(0, 256, (3, 5, 7, 3)).astype(np.uint8),
]


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("chosen", ["first", "middle"])
def test_one_frame_of_several(frames: NDArray[Any], chosen: str) -> None:
    data = written(dataset_of(frames))
    policy = DecodePolicy(dicom_frame=chosen, max_pixels=frames[0].size)
    index = 0 if chosen == "first" else len(frames) // 2
    wanted = decode_image(written(dataset_of(frames[index : index + 1]))).pixels
    np.testing.assert_array_equal(decode_image(data, policy).pixels, wanted)


def test_frames_of_single_bits_need_not_begin_at_bytes() -> None:
    bits = RNG.integers(0, 2, (3, 5, 7)).astype(np.uint8)
    dataset = dataset_of(bits)
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = 0
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    for chosen, index in (("first", 0), ("middle", 1)):
        pixels = decode_image(written(dataset), DecodePolicy(dicom_frame=chosen)).pixels
        np.testing.assert_array_equal(pixels[..., 0], bits[index] * 255)


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("offset_table", [True, False])
def test_compressed_frames_in_several_fragments(fragments: int, offset_table: bool) -> None:
    greys = [make.picture(seed=seed)[..., 0] for seed in range(3)]
    jpegs = [make.encode(Image.fromarray(grey), "JPEG", quality=95) for grey in greys]
    dataset = dataset_of(np.stack(greys))
    dataset.PixelData = encapsulate(jpegs, fragments_per_frame=fragments, has_bot=offset_table)
    dataset["PixelData"].is_undefined_length = True
    data = written(dataset, JPEGBaseline8Bit)
    for chosen, index in (("first", 0), ("middle", 1)):
        pixels = decode_image(data, DecodePolicy(dicom_frame=chosen)).pixels
        assert np.abs(pixels[..., 0].astype(int) - greys[index]).max() <= 8


def test_jpeg2000_that_tensorflow_io_does_not_read() -> None:
    """Reversible colour in a JP2 wrapper: Pillow takes over."""
    dataset = dataset_of(COLOUR, photometric="YBR_RCT")
    dataset.PixelData = encapsulate([make.encode(COLOUR[0], "JPEG2000", mct=1)])
    dataset["PixelData"].is_undefined_length = True
    np.testing.assert_array_equal(decode_image(written(dataset, JPEG2000Lossless)).pixels, COLOUR[0])


def test_planes_and_ybr() -> None:
    planes = dataset_of(COLOUR)
    planes.PlanarConfiguration = 1
    planes.PixelData = np.moveaxis(COLOUR[0], 2, 0).tobytes()
    np.testing.assert_array_equal(decode_image(written(planes)).pixels, COLOUR[0])
    ybr = np.asarray(Image.fromarray(COLOUR[0]).convert("YCbCr"))
    pixels = decode_image(written(dataset_of(ybr[None], photometric="YBR_FULL"))).pixels
    assert np.abs(pixels.astype(int) - COLOUR[0]).max() <= 3


def with_palette(dataset: Dataset, tables: NDArray[Any], first: int, bits: int) -> Dataset:
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [table.size, first, bits])
        content = table.astype("<u2" if bits == 16 else np.uint8).tobytes()
        setattr(dataset, f"{name}PaletteColorLookupTableData", content)
    return dataset


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("first", [0, 3])
def test_palette(bits: int, first: int) -> None:
    tables = RNG.integers(0, 2**bits, (3, 200))
    stored = RNG.integers(0, 256, (1, 9, 11)).astype(np.uint8)
    pixels = assert_as_pydicom(with_palette(dataset_of(stored), tables, first, bits), most=1.0)
    entries = np.clip(stored[0].astype(int) - first, 0, 199)
    np.testing.assert_array_equal(pixels, np.moveaxis(tables[:, entries] >> (bits - 8), 0, 2))


def test_segmented_palette() -> None:
    dataset = dataset_of(np.arange(0, 12, dtype=np.uint8).reshape(1, 3, 4))
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    # Two entries as they are, then ten in a line to 52000.
    segments = np.array([0, 2, 1000, 2000, 1, 10, 52000], "<u2").tobytes()
    for name in ("Red", "Green", "Blue"):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [12, 0, 16])
        setattr(dataset, f"Segmented{name}PaletteColorLookupTableData", segments)
    assert_as_pydicom(dataset, most=1.0)


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (dataset_of(DEEP, BitsAllocated=64, BitsStored=64), "unsupported_format"),
        (dataset_of(DEEP, SamplesPerPixel=4), "unsupported_format"),
        (dataset_of(DEEP, Rows=0), "corrupt"),
        (dataset_of(DEEP, NumberOfFrames=3), None),
        (dataset_of(DEEP, Columns=18), "truncated"),
        (dataset_of(DEEP, photometric="PALETTE COLOR"), "corrupt"),
        (dataset_of(DEEP, Rows=60_000, Columns=60_000), "too_large"),
    ],
)
def test_headers_that_do_not_fit(dataset: Dataset, reason: str | None) -> None:
    data = written(dataset)
    if reason is None:  # The first frame is whole.
        assert decode_image(data).pixels.shape == (13, 17, 3)
        with pytest.raises(ImageError, match="fewer than"):
            decode_image(data, DecodePolicy(dicom_frame="middle"))
        return
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


def test_floating_point_pixels_are_refused() -> None:
    dataset = dataset_of(DEEP, BitsAllocated=32, BitsStored=32)
    del dataset.PixelData
    dataset.FloatPixelData = DEEP.astype(np.float32).tobytes()
    with pytest.raises(ImageError) as caught:
        decode_image(written(dataset))
    assert caught.value.reason == "unsupported_format"


def test_pixels_that_tensorflow_io_returns_empty_are_a_failure() -> None:
    dataset = dataset_of(COLOUR)
    dataset.PixelData = encapsulate([b"\0\0\1\xb3" + bytes(400)])
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(ImageError, match="no picture in it") as caught:
        decode_image(written(dataset, MPEG2MPML))
    assert caught.value.reason == "corrupt"


MARKER = "Zyxwvut^Qponmlk"


def marked_files() -> Iterator[tuple[str, bytes]]:
    """Files whose tags hold the marker, whole and damaged in ways that end in different errors."""
    dataset = dataset_of(DEEP, bits=12)
    dataset.PatientName = dataset.PatientID = dataset.StudyDescription = MARKER
    dataset.PatientComments = MARKER * 200
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        yield f"whole {syntax.name}", written(dataset, syntax)
    whole = written(dataset)
    name = whole.index(MARKER.encode())
    for cut in (name + 4, name + 60, len(whole) - 9):
        yield f"cut at {cut}", whole[:cut]
    for offset in range(name - 8, name + 1):  # Type and length: what follows is read as elements.
        for value in (b"\xff", b"\0", b"Z"):
            yield f"{value!r} at {offset}", whole[:offset] + value + whole[offset + 1 :]
    for keyword, value in (
        ("PhotometricInterpretation", MARKER),
        ("NumberOfFrames", "1"),
        ("Rows", 9999),
        ("SamplesPerPixel", 3),
        ("BitsStored", 99),
    ):
        broken = dataset_of(DEEP, bits=12)
        broken.PatientName = MARKER
        setattr(broken, keyword, value)
        yield keyword, written(broken)
    yield "another syntax", misnamed(whole)


def misnamed(data: bytes) -> bytes:
    """A file that says its plain pixels are a compressed stream."""
    return data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1)


def test_no_tag_reaches_errors_or_pixels() -> None:
    refused = 0
    for what, data in marked_files():
        try:
            image = decode_image(data)
        except ImageError as error:
            refused += 1
            chain: BaseException | None = error
            while chain is not None:
                for part in (MARKER, MARKER[:3], MARKER[-3:]):
                    assert part not in f"{chain} {chain.args!r}", what
                chain = chain.__cause__
        else:
            assert vars(image).keys() == {"pixels", "width", "height", "format"}, what
            assert MARKER.encode()[:6] not in image.pixels.tobytes(), what
    assert refused > 10
