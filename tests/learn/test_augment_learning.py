from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

from pwopt.data import Batch
from pwopt.learn.augment import augment

N, SIDE = 64, 32
STEPS = np.arange(1, SIDE + 1, dtype=np.float32)
COLUMNS = np.broadcast_to(STEPS, (N, 3, SIDE, SIDE))
ROWS = COLUMNS.swapaxes(2, 3)
NOISE = np.random.default_rng(0).random((N, 3, SIDE, SIDE), np.float32)

UNMIXED = partial(augment, mixed=1e-9)
"""Beta is then so narrow that an image's share is one."""


def batch(**feeds: np.ndarray) -> Batch:
    return Batch(feeds, np.arange(N), N)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_about_every_other_image_is_mirrored() -> None:
    x = UNMIXED(batch(x=COLUMNS), rng(), reach=0).feeds["x"]
    mirrored = (x == COLUMNS[..., ::-1]).all(axis=(1, 2, 3))
    assert (mirrored ^ (x == COLUMNS).all(axis=(1, 2, 3))).all()
    assert 20 < mirrored.sum() < 44


@pytest.mark.parametrize("images", [ROWS, COLUMNS], ids=["vertically", "horizontally"])
def test_images_are_shifted_up_to_an_eighth_with_zeros_coming_in(images: np.ndarray) -> None:
    x = UNMIXED(batch(x=images), rng()).feeds["x"]
    shifts = set()
    for image in x if images is COLUMNS else x.swapaxes(2, 3):
        line = image[0, SIDE // 2]
        if line.argmax() < SIDE // 2:  # mirrored
            line, image = line[::-1], image[..., ::-1]
        shift = line[SIDE // 2] - STEPS[SIDE // 2]
        moved = STEPS + shift
        moved[(moved < 1) | (moved > SIDE)] = 0
        inner = image[:, 4:-4]  # across, nothing comes in this far
        np.testing.assert_array_equal(inner, np.broadcast_to(moved, inner.shape))
        shifts.add(int(shift))
    assert shifts == set(range(-4, 5))


def test_each_image_is_mixed_with_the_one_before_of_which_it_takes_less() -> None:
    numbers = np.broadcast_to(np.arange(N)[:, None, None, None], (N, 1, 16, 16))
    mixed = augment(batch(x=numbers.astype(np.float32)), rng(), reach=0)
    x = mixed.feeds["x"][:, 0]
    assert (x == x[:, :1, :1]).all()
    taken = np.arange(1, N) - x[1:, 0, 0]  # of the number that is smaller by one
    assert ((taken > -1e-5) & (taken < 0.5 + 1e-5)).all()
    assert len(np.unique(taken)) > N / 2
    assert 0.05 < taken.mean() < 0.25
    assert mixed.labels is not None
    assert mixed.labels.tolist() == list(range(N))


def test_layouts_types_and_several_images_of_a_sample_are_treated_alike() -> None:
    feeds = {
        "x": NOISE,
        "last": np.ascontiguousarray(np.moveaxis(NOISE, 1, 3)),
        "half": NOISE.astype(np.float16),
        "mask": NOISE[:, :1].copy(),
    }
    result = augment(batch(**feeds), rng()).feeds
    assert not np.allclose(result["x"], NOISE)
    np.testing.assert_array_equal(np.moveaxis(result["last"], 3, 1), result["x"])
    np.testing.assert_array_equal(result["mask"], result["x"][:, :1])
    np.testing.assert_allclose(result["half"], result["x"], atol=2e-3)
    for name, array in feeds.items():
        assert result[name].dtype == array.dtype
        assert result[name].shape == array.shape
        assert result[name].flags.c_contiguous
    np.testing.assert_array_equal(feeds["mask"], NOISE[:, :1])


def test_what_is_no_image_stays() -> None:
    others = {
        "features": np.ones((N, 64, 16, 16), np.float32),
        "small": np.ones((N, 3, 8, 8), np.float32),
        "bytes": np.ones((N, 3, 32, 32), np.uint8),
        "shared": np.ones((1, 3, 32, 32), np.float32),
    }
    alone = batch(**others)
    assert augment(alone, rng()) is alone
    result = augment(batch(x=NOISE, **others), rng()).feeds
    assert all(result[name] is array for name, array in others.items())
    assert not np.array_equal(result["x"], NOISE)


def test_the_same_generator_gives_the_same_copy() -> None:
    one, same, other = (augment(batch(x=NOISE), rng(seed)).feeds["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
