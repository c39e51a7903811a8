"""Splits by moments against brute force: numpy's SVD of outputs, scipy's minimisers, real data."""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import effective
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from pwopt.lowrank import Factors, Moments, Splitter, calibrated

Array = npt.NDArray[Any]

SHAPES = [(7, 5), (6, 5, 1, 1), (6, 5, 3), (6, 5, 3, 3), (5, 6, 2, 3), (5, 4, 2, 1, 2)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def output_side(weight: Array, bias: Array, outputs: Moments, rank: int) -> Factors:
    return calibrated.Splitter(weight, bias, outputs=outputs).output_side(rank)


def input_side(
    weight: Array, bias: Array, inputs: Moments, rank: int, taps: Array | None = None
) -> Factors:
    return calibrated.Splitter(weight, bias, inputs=inputs, taps=taps).input_side(rank)


def both_sides(
    weight: Array,
    bias: Array,
    inputs: Moments,
    outputs: Moments,
    in_rank: int,
    out_rank: int,
    taps: Array | None = None,
) -> Factors:
    splitter = calibrated.Splitter(weight, bias, inputs=inputs, outputs=outputs, taps=taps)
    return splitter.both_sides(in_rank, out_rank)


def layer(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape[0])


def spread(size: int, seed: int = 0) -> Array:
    """Draw a covariance whose eigenvalues fall over four orders of magnitude."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size))).Q
    return (basis * np.logspace(0, -4, size)) @ basis.T


def neighbours(count: int) -> Array:
    """Correlation of taps that falls with their distance."""
    return 0.7 ** np.abs(np.subtract.outer(np.arange(count), np.arange(count)))


def patches(
    channels: int, taps: int, correlation: Array | None = None, count: int = 600, seed: int = 0
) -> Array:
    """Draw patches (n, T, C) of exactly the covariance R ⊗ S, and of the same mean at each tap."""
    rng = np.random.default_rng(seed)
    covariance = np.kron(np.eye(taps) if correlation is None else correlation, spread(channels))
    noise = rng.standard_normal((count, taps * channels))
    white = np.linalg.qr(noise - noise.mean(axis=0)).Q * np.sqrt(count)
    rows = white @ np.linalg.cholesky(covariance).T
    return rows.reshape(count, taps, channels) + 3 * rng.standard_normal(channels)


def moments_of(seen: Array) -> Moments:
    return Moments.of(seen.reshape(-1, seen.shape[-1]))


def outputs_of(weight: Array, bias: Array, seen: Array) -> Array:
    """Apply a layer to patches (…, T, C)."""
    return np.einsum("oit,...ti->...o", weight.reshape(*weight.shape[:2], -1), seen) + bias


def error(weight: Array, bias: Array, factors: Factors, seen: Array) -> float:
    """Return E‖y − ŷ‖² on patches."""
    kept, kept_bias = effective(factors, bias)
    lost = outputs_of(weight - kept, bias - kept_bias, seen)
    return float((lost**2).sum(axis=-1).mean())


def windows(maps: Array, kernel: tuple[int, ...], pad: int = 0, stride: int = 1) -> Array:
    """Return the patches (N, *positions, T, C) of maps (N, C, *spatial)."""
    axes = tuple(range(2, maps.ndim))
    padded = np.pad(maps, [(0, 0), (0, 0)] + [(pad, pad)] * len(axes))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=axes)
    views = views[(slice(None), slice(None), *[slice(None, None, stride)] * len(axes))]
    flat = views.reshape(*views.shape[: maps.ndim], -1)
    return np.moveaxis(flat, 1, -1)


def maps_of(channels: int, axes: int, count: int = 40, size: int = 5, seed: int = 0) -> Array:
    """Draw maps with correlated channels and neighbours, after a Relu."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((count, channels) + (size,) * axes)
    for axis in range(2, 2 + axes):
        maps = maps + np.roll(maps, 1, axis=axis)
    mixed = np.einsum("ij,nj...->ni...", np.linalg.cholesky(spread(channels, seed)), maps)
    return np.maximum(mixed + 0.2, 0)


def rivals(factors: Factors, bias: Array) -> Iterator[Factors]:
    """Yield splits of the same shape: close to `factors`, far from them, and at random."""
    rng = np.random.default_rng(1)
    for scale, _ in product((1e-4, 1e-2, 1.0), range(20)):
        yield Factors(
            *(
                None if part is None else part + scale * rng.standard_normal(part.shape)
                for part in (factors.core, factors.reduce, factors.expand, factors.bias)
            )
        )


# Output side


@every_shape
@pytest.mark.parametrize(("pad", "stride"), [(0, 1), (1, 1), (1, 2)])
def test_output_side_is_the_best_there_is(shape: tuple[int, ...], pad: int, stride: int) -> None:
    weight, bias = layer(shape)
    seen = windows(maps_of(shape[1], len(shape) - 2, count=60), shape[2:], pad, stride)
    rows = outputs_of(weight, bias, seen).reshape(-1, shape[0])
    spectrum = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2 / len(rows)
    for rank in range(1, shape[0]):
        factors = output_side(weight, bias, Moments.of(rows), rank)
        reached = error(weight, bias, factors, seen)
        assert reached == pytest.approx(spectrum[rank:].sum(), rel=1e-8, abs=1e-12)
        for rival in rivals(factors, bias):
            assert error(weight, bias, rival, seen) >= reached - 1e-12


def test_output_side_keeps_the_mean() -> None:
    weight, bias = layer((6, 5, 3, 3))
    seen = windows(maps_of(5, 2), (3, 3), pad=1)
    rows = outputs_of(weight, bias, seen).reshape(-1, 6)
    factors = output_side(weight, bias, Moments.of(rows), 2)
    kept = outputs_of(*effective(factors, bias), seen).reshape(-1, 6)
    np.testing.assert_allclose(kept.mean(axis=0), rows.mean(axis=0), atol=1e-12)


def test_outputs_that_never_vary() -> None:
    weight, bias = layer((6, 5, 3))
    seen = np.ones((10, 3, 5))
    outputs = Moments.of(outputs_of(weight, bias, seen))
    factors = output_side(weight, bias, outputs, 1)
    assert error(weight, bias, factors, seen) < 1e-20


# Input side


def best_by_descent(weight: Array, covariance: Array, rank: int, starts: int = 6) -> float:
    """Return the least tr(D Σ Dᵀ), D_t = W_t − K_t P, that quasi-Newton descent finds.

    `covariance` Σ is that of whole patches, (T·Cin, T·Cin), tap by tap.
    """
    out_channels, in_channels, *kernel = weight.shape
    taps = prod(kernel)
    matrices = np.moveaxis(weight.reshape(out_channels, in_channels, taps), -1, 0)

    def loss(parameters: Array) -> tuple[float, Array]:
        reduce = parameters[: rank * in_channels].reshape(rank, in_channels)
        core = parameters[rank * in_channels :].reshape(taps, out_channels, rank)
        lost = np.moveaxis(matrices - core @ reduce, 0, 1).reshape(out_channels, -1)
        slope = (lost @ covariance).reshape(out_channels, taps, in_channels)
        to_reduce = -2 * np.einsum("tor,oti->ri", core, slope)
        to_core = -2 * np.einsum("oti,ri->tor", slope, reduce)
        gradient = np.concatenate([to_reduce.ravel(), to_core.ravel()])
        return float(np.sum((lost @ covariance) * lost)), gradient

    size = rank * in_channels + taps * out_channels * rank
    rng = np.random.default_rng(0)
    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-10}
    return min(
        minimize(loss, rng.standard_normal(size), jac=True, method="L-BFGS-B", options=options).fun
        for _ in range(starts)
    )


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, 3), (6, 4, 2, 2), (3, 4, 1, 1), (3, 4)], ids=str)
def test_input_side_is_the_best_there_is(shape: tuple[int, ...], correlated: bool) -> None:
    weight, bias = layer(shape)
    taps = prod(shape[2:])
    correlation = neighbours(taps) if correlated else None
    seen = patches(shape[1], taps, correlation)
    covariance = np.cov(seen.reshape(len(seen), -1), rowvar=False, bias=True)
    for rank in (1, 2, 3):
        factors = input_side(weight, bias, moments_of(seen), rank, correlation)
        reached = error(weight, bias, factors, seen)
        found = best_by_descent(weight, covariance, rank)
        assert reached == pytest.approx(found, rel=1e-4)
        assert reached <= found * (1 + 1e-9)


