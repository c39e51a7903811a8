"""Images mirrored, shifted and mixed, so that a saturated teacher still has something to teach.

On the images that it was trained on, the original is all but sure of everything, and a network that
learns from just those gets worse on others. What decides is not how often images are seen but that
they are always new, with the original run on what they became.
"""

from dataclasses import replace

import numpy as np

from pwopt.calibration.augment import FAR, layouts, moved
from pwopt.data import Batch
from pwopt.data.samples import Array

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
    # Training batches are never filled up: what has more rows is no image of each sample.
    found = {n: how for n, how in layouts(batch).items() if len(batch.feeds[n]) == batch.samples}
    if not found:
        return batch
    up, left, mirror = rng.random((3, batch.samples))
    share = rng.beta(mixed, mixed, batch.samples)
    share = np.maximum(share, 1 - share)
    images: dict[str, Array] = {}
    for name, layout in found.items():
        channels_first = np.moveaxis(batch.feeds[name], layout.index("C"), 1)
        ones = moved(channels_first, up, left, mirror, reach)
        weight = share.astype(ones.dtype)[:, None, None, None]
        mix = weight * ones + (1 - weight) * np.roll(ones, 1, axis=0)
        images[name] = np.ascontiguousarray(np.moveaxis(mix, 1, layout.index("C")))
    return replace(batch, feeds=batch.feeds | images)
