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