def test_alternating_least_squares_have_nothing_to_add() -> None:
    weight, bias = layer((6, 5, 3))
    correlation = neighbours(3)
    seen = patches(5, 3, correlation)
    factors = input_side(weight, bias, moments_of(seen), 2, correlation)
    reduce = factors.reduce[:, :, 0]
    centred = seen - seen.mean(axis=0)
    targets = outputs_of(weight, np.zeros(6), centred)
    # The core by regression, then the reduce by its normal equations, on the data itself.
    reduced = (centred @ reduce.T).reshape(len(seen), -1)
    core = np.linalg.lstsq(reduced, targets, rcond=None)[0].T.reshape(6, 3, 2)
    design = np.einsum("otr,nti->nori", core, centred).reshape(len(seen) * 6, -1)
    again = np.linalg.lstsq(design, targets.ravel(), rcond=None)[0].reshape(reduce.shape)
    np.testing.assert_allclose(core, np.moveaxis(factors.core, 1, 2), atol=1e-9)
    np.testing.assert_allclose(again, reduce, atol=1e-7)


def test_input_side_with_a_mean_that_padding_hides() -> None:
    # Taps that are hidden independently and equally often: a block-diagonal patch covariance.
    weight, bias = layer((6, 5, 3))
    share, seen = 0.6, patches(5, 3)
    mean = seen.mean(axis=(0, 1))
    block = share * spread(5) + share * (1 - share) * np.outer(mean, mean)
    factors = input_side(weight, bias, moments_of(seen), 2, share * np.eye(3))
    kept, kept_bias = effective(factors, bias)
    lost = np.moveaxis(weight - kept, 1, 2).reshape(6, -1)
    covariance = np.kron(np.eye(3), block)
    reached = np.sum((lost @ covariance) * lost)
    assert reached <= best_by_descent(weight, covariance, 2) * (1 + 1e-9)
    np.testing.assert_allclose(kept_bias, bias + share * (weight - kept).sum(axis=2) @ mean)
    ignorant = input_side(weight, bias, moments_of(seen), 2)
    lost = np.moveaxis(weight - effective(ignorant, bias)[0], 1, 2).reshape(6, -1)
    assert np.sum((lost @ covariance) * lost) > reached


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 3, 3), (5, 4, 2, 1, 2)], ids=str)
def test_input_side_keeps_the_mean(shape: tuple[int, ...]) -> None:
    weight, bias = layer(shape)
    seen = patches(shape[1], prod(shape[2:]))
    factors = input_side(weight, bias, moments_of(seen), 2)
    lost = outputs_of(*effective(factors, bias), seen) - outputs_of(weight, bias, seen)
    np.testing.assert_allclose(lost.mean(axis=0), 0, atol=1e-12)
    assert np.abs(lost).max() > 1e-3


