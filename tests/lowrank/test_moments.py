"""Moments against those that numpy takes of all rows at once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwopt.lowrank import Moments, moments

Array = npt.NDArray[Any]


def draw(count: int, channels: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((channels, channels))
    return rng.standard_normal((count, channels)) @ mix + 5 * rng.standard_normal(channels)


def assert_moments_of(rows: Array, found: Moments) -> None:
    assert found.count == len(rows)
    assert found.mean.dtype == found.scatter.dtype == np.float64
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    covariance = np.cov(rows, rowvar=False, bias=True).reshape(found.scatter.shape)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_of_any_type(dtype: Any) -> None:
    rows = draw(200, 5).astype(dtype)
    assert_moments_of(rows, Moments.of(rows))


def test_blocks_merge_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(1000, 6)
    monkeypatch.setattr(moments, "_BLOCK", 6 * 7)  # 142 blocks of 7 rows, and one of 6
    assert_moments_of(rows, Moments.of(rows))


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    channels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_parts_merge_to_the_whole(sizes: list[int], channels: int, seed: int) -> None:
    rows = draw(sum(sizes) + 1, channels, seed)
    parts = np.split(rows, np.cumsum(sizes))
    total = Moments.of(parts[0])
    for part in parts[1:]:
        total += Moments.of(part)
    assert_moments_of(rows, total)


def test_order_and_grouping_do_not_matter() -> None:
    a, b, c = (Moments.of(draw(n, 4, seed=n)) for n in (3, 50, 700))
    for one, other in [((a + b) + c, a + (b + c)), (a + b, b + a)]:
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12)
        np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-11)


def test_no_rows() -> None:
    empty = Moments.of(np.empty((0, 3), np.float32))
    for nothing in (empty, empty + empty):
        assert nothing.count == 0
        assert not nothing.mean.any()
        assert not nothing.covariance.any()
    rows = draw(10, 3)
    assert_moments_of(rows, empty + Moments.of(rows))
    assert_moments_of(rows, Moments.of(rows) + empty)


def test_a_large_mean_costs_no_digits() -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 2)) + 1e6
    parts = Moments.of(rows[:300]) + Moments.of(rows[300:])
    np.testing.assert_allclose(
        parts.covariance, np.cov(rows, rowvar=False, bias=True), rtol=1e-6, atol=1e-9
    )


def test_other_channels_do_not_merge() -> None:
    with pytest.raises(ValueError, match="3 and 1 channels"):
        Moments.of(draw(5, 3)) + Moments.of(draw(5, 1))
