"""Images that a network has not learnt by heart, made of those there are.

On the very images that it was trained on, a network says nothing of how it does on others, and
calibration images often are such. So models are judged on images that are mixed with another one:
no network that was measured had been trained on those, and what a split does to its outputs there
is what it does on unseen images. Shifted ones do not serve for that: a network that was trained on
such knows them by heart, too. To fit splits to, where nothing is judged, they do.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from pwopt.calibration.samples import LIMIT, Calibration, calibration_samples
from pwopt.data import Batch, Samples
from pwopt.data.samples import Array
from pwopt.shapes import Input

Layout = Literal["NCHW", "NHWC"]

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]

FAR = 1 / 8
"""How far images are shifted, as a part of height and width, to fit splits and to learn."""

KEPT = 0.8
"""What remains of an image that is mixed with another one."""

JUDGED_COPIES = 3
"""Mixed copies of each image that models are judged by, beside the image itself."""

CHANNELS = (1, 3, 4)
"""Gray, colour, and colour with transparency or depth."""

SMALLEST = 16
"""Pixels that the sides of an image have at least; what is smaller may be anything."""


def is_image(declared: Input) -> Layout | None:
    """Return how an input lays out images; None if it does not look as if it took any.

    Images are floating-point, of four axes, with 1, 3 or 4 channels, and at least 16 pixels high
    and wide, as far as the input fixes that.
    """
    if declared.dtype.kind != "f" or len(declared.shape) != 4:
        return None
    _, *rest = declared.shape
    if rest[0] in CHANNELS and all(map(_is_side, rest[1:])):
        return "NCHW"
    if rest[2] in CHANNELS and all(map(_is_side, rest[:2])):
        return "NHWC"
    return None


def _is_side(size: int | str | None) -> bool:
    return not isinstance(size, int) or size >= SMALLEST


@dataclass(frozen=True, slots=True)
class Prepared:
    """Batches of calibration samples, by what they serve for.

    Attributes:
        fit: To fit splits to: images as they are, and one shifted copy of each.
        tried: Held out, to try single splits on: mixed copies.
        judged: Held out, to judge models by: the samples as they are, then groups of the same
            ones in the same order, each mixed with others.

    Samples without images are as they are everywhere, and `judged` is one group.
    """

    fit: list[Batch]
    tried: list[Batch]
    judged: list[list[Batch]]


def to_fit(chosen: Calibration, seed: int = 0) -> list[Batch]:
    """Return what splits are fitted to: images as they are, and one shifted copy of each."""
    return [*chosen.fit, *shifted(chosen.fit, seed=seed, reach=FAR)]


def prepare(source: Samples, limit: int = LIMIT, *, seed: int = 0) -> Prepared:
    """Choose samples, and shift or mix the images among them; `seed` is that of the shifts.

    Raises:
        DataError: too few samples, or some that do not fit the model.
    """
    chosen = calibration_samples(source, limit)
    held_out = chosen.held_out
    copies = [mixed(held_out, turn=turn) for turn in range(JUDGED_COPIES)]
    return Prepared(
        fit=to_fit(chosen, seed),
        tried=mixed(held_out, turn=JUDGED_COPIES) or held_out,
        judged=[held_out, *filter(None, copies)],
    )


def mixed(batches: Sequence[Batch], *, turn: int) -> list[Batch]:
    """Copy batches with the image of each sample mixed with that of another one.

    The other is the one `turn` + 1 samples further on among those of the same size, which begin
    again after the last; the only one of its size stays as it is. Of the image itself `KEPT`
    remains. All that is no image is what it was, and so are labels and the rows that only fill up
    a batch. Several images of one sample are mixed alike.

    Returns:
        The copies alone, batch by batch; none of batches without images. They take the memory of
        the batches' images once more.
    """
    samples: dict[_Shapes, list[tuple[Batch, int]]] = defaultdict(list)
    for batch in batches:
        samples[_shapes(batch)] += [(batch, row) for row in range(batch.samples)]
    others = {}
    for shapes, alike in samples.items():
        step = 1 + turn % max(len(alike) - 1, 1)
        others[shapes] = iter(alike[step:] + alike[:step])
    return [
        _mixed(batch, islice(others[shapes], batch.samples))
        for batch in batches
        if (shapes := _shapes(batch))
    ]


def _shapes(batch: Batch) -> _Shapes:
    """Return the shape of each of a sample's images."""
    return tuple((name, batch.feeds[name].shape[1:]) for name in layouts(batch))


def _mixed(batch: Batch, others: Iterable[tuple[Batch, int]]) -> Batch:
    images = {name: batch.feeds[name].copy() for name in layouts(batch)}
    for row, (other, its_row) in enumerate(others):
        for name, result in images.items():
            result[row] = KEPT * result[row] + (1 - KEPT) * other.feeds[name][its_row]
    return replace(batch, feeds=batch.feeds | images)


def shifted(batches: Sequence[Batch], *, seed: int, reach: float) -> list[Batch]:
    """Copy batches with the image of each sample shifted, and about every other one mirrored.

    All that is no image is what it was, and so are labels and the rows that only fill up a batch.
    Several images of one sample are moved alike. The copy takes the memory of the batches' images
    once more: 154 MB for 256 images of 224×224 pixels.

    Args:
        batches: Batches as they are fed, so that zeros are black or the mean colour.
        seed: Of the shifts; the same seed gives the same copies.
        reach: Up to what part of height and width images are shifted, to all sides.

    Returns:
        The copies alone, batch by batch; none of batches without images.
    """
    rng = np.random.default_rng(seed)
    return [_shifted(batch, rng, reach) for batch in batches if layouts(batch)]


def layouts(batch: Batch) -> dict[str, Layout]:
    """Find the feeds that hold an image for each row, and how it is laid out."""
    fed = {name: is_image(Input(name, a.dtype, a.shape)) for name, a in batch.feeds.items()}
    return {n: how for n, how in fed.items() if how and len(batch.feeds[n]) >= batch.samples}


def _shifted(batch: Batch, rng: np.random.Generator, reach: float) -> Batch:
    draws = rng.random((batch.samples, 3))
    images = {n: _moved(batch.feeds[n], how, draws, reach) for n, how in layouts(batch).items()}
    return replace(batch, feeds=batch.feeds | images)


def _moved(images: Array, layout: Layout, draws: npt.NDArray[np.float64], reach: float) -> Array:
    """Move images by `draws` (samples, 3): upwards, to the left, and if mirrored."""
    result = images.copy()
    samples = np.moveaxis(result, layout.index("C"), 1)[: len(draws)]
    up, left, mirror = draws.T
    samples[:] = moved(samples, up, left, mirror, reach)
    return result


def moved(
    images: Array,
    up: npt.NDArray[np.float64],
    left: npt.NDArray[np.float64],
    mirror: npt.NDArray[np.float64],
    reach: float,
) -> Array:
    """Copy images [n, C, H, W], shifted and mirrored by draws from 0 to 1, one for each image.

    Shifts are up to `reach` of height and width, from all the way down (right) to all up (left),
    with zeros coming in. Draws of `mirror` below one half mirror.
    """
    height, width = images.shape[2:]
    y, x = int(reach * height), int(reach * width)
    padded = np.pad(images, ((0, 0), (0, 0), (y, y), (x, x)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    rows, columns = (up * (2 * y + 1)).astype(int), (left * (2 * x + 1)).astype(int)
    result: Array = windows[np.arange(len(images)), :, rows, columns]
    mirrored = mirror < 0.5
    result[mirrored] = result[mirrored, ..., ::-1]
    return result
