"""Images mirrored, shifted and mixed, so that a saturated teacher still has something to teach.

On the images that it was trained on, the original is all but sure of everything, and a network that
learns from just those gets worse on others. What decides is not how often images are seen but that
they are always new, with the original run on what they became.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pwopt.calibration.augment import FAR, Layout, is_image
from pwopt.data import Batch
from pwopt.data.samples import Array
from pwopt.shapes import Input

MIXED = 0.4
"""Both parameters of the Beta distribution that weights are drawn from: most are near 0 or 1."""


def augment(
    batch: Batch, rng: np.random.Generator, *, reach: float = FAR, mixed: float = MIXED
) -> Batch:
    """Copy a batch with its images mirrored, shifted, and mixed with one another.

    Every other image is mirrored, on average. All are shifted by up to `reach` of height and width,
    with zeros coming in: black or the mean colour. Then each is mixed with the one before it in the
    batch: λ·one + (1 - λ)·other, with λ drawn from Beta(`mixed`, `mixed`) for each image (mixup,
    Zhang et al. 2018), and 1 - λ taken for λ below one half. So the label of an image remains that
    of its larger part; labels are left as they are.

    Several images of one sample are moved and mixed alike. What is no image (see `is_image`) stays
    as it is, and the whole batch if no input is one.
    """
    layouts = _layouts(batch)
    if not layouts:
        return batch
    up, left = rng.random((2, batch.samples))
    mirror = rng.random(batch.samples) < 0.5
    share = rng.beta(mixed, mixed, batch.samples)
    share = np.maximum(share, 1 - share)
    images: dict[str, Array] = {}
    for name, layout in layouts.items():
        moved = _moved(np.moveaxis(batch.feeds[name], layout.index("C"), 1), up, left, reach)
        moved[mirror] = moved[mirror, ..., ::-1]
        weight = share.astype(moved.dtype)[:, None, None, None]
        mix = weight * moved + (1 - weight) * np.roll(moved, 1, axis=0)
        images[name] = np.ascontiguousarray(np.moveaxis(mix, 1, layout.index("C")))
    return replace(batch, feeds=batch.feeds | images)


def _layouts(batch: Batch) -> Mapping[str, Layout]:
    """Find the feeds that hold one image for each sample."""
    fed = {name: is_image(Input(name, a.dtype, a.shape)) for name, a in batch.feeds.items()}
    return {n: how for n, how in fed.items() if how and len(batch.feeds[n]) == batch.samples}


def _moved(images: Array, up: Array, left: Array, reach: float) -> Array:
    """Shift images [n, C, H, W] by parts of `reach`, 0 to 1, from all the way down to all up."""
    height, width = images.shape[2:]
    y, x = int(reach * height), int(reach * width)
    padded = np.pad(images, ((0, 0), (0, 0), (y, y), (x, x)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    rows, columns = (up * (2 * y + 1)).astype(int), (left * (2 * x + 1)).astype(int)
    moved: Array = windows[np.arange(len(images)), :, rows, columns]
    return moved
