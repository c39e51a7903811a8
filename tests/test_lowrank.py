"""Splits of a weight against brute force: the SVD of its unfoldings by numpy, in float64."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwopt.cost import Sides
from pwopt.lowrank import Factors, Splitter

Array = npt.NDArray[Any]

SHAPES = [(12, 9, 3), (9, 12, 3, 3), (12, 9, 1, 5), (8, 7, 2, 3, 2), (5, 40, 1, 2), (40, 5, 3, 3)]
SIDES: tuple[Sides, ...] = ("input", "output", "both")

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_side = pytest.mark.parametrize("sides", SIDES)


def weight(shape: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> Array:
    """Draw a weight whose singular values fall, as those of trained networks do."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    for axis, channels in enumerate(shape[:2]):
        mix = rng.standard_normal((channels, channels)) * 0.8 ** np.arange(channels)
        w = np.moveaxis(np.tensordot(mix, w, axes=(1, axis)), 0, axis)
    return (w / np.abs(w).max()).astype(dtype)


def unfolded(w: Array, axis: int) -> Array:
    return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)


def tail(w: Array, axis: int, rank: int) -> float:
    """Return the least possible ‖W − Ŵ‖² at this rank of one unfolding (Eckart-Young)."""
    singular = np.linalg.svd(unfolded(w.astype(np.float64), axis), compute_uv=False)
    return float((singular[rank:] ** 2).sum())


def composed(factors: Factors) -> Array:
    """Multiply the factors, tap by tap: Ŵ_t = expand · core_t · reduce."""
    w = factors.core.astype(np.float64)
    if factors.reduce is not None:
        w = np.einsum("or...,ri->oi...", w, matrix(factors.reduce))
    if factors.expand is not None:
        w = np.einsum("or,ri...->oi...", matrix(factors.expand), w)
    return w


def matrix(pointwise: Array) -> Array:
    assert set(pointwise.shape[2:]) == {1}
    return pointwise.reshape(pointwise.shape[:2]).astype(np.float64)


def error(w: Array, factors: Factors) -> float:
    return float(((w.astype(np.float64) - composed(factors)) ** 2).sum())


@every_shape
@pytest.mark.parametrize(("sides", "axis"), [("output", 0), ("input", 1)])
def test_one_side_is_optimal(shape: tuple[int, ...], sides: Sides, axis: int) -> None:
    w = weight(shape)
    splitter = Splitter(w)
    for rank in range(1, shape[axis]):
        assert error(w, splitter.split(sides, rank)) == pytest.approx(
            tail(w, axis, rank), abs=1e-12
        )


@every_shape
def test_both_sides_are_within_root_two_of_the_best(shape: tuple[int, ...]) -> None:
    w = weight(shape)
    splitter = Splitter(w)
    for rank in range(1, min(shape[:2])):
        # No split can do better than the better-fitting of its sides could alone.
        least = max(tail(w, 0, rank), tail(w, 1, rank))
        reached = error(w, splitter.split("both", rank))
        assert least - 1e-12 <= reached <= tail(w, 0, rank) + tail(w, 1, rank) + 1e-12


@every_shape
@every_side
def test_kept_energy_is_what_the_split_keeps(shape: tuple[int, ...], sides: Sides) -> None:
    w = weight(shape)
    splitter = Splitter(w)
    for rank in range(1, min(shape[:2])):
        kept = 1 - error(w, splitter.split(sides, rank)) / (w**2).sum()
        assert splitter.kept_energy(sides, rank) == pytest.approx(kept, abs=1e-12)


@every_shape
def test_shapes_of_the_factors(shape: tuple[int, ...]) -> None:
    out_channels, in_channels, *kernel = shape
    ones = [1] * len(kernel)
    splitter = Splitter(weight(shape))

    one = splitter.split("input", 3)
    assert one.expand is None
    assert one.reduce is not None
    assert one.reduce.shape == (3, in_channels, *ones)
    assert one.core.shape == (out_channels, 3, *kernel)

    other = splitter.split("output", 3)
    assert other.reduce is None
    assert other.expand is not None
    assert other.core.shape == (3, in_channels, *kernel)
    assert other.expand.shape == (out_channels, 3, *ones)

    both = splitter.split("both", 3)
    assert both.reduce is not None
    assert both.expand is not None
    assert both.reduce.shape == (3, in_channels, *ones)
    assert both.core.shape == (3, 3, *kernel)
    assert both.expand.shape == (out_channels, 3, *ones)


