"""Resizing decoded images to the one shape that the encoder takes."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Resize = Literal["crop", "stretch", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "area"]

# Part of the fingerprint; raised when the pixels that `apply` returns change.
RULES_VERSION = 1
WHITE = (255, 255, 255)

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes the encoder's input: Pillow's resize, on 8-bit RGB.

    `input_size` is (height, width). `crop` keeps the centre that has the input's proportions,
    `stretch` ignores proportions (what `keras.utils.load_img(target_size=...)` does; with
    `nearest` the pixels are equal to its), `pad` fits the whole image on white.
    Normalisation is not here: it belongs to the encoder.
    """

    input_size: tuple[int, int]
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ValueError(
                f"input_size is {self.input_size!r} but must be (height, width), both at least 1."
            )
        if self.resize not in get_args(Resize):
            raise ValueError(
                f"resize is {self.resize!r} but must be one of {', '.join(get_args(Resize))}."
            )
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation is {self.interpolation!r} but must be one of "
                f"{', '.join(get_args(Interpolation))}."
            )

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to which an image may be reduced beforehand; never larger than it.

        What is left covers the encoder's input pixel for pixel. `nearest` picks single pixels of the
        whole image, so it needs all of them.
        """
        wanted_height, wanted_width = self.input_size
        if self.interpolation == "nearest":
            return width, height
        if self.resize == "stretch":
            return min(wanted_width, width), min(wanted_height, height)
        by_width = wanted_width * height >= wanted_height * width  # The larger scale of the two.
        if by_width == (self.resize == "crop"):
            wanted_height = -(-wanted_width * height // width)
        else:
            wanted_width = -(-wanted_height * width // height)
        return min(wanted_width, width), min(wanted_height, height)

    def apply(
        self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Resizes one image, uint8 [h, w, 3], to uint8 [height, width, 3].

        `full_size` is the (width, height) of the image before it was reduced, when it was: the
        same part of it is taken as of the whole.
        """
        height, width = self.input_size
        image = Image.fromarray(pixels)
        full = full_size or image.size
        resample = _RESAMPLING[self.interpolation]
        if self.resize == "crop":
            left, top, right, bottom = centre_box(full, (width, height))
            across, down = image.width / full[0], image.height / full[1]
            box = (
                left * across,
                top * down,
                min(right * across, image.width),
                min(bottom * down, image.height),
            )
            resized = image.resize((width, height), resample, box=box)
        elif self.resize == "stretch":
            resized = image.resize((width, height), resample)
        else:
            resized = _pad(image, full, (width, height), resample)
        return np.array(resized)

    def fingerprint(self) -> dict[str, object]:
        """What decides whether two images prepared apart are comparable; JSON-able."""
        return {
            "input_size": list(self.input_size),
            "resize": self.resize,
            "interpolation": self.interpolation,
            "rules": RULES_VERSION,
        }


def centre_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box of an image that has the proportions of `target`.

    Sizes are (width, height); the box is (left, top, right, bottom) in fractional pixels.
    Cropping before scaling keeps a 1 x 10,000 image from growing to 224 x 2,240,000 on the way.
    """
    width, height = size
    scale = max(target[0] / width, target[1] / height)
    box_width = min(target[0] / scale, width)
    box_height = min(target[1] / scale, height)
    left = (width - box_width) / 2
    top = (height - box_height) / 2
    return left, top, min(left + box_width, width), min(top + box_height, height)


def _pad(
    image: Image.Image, full: tuple[int, int], target: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    scale = min(target[0] / full[0], target[1] / full[1])
    width = min(max(round(full[0] * scale), 1), target[0])
    height = min(max(round(full[1] * scale), 1), target[1])
    canvas = Image.new("RGB", target, WHITE)
    offset = ((target[0] - width) // 2, (target[1] - height) // 2)
    canvas.paste(image.resize((width, height), resample), offset)
    return canvas
