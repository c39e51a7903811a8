"""Images a little shifted and mirrored, which a network has not learnt by heart.

On the very images that it was trained on, a network says nothing of how it does on others.
Calibration images often are such: a VGG-16 for CIFAR-10 gets 100 % of 2,000 of them right, but
92.2 % of unseen ones. It gets 93.2 % right of the former once they are shifted and mirrored, as
long as what they leave is filled with zeros: with the edge repeated it is 96.2 %, with the image
reflected 97.3 %. A network that was trained on images shifted like that knows them, too: a
ResNet-56 gets all of them right, against 93.0 % of unseen ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pwopt import runtime
from pwopt.calibration.samples import LIMIT, Calibration, calibration_samples, fed_rows
from pwopt.comparing import class_scores, probabilities
from pwopt.data import Batch, Samples
from pwopt.data.samples import Array
from pwopt.model import Model
from pwopt.shapes import Input, inputs

Layout = Literal["NCHW", "NHWC"]

FAR = 1 / 8
"""How far images are shifted, as a part of height and width, to fit splits and to try them."""

NEAR = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""How far they are shifted to judge models: no further than `unsure_reach` says."""

SURE = 0.995
"""A network that gives its first class this probability on average knows the images by heart."""

JUDGED_COPIES = 3
"""Shifted copies of each image that models are judged by, beside the image itself."""

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
        tried: Held out, to try single splits on: shifted copies.
        judged: Held out, to judge models by: the samples as they are, then groups of the same
            ones in the same order, each with other shifts.

    Samples without images are as they are everywhere, and `judged` is one group.
    """

    fit: list[Batch]
    tried: list[Batch]
    judged: list[list[Batch]]


def to_fit(chosen: Calibration, seed: int = 0) -> list[Batch]:
    """Return what splits are fitted to: images as they are, and one shifted copy of each."""
    return [*chosen.fit, *shifted(chosen.fit, seed=seed, reach=FAR)]


def prepare(
    model: Model, source: Samples, limit: int = LIMIT, *, threads: int = 1, seed: int = 0
) -> Prepared:
    """Choose samples, and shift the images among them.

    Raises:
        DataError: too few samples, or some that do not fit the model.
        ModelError: onnxruntime cannot run the model.
    """
    chosen = calibration_samples(source, limit)
    held_out = chosen.held_out
    reach = unsure_reach(model, held_out, threads=threads)
    copies = [
        shifted(held_out, seed=seed + 2 + number, reach=reach) for number in range(JUDGED_COPIES)
    ]
    return Prepared(
        fit=to_fit(chosen, seed),
        tried=shifted(held_out, seed=seed + 1, reach=FAR) or held_out,
        judged=[held_out, *filter(None, copies)],
    )


def unsure_reach(
    model: Model, batches: Sequence[Batch], *, threads: int = 1, seed: int = 0
) -> float:
    """Find how far images must be shifted for a network not to know them by heart.

    That is the least of `NEAR` at which its first class has a probability below `SURE` on average.
    Where there are no images or no classes, nothing tells, and the least is returned.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    session, declared = runtime.session(model, threads=threads), inputs(model)
    for reach in NEAR:
        confidences = []
        for batch in shifted(batches, seed=seed, reach=reach):
            outputs = runtime.run(session, batch.feeds, name=model.name)
            scores = class_scores(outputs, fed_rows(declared, batch))
            if scores is None:
                return NEAR[0]
            confidences.append(probabilities(outputs[scores])[: batch.samples].max(axis=1))
        if not confidences or np.concatenate(confidences).mean() < SURE:
            return reach
    return NEAR[-1]


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
    with_images = [(batch, layouts) for batch in batches if (layouts := _layouts(batch))]
    return [_shifted(*item, rng, reach) for item in with_images]


def _layouts(batch: Batch) -> dict[str, Layout]:
    """Find the feeds that hold an image for each sample."""
    fed = {name: is_image(Input(name, a.dtype, a.shape)) for name, a in batch.feeds.items()}
    return {n: how for n, how in fed.items() if how and len(batch.feeds[n]) >= batch.samples}


def _shifted(
    batch: Batch, layouts: Mapping[str, Layout], rng: np.random.Generator, reach: float
) -> Batch:
    draws = rng.random((batch.samples, 3))
    moved = {n: _moved(batch.feeds[n], how, draws, reach) for n, how in layouts.items()}
    return replace(batch, feeds=batch.feeds | moved)


def _moved(images: Array, layout: Layout, draws: npt.NDArray[np.float64], reach: float) -> Array:
    """Move images by `draws` (samples, 3) from 0 to 1: upwards, to the left, and if mirrored."""
    result = images.copy()
    before, after = (np.moveaxis(array, layout.index("C"), 1) for array in (images, result))
    height, width = before.shape[2:]
    y, x = int(reach * height), int(reach * width)
    padded = np.pad(before, ((0, 0), (0, 0), (y, y), (x, x)))
    for row, (up, back, mirror) in enumerate(draws):
        top, left = int(up * (2 * y + 1)), int(back * (2 * x + 1))
        image = padded[row, :, top : top + height, left : left + width]
        after[row] = image[..., ::-1] if mirror < 0.5 else image
    return result