@pytest.mark.parametrize("sides", ["input", "both"])
@pytest.mark.parametrize(("pad", "stride"), [(0, 1), (1, 1), (2, 2)])
def test_the_mean_is_kept_with_padding(sides: str, pad: int, stride: int) -> None:
    weight, bias = layer((6, 5, 3, 3))
    # Equal all over each map, so that the mean at the border is that of the whole.
    maps = np.random.default_rng(0).standard_normal((50, 5, 1, 1)) * np.ones((4, 4)) + 2
    seen = windows(maps, (3, 3), pad, stride)
    inputs = Moments.of(np.moveaxis(maps, 1, -1).reshape(-1, 5))
    outputs = Moments.of(outputs_of(weight, bias, seen).reshape(-1, 6))
    taps = calibrated.padded_taps((4, 4), (3, 3), (pad,) * 4, (stride,) * 2, (1, 1))
    factors = (
        input_side(weight, bias, inputs, 2, taps)
        if sides == "input"
        else both_sides(weight, bias, inputs, outputs, 2, 3, taps)
    )
    kept = outputs_of(*effective(factors, bias), seen).reshape(-1, 6)
    np.testing.assert_allclose(kept.mean(axis=0), outputs.mean, atol=1e-10)


# Both sides


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 3, 3), (5, 4, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("correlated", [False, True])
def test_both_sides(shape: tuple[int, ...], correlated: bool) -> None:
    weight, bias = layer(shape)
    taps = prod(shape[2:])
    correlation = neighbours(taps) if correlated else None
    seen = patches(shape[1], taps, correlation)
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    factors = both_sides(weight, bias, inputs, outputs, 2, 3, correlation)
    assert factors.reduce is not None
    assert factors.expand is not None

    reached = error(weight, bias, factors, seen)
    basis = factors.expand.reshape(shape[0], 3)
    projected = np.tensordot(basis.T, weight, axes=1)
    covariance = np.cov(seen.reshape(len(seen), -1), rowvar=False, bias=True)
    outside = np.linalg.eigvalsh(outputs.covariance)[:-3].sum()
    inside = best_by_descent(projected, covariance, 2)
    assert reached == pytest.approx(outside + inside, rel=1e-4)

    lost = outputs_of(*effective(factors, bias), seen) - outputs_of(weight, bias, seen)
    np.testing.assert_allclose(lost.mean(axis=0), 0, atol=1e-12)


# All of them


def splits(
    weight: Array, bias: Array, inputs: Moments, outputs: Moments, rank: int
) -> dict[str, Factors]:
    return {
        "input": input_side(weight, bias, inputs, rank),
        "output": output_side(weight, bias, outputs, rank),
        "both": both_sides(weight, bias, inputs, outputs, rank, rank),
    }


@given(
    out_channels=st.integers(3, 8),
    in_channels=st.integers(3, 8),
    taps=st.integers(1, 4),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_one_side_is_never_worse_than_by_the_weight_alone(
    out_channels: int, in_channels: int, taps: int, seed: int, data: st.DataObject
) -> None:
    weight, bias = layer((out_channels, in_channels, taps), seed)
    rank = data.draw(st.integers(1, min(out_channels, in_channels) - 1))
    seen = patches(in_channels, taps, count=60, seed=seed)
    outputs = Moments.of(outputs_of(weight, bias, seen))
    plain = Splitter(weight)
    found = splits(weight, bias, moments_of(seen), outputs, rank)
    for sides in ("input", "output"):
        blind = error(weight, bias, plain.split(sides, rank), seen)
        assert error(weight, bias, found[sides], seen) <= blind * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pad", [0, 1])
def test_better_than_the_weight_alone_on_maps(pad: int, seed: int) -> None:
    weight, bias = layer((12, 10, 3, 3), seed)
    maps = maps_of(10, 2, size=6, seed=seed)
    seen = windows(maps, (3, 3), pad)
    inputs = Moments.of(np.moveaxis(maps, 1, -1).reshape(-1, 10))
    outputs = Moments.of(outputs_of(weight, bias, seen).reshape(-1, 12))
    plain = Splitter(weight)
    for sides, factors in splits(weight, bias, inputs, outputs, 4).items():
        blind = error(weight, bias, plain.split(sides, 4), seen)
        assert error(weight, bias, factors, seen) < 0.95 * blind


@every_shape
def test_shapes_and_order_of_the_factors(shape: tuple[int, ...]) -> None:
    """The factors, run one after the other, give what `effective` says."""
    out_channels, in_channels, *kernel = shape
    weight, bias = layer(shape)
    seen = patches(in_channels, prod(kernel))
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    factors = both_sides(weight, bias, inputs, outputs, 2, 3)
    ones = [1] * len(kernel)
    assert factors.reduce.shape == (2, in_channels, *ones)
    assert factors.core.shape == (3, 2, *kernel)
    assert factors.expand.shape == (out_channels, 3, *ones)
    assert factors.bias.shape == (out_channels,)
    between = outputs_of(factors.core, np.zeros(3), seen @ factors.reduce.reshape(2, -1).T)
    np.testing.assert_allclose(
        between @ factors.expand.reshape(-1, 3).T + factors.bias,
        outputs_of(*effective(factors, bias), seen),
        atol=1e-12,
    )


def test_effective_of_factors_without_a_bias() -> None:
    weight, bias = layer((6, 5, 3))
    kept, kept_bias = effective(Splitter(weight).split("input", 4), bias)
    assert kept.shape == weight.shape
    np.testing.assert_array_equal(kept_bias, bias)


def test_dead_and_constant_channels_cost_no_rank() -> None:
    weight, bias = layer((8, 7, 3))
    seen = np.zeros((600, 3, 7))
    seen[..., 2:6] = patches(4, 3)
    seen[..., 6] = 5.0
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    for factors in (
        input_side(weight, bias, inputs, 4),
        both_sides(weight, bias, inputs, outputs, 4, 7),
    ):
        assert np.isfinite(factors.core).all()
        assert np.isfinite(factors.reduce).all()
        outside = np.linalg.eigvalsh(outputs.covariance)[0] if factors.expand is not None else 0
        assert error(weight, bias, factors, seen) == pytest.approx(outside, abs=1e-6)


def test_inputs_of_low_rank_are_kept_whole() -> None:
    weight, bias = layer((8, 7, 3))
    mix = np.random.default_rng(3).standard_normal((3, 7))
    seen = patches(3, 3) @ mix
    inputs = moments_of(seen)
    for rank in (3, 5):  # more than there is to keep must do no harm either
        factors = input_side(weight, bias, inputs, rank)
        assert error(weight, bias, factors, seen) < 1e-6
        assert np.abs(factors.core).max() < 100


def test_fewer_samples_than_channels() -> None:
    weight, bias = layer((12, 10, 3))
    seen = patches(10, 3)[:2]
    found = splits(weight, bias, moments_of(seen), Moments.of(outputs_of(weight, bias, seen)), 6)
    for factors in found.values():
        assert error(weight, bias, factors, seen) < 1e-5


def test_inputs_that_never_vary_leave_the_weight_to_decide() -> None:
    weight, bias = layer((6, 5, 3))
    seen = np.ones((10, 3, 5))
    factors = input_side(weight, bias, moments_of(seen), 2)
    assert error(weight, bias, factors, seen) < 1e-20
    kept, _ = effective(factors, bias)
    blind, _ = effective(Splitter(weight).split("input", 2), bias)
    np.testing.assert_allclose(kept, blind, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 5e-3), (np.float32, 1e-5)])
