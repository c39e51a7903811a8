"""Pixels → the numbers a network was trained on: presets and a formula."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pwopt.errors import SpecError


@dataclass(frozen=True, slots=True)
class Preprocess:
    """uint8 RGB → what a network was trained on: (x · scale − mean) / std for each channel.

    `mean` and `std` hold one value for all channels or one for each, in the order of `order`.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: Literal["rgb", "bgr"] = "rgb"

    @classmethod
    def parse(cls, text: str) -> "Preprocess":
        """Read a preset's name, or ``scale=1/255,mean=0.5:0.4:0.3,std=0.2,order=bgr``.

        Each key may be left out. Numbers may be fractions; a colon parts the channels.

        Raises:
            SpecError: an unknown preset, key or value.
        """
        if text in PRESETS:
            return PRESETS[text]
        options: dict[str, Any] = {}
        for part in text.split(","):
            key, separator, value = part.strip().partition("=")
            if not separator or key not in ("scale", "mean", "std", "order"):
                raise SpecError(f"--preprocess {text}: unknown; {CHOICES}")
            try:
                options[key] = _value(key, value)
            except (ValueError, ZeroDivisionError):
                raise SpecError(f"--preprocess {text}: '{value}' is no {key}; {CHOICES}") from None
        return cls(**options)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Preprocess images [..., channels] in RGB or grayscale."""
        if self.order == "bgr":
            images = images[..., ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        result: npt.NDArray[np.float32] = (images * np.float32(self.scale) - mean) / std
        return result


PRESETS = {
    "raw": Preprocess(),
    "unit": Preprocess(scale=1 / 255),
    # torchvision's ImageNet weights
    "imagenet": Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # Caffe's ImageNet weights, as Keras and MXNet still ship them
    "caffe": Preprocess(mean=(103.939, 116.779, 123.68), order="bgr"),
}

CHOICES = (
    "choose raw (0..255), unit (÷ 255), imagenet (torchvision), caffe (BGR minus mean) "
    "or scale=1/255,mean=R:G:B,std=R:G:B,order=rgb"
)


def _value(key: str, text: str) -> float | str | tuple[float, ...]:
    """Read one value; a ValueError says that it is none for `key`."""
    if key == "order":
        if text not in ("rgb", "bgr"):
            raise ValueError
        return text
    numbers = tuple(_number(number) for number in text.split(":"))
    if key == "scale":
        (scale,) = numbers
        return scale
    if len(numbers) not in (1, 3) or (key == "std" and 0.0 in numbers):
        raise ValueError
    return numbers


def _number(text: str) -> float:
    """Read a number or fraction, as float32 has it."""
    numerator, slash, denominator = text.partition("/")
    value = float(numerator) / (float(denominator) if slash else 1.0)
    if not abs(value) <= float(np.finfo(np.float32).max):  # nor NaN
        raise ValueError
    return float(np.float32(value))