@every_side
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float16, 2e-3), (np.float32, 1e-6), (np.float64, 1e-14)]
)
def test_the_type_stays(sides: Sides, dtype: Any, tolerance: float) -> None:
    w = weight((24, 20, 3, 3), dtype)
    factors = Splitter(w).split(sides, 6)
    parts = [part for part in (factors.reduce, factors.core, factors.expand) if part is not None]
    assert {part.dtype for part in parts} == {np.dtype(dtype)}
    exact = Splitter(w.astype(np.float64)).split(sides, 6)
    scale = np.abs(w).max()
    assert np.abs(composed(factors) - composed(exact)).max() <= tolerance * 20 * scale


@every_side
def test_bases_are_orthonormal(sides: Sides) -> None:
    factors = Splitter(weight((12, 9, 3, 3))).split(sides, 4)
    if factors.reduce is not None:
        np.testing.assert_allclose(
            matrix(factors.reduce) @ matrix(factors.reduce).T, np.eye(4), atol=1e-12
        )
    if factors.expand is not None:
        np.testing.assert_allclose(
            matrix(factors.expand).T @ matrix(factors.expand), np.eye(4), atol=1e-12
        )


@every_side
def test_a_weight_of_low_rank_is_kept_whole(sides: Sides) -> None:
    rng = np.random.default_rng(1)
    core = rng.standard_normal((3, 3, 5, 5))
    w = np.einsum(
        "ab...,ca,bd->cd...", core, rng.standard_normal((12, 3)), rng.standard_normal((3, 9))
    )
    splitter = Splitter(w)
    np.testing.assert_allclose(composed(splitter.split(sides, 3)), w, atol=1e-9)
    assert splitter.kept_energy(sides, 3) == pytest.approx(1, abs=1e-12)


@every_side
def test_energy_grows_with_the_rank(sides: Sides) -> None:
    splitter = Splitter(weight((12, 9, 3, 3)))
    energies = [splitter.kept_energy(sides, rank) for rank in range(1, 10)]
    assert energies == sorted(energies)
    assert 0 < energies[0] < energies[-2] < 1
    if sides == "input":
        assert energies[-1] == pytest.approx(1)


@every_side
def test_zeros(sides: Sides) -> None:
    splitter = Splitter(np.zeros((6, 5, 3, 3), np.float32))
    assert splitter.kept_energy(sides, 2) == 1.0
    assert not composed(splitter.split(sides, 2)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite(value: float, dtype: Any) -> None:
    w = weight((6, 5, 3, 3), dtype)
    w[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        Splitter(w)


@pytest.mark.parametrize(("sides", "limit"), [("input", 9), ("output", 12), ("both", 9)])
def test_ranks_have_limits(sides: Sides, limit: int) -> None:
    splitter = Splitter(weight((12, 9, 3, 3)))
    for rank in (-1, 0, limit, limit + 1):
        with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and {limit - 1}"):
            splitter.split(sides, rank)
    splitter.split(sides, limit - 1)


def test_the_weight_itself_stays_untouched() -> None:
    w = weight((12, 9, 3, 3))
    before = w.copy()
    splitter = Splitter(w)
    for sides in SIDES:
        splitter.split(sides, 4)
    assert np.array_equal(w, before)


@given(
    shape=st.tuples(st.integers(2, 10), st.integers(2, 10), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_random_weights(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    w = weight(shape, seed=seed)
    rank = data.draw(st.integers(1, min(shape[:2]) - 1))
    splitter = Splitter(w)
    errors = {sides: error(w, splitter.split(sides, rank)) for sides in SIDES}
    assert errors["input"] == pytest.approx(tail(w, 1, rank), abs=1e-10)
    assert errors["output"] == pytest.approx(tail(w, 0, rank), abs=1e-10)
    assert max(errors["input"], errors["output"]) <= errors["both"] + 1e-10
    assert errors["both"] <= errors["input"] + errors["output"] + 1e-10