def test_factors_have_the_type_of_the_weight(dtype: Any, tolerance: float) -> None:
    weight, bias = (part.astype(dtype) for part in layer((24, 20, 3, 3)))
    seen = np.zeros((600, 9, 20))
    seen[..., :15] = patches(15, 9)  # dead channels: the whitening has a wide range
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    found = splits(weight, bias, inputs, outputs, 8)
    exact = splits(weight.astype(float), bias.astype(float), inputs, outputs, 8)
    for sides, factors in found.items():
        parts = [factors.core, factors.reduce, factors.expand, factors.bias]
        assert {part.dtype for part in parts if part is not None} == {np.dtype(dtype)}
        kept, kept_bias = effective(factors, bias)
        wanted, wanted_bias = effective(exact[sides], bias)
        assert np.abs(kept - wanted).max() <= tolerance * np.abs(wanted).max()
        assert np.abs(kept_bias - wanted_bias).max() <= tolerance * np.abs(wanted_bias).max()


def test_the_layer_itself_stays_untouched() -> None:
    weight, bias = layer((6, 5, 3))
    seen = patches(5, 3)
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    before = [part.copy() for part in (weight, bias, inputs.mean, inputs.scatter)]
    splits(weight, bias, inputs, outputs, 2)
    after = [weight, bias, inputs.mean, inputs.scatter]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


