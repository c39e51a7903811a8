"""8-bit images → what an input takes: size, gray or colour, preprocessing, layout, type."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.data.preprocess import CHOICES, Preprocess
from pwopt.data.samples import Array, fits
from pwopt.errors import DataError, SpecError
from pwopt.shapes import Input

Pixels = npt.NDArray[np.uint8]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Gray from RGB (ITU-R BT.601), as Pillow does it."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An input that takes images: [N, C, H, W] or [N, H, W, C] with 1 or 3 channels."""

    declared: Input
    preprocess: Preprocess

    @property
    def channels_last(self) -> bool:
        """Whether the layout is [N, H, W, C]."""
        return self.declared.shape[1] not in (1, 3)

    @property
    def channels(self) -> int:
        """1 or 3."""
        channels = self.declared.shape[3 if self.channels_last else 1]
        assert isinstance(channels, int)
        return channels

    @property
    def size(self) -> tuple[int | str | None, int | str | None]:
        """Height and width; a symbol or None where the model leaves them open."""
        _, *rest = self.declared.shape
        height, width = rest[:2] if self.channels_last else rest[1:]
        return height, width

    @property
    def expects(self) -> str:
        """The shape of 8-bit images that fit."""
        height, width = (
            side if isinstance(side, int) else name
            for side, name in zip(self.size, "HW", strict=True)
        )
        return f"[N, {height}, {width}, 3 or 1]"

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether 8-bit images of this shape fit; grayscale may leave out the last axis."""
        sides = ("N", *self.size)
        return any(fits(shape, expected) for expected in (sides, (*sides, 1), (*sides, 3)))

    def feed(self, images: Pixels) -> Array:
        """Turn uint8 [n, H, W(, 1 | 3)] into the input's layout, channels and type."""
        pixels = images if images.ndim == 4 else images[..., None]
        if pixels.shape[3] < self.channels:
            pixels = pixels.repeat(self.channels, axis=3)
        elif pixels.shape[3] > self.channels:
            luma = pixels @ LUMA
            pixels = luma.round().astype(np.uint8)[..., None]
        values: Array = pixels
        if self.declared.dtype != np.uint8:
            with np.errstate(over="ignore", invalid="ignore"):  # Samples tells of infinities
                values = self.preprocess(pixels).astype(self.declared.dtype)
        if not self.channels_last:
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values)


def image_input(declared: Input, preprocess: str | None, source: str) -> ImageInput | None:
    """Tell how an input takes images; None for an input that does not.

    Raises:
        SpecError: no preprocessing was named, or one that does not go with the input.
    """
    shape = declared.shape
    if len(shape) != 4 or not (shape[1] in (1, 3) or shape[3] in (1, 3)):
        return None
    if declared.dtype.kind != "f":
        if preprocess not in (None, "raw"):
            raise SpecError(f"--preprocess {preprocess}: input '{declared.name}' takes raw pixels")
        preprocess = "raw"
    if preprocess is None:
        raise SpecError(f"{source}: holds 8-bit images; add --preprocess: {CHOICES}")
    image = ImageInput(declared, Preprocess.parse(preprocess))
    if max(len(image.preprocess.mean), len(image.preprocess.std)) > image.channels:
        raise SpecError(
            f"--preprocess {preprocess}: has three channels, input '{declared.name}' one"
        )
    return image


def pillow() -> Any:
    """Import Pillow, which only folders of images need.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise DataError(
            "reading images needs Pillow, which is not installed: pip install 'pwopt[images]'"
        ) from None


def read_image(path: Path, size: tuple[int, int], channels: int) -> Pixels:
    """Decode to uint8 [height, width, channels].

    An image of another `size` (height, width) is resized (bilinear) until its shorter side fits,
    then cropped at the centre.

    Raises:
        DataError: the file is no image.
    """
    image_module = pillow()
    height, width = size
    try:
        with image_module.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image; remove or replace it") from error
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        image = image.resize(resized, image_module.Resampling.BILINEAR)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
