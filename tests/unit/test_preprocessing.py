"""Resizing: the three policies, equality with Keras, and extreme proportions."""

import numpy as np
import pytest
from PIL import Image

from tests.unit import images_for_tests as make
from transforms.preprocessing import Preprocessing


def test_stretch_nearest_is_what_load_img_does(tmp_path) -> None:
    import keras

    path = tmp_path / "picture.png"
    path.write_bytes(make.encode(make.picture(73, 41), "PNG"))
    for size in ((224, 224), (17, 90)):
        wanted = keras.utils.img_to_array(keras.utils.load_img(path, target_size=size))
        got = Preprocessing(size, "stretch", "nearest").apply(make.picture(73, 41))
        np.testing.assert_array_equal(got, wanted)


def test_crop_keeps_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert (Preprocessing((10, 10), "crop", "nearest").apply(pixels) == 255).all()


def test_pad_keeps_everything_on_white() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    padded = Preprocessing((30, 30), "pad").apply(pixels)
    assert (padded[10:20] == 0).all()
    assert (padded[:10] == 255).all()
    assert (padded[20:] == 255).all()


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "area"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (224, 224), (3, 500)])
def test_every_shape_fits(resize, interpolation, shape) -> None:
    pixels = np.full((*shape, 3), 77, np.uint8)
    result = Preprocessing((224, 200), resize, interpolation).apply(pixels)
    assert result.shape == (224, 200, 3)
    assert result.dtype == np.uint8
    assert (result == 77).any()


def test_default_is_a_bicubic_centre_crop() -> None:
    pixels = make.picture(50, 50)
    wanted = np.array(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Preprocessing((224, 224)).apply(pixels), wanted)


def test_wrong_settings_are_refused() -> None:
    for arguments in (((0, 5),), ((5, 5), "zoom"), ((5, 5), "crop", "best")):
        with pytest.raises(ValueError, match="must be"):
            Preprocessing(*arguments)


def test_fingerprint_tells_settings_apart() -> None:
    settings = [
        Preprocessing((224, 224)),
        Preprocessing((224, 225)),
        Preprocessing((224, 224), "pad"),
        Preprocessing((224, 224), "crop", "area"),
    ]
    assert len({str(p.fingerprint()) for p in settings}) == len(settings)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("input_size", [(224, 224), (32, 48), (48, 32), (1, 1)])
@pytest.mark.parametrize(
    "size", [(800, 600), (600, 800), (801, 603), (1, 10_000), (10_000, 1), (224, 224), (100, 3000)]
)
def test_what_is_needed_covers_the_input(resize, input_size, size) -> None:
    height, width = input_size
    needed = Preprocessing(input_size, resize).needed_size(*size)
    assert 1 <= needed[0] <= size[0]
    assert 1 <= needed[1] <= size[1]
    # The scale at which the input shows the whole image: 1 when nothing may be left out.
    scales = (width / size[0], height / size[1])
    scale = {"crop": max(scales), "pad": min(scales), "stretch": None}[resize]
    for side, got, own in zip(size, needed, scales, strict=True):
        wanted = min((own if scale is None else scale) * side, side)
        assert wanted - 1e-6 <= got < max(wanted, 1) + 1


def test_nearest_needs_every_pixel() -> None:
    assert Preprocessing((8, 8), "stretch", "nearest").needed_size(900, 700) == (900, 700)
    assert Preprocessing((8, 8), "stretch", "area").needed_size(900, 700) == (8, 8)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(801, 600), (1203, 407), (333, 1001)])
def test_a_reduced_image_shows_the_same_part(resize, size) -> None:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x * 255 // width, y * 255 // height, x * 0], axis=2).astype(np.uint8)
    preprocessing = Preprocessing((64, 80), resize)
    for eighths in (2, 3, 4, 7):
        reduced = (-(-width * eighths // 8), -(-height * eighths // 8))
        small = np.asarray(Image.fromarray(ramp).resize(reduced, Image.Resampling.BOX))
        got = preprocessing.apply(small, size).astype(int)
        difference = np.abs(got - preprocessing.apply(ramp))
        assert np.median(difference) <= 1
        # Where the picture ends and the white begins, a pixel may be mixed otherwise.
        assert (difference > 4).mean() < 0.03


def test_pad_measures_the_whole_image() -> None:
    """101 x 300 becomes 50 pixels wide, but 51 x 150, its half, would by itself become 51."""
    full, half = np.zeros((300, 101, 3), np.uint8), np.zeros((150, 51, 3), np.uint8)
    preprocessing = Preprocessing((149, 149), "pad")

    def columns(pixels: np.ndarray) -> int:
        return int((pixels == 0).all(axis=(0, 2)).sum())

    assert columns(preprocessing.apply(full)) == 50
    assert columns(preprocessing.apply(half)) == 51
    assert columns(preprocessing.apply(half, (101, 300))) == 50