# Taps


@given(
    size=st.lists(st.integers(3, 6), min_size=1, max_size=2),
    kernel=st.integers(1, 3),
    begin=st.integers(0, 2),
    end=st.integers(0, 2),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
)
def test_padded_taps(
    size: list[int], kernel: int, begin: int, end: int, stride: int, dilation: int
) -> None:
    axes = len(size)
    span = (kernel - 1) * dilation + 1
    if span > min(size) + begin + end:
        return
    padded = np.pad(np.ones(size), [(begin, end)] * axes)
    views = np.lib.stride_tricks.sliding_window_view(padded, [span] * axes)
    views = views[(slice(None, None, stride),) * axes + (slice(None, None, dilation),) * axes]
    shares = views.mean(axis=tuple(range(axes))).ravel()
    taps = calibrated.padded_taps(
        size, [kernel] * axes, [begin] * axes + [end] * axes, [stride] * axes, [dilation] * axes
    )
    np.testing.assert_allclose(taps, np.diag(shares))


# What is refused


@pytest.mark.parametrize("rank", [-1, 0, 5, 6])
def test_ranks_have_limits(rank: int) -> None:
    weight, bias = layer((5, 5, 3))
    seen = patches(5, 3)
    inputs, outputs = moments_of(seen), Moments.of(outputs_of(weight, bias, seen))
    message = f"rank {rank} is not between 1 and 4"
    with pytest.raises(ValueError, match=message):
        input_side(weight, bias, inputs, rank)
    with pytest.raises(ValueError, match=message):
        output_side(weight, bias, outputs, rank)
    with pytest.raises(ValueError, match=message):
        both_sides(weight, bias, inputs, outputs, rank, 2)
    with pytest.raises(ValueError, match=message):
        both_sides(weight, bias, inputs, outputs, 2, rank)


def test_moments_without_samples() -> None:
    weight, bias = layer((5, 5, 3))
    nothing = Moments.of(np.empty((0, 5)))
    with pytest.raises(ValueError, match="no samples"):
        input_side(weight, bias, nothing, 2)
    with pytest.raises(ValueError, match="no samples"):
        output_side(weight, bias, nothing, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    weight, bias = layer((5, 5, 3))
    rows = np.random.default_rng(0).standard_normal((20, 5))
    moments = Moments.of(rows)
    broken = Moments(20, moments.mean, moments.scatter + value)
    with pytest.raises(ValueError, match="moments hold NaN"):
        input_side(weight, bias, broken, 2)
    with pytest.raises(ValueError, match="moments hold NaN"):
        output_side(weight, bias, broken, 2)
    weight[0, 0, 0] = value
    with pytest.raises(ValueError, match="layer holds NaN"):
        input_side(weight, bias, moments, 2)
    with pytest.raises(ValueError, match="layer holds NaN"):
        output_side(weight, bias, moments, 2)
