"""Fits to rows against brute force: normal equations, scipy's minimisers, onnxruntime's Conv."""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import parse, random_feeds, run
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from pwopt import shapes
from pwopt.linear import Linear, linear
from pwopt.lowrank import regression
from pwopt.lowrank.regression import Regression, patches, regress
from pwopt.model import Model

Array = npt.NDArray[Any]
Rows = tuple[Array, Array, Array]


def rows(
    count: int = 300, features: int = 6, outputs: int = 5, *, noise: float = 0.5, seed: int = 0
) -> Rows:
    """Draw features and targets with means, and a prior that is not far from what made them."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, features)) @ rng.standard_normal((features, features)) + 2
    weight = rng.standard_normal((outputs, features))
    targets = mixed @ weight.T + noise * rng.standard_normal((count, outputs))
    return mixed, targets - targets.mean(axis=0), weight + 0.3 * rng.standard_normal(weight.shape)


def weight_of(fitted: Regression) -> Array:
    return fitted.core if fitted.expand is None else fitted.expand @ fitted.core


def loss(weight: Array, bias: Array, data: Rows, damping: float) -> float:
    """Compute what `regress` is to minimise."""
    features, targets, prior = data
    ridge = damping * features.var(axis=0).mean()
    error = ((targets - features @ weight.T - bias) ** 2).sum(axis=1).mean()
    return float(error + ridge * ((weight - prior) ** 2).sum())


def fitted_loss(fitted: Regression, data: Rows, damping: float) -> float:
    return loss(weight_of(fitted), fitted.bias, data, damping)


def behind_relu(fitted: Regression, data: Rows, shift: Array | float = 0.0) -> float:
    features, targets, _ = data
    output, wanted = fitted.predict(features) + shift, targets + shift
    return float(((np.maximum(output, 0) - np.maximum(wanted, 0)) ** 2).mean())


# -- ridge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("count", [300, 4])
def test_ridge_is_ordinary_least_squares_with_rows_for_the_ridge(
    count: int, damping: float
) -> None:
    """A ridge is some rows more: √δ·I, to be fitted to √δ·B₀, and of no intercept."""
    data = features, targets, prior = rows(count)
    root = np.sqrt(count * damping * features.var(axis=0).mean())
    wide = np.block([[features, np.ones((count, 1))], [root * np.eye(6), np.zeros((6, 1))]])
    wanted = np.linalg.lstsq(wide, np.vstack([targets, root * prior.T]))[0]
    fitted = regress(*data, damping=damping)
    assert fitted.expand is None
    np.testing.assert_allclose(fitted.core, wanted[:-1].T, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fitted.bias, wanted[-1], rtol=1e-6, atol=1e-6)


def test_float32_rows_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = features, targets, prior = rows(1000)
    wanted = regress(*data)
    monkeypatch.setattr(regression, "_BLOCK", 64 * 6)
    fitted = regress(features.astype(np.float32), targets.astype(np.float32), prior)
    assert fitted.core.dtype == fitted.bias.dtype == np.float64
    np.testing.assert_allclose(fitted.core, wanted.core, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.bias, wanted.bias, rtol=1e-4, atol=1e-4)
    exact = regress(*data)
    np.testing.assert_allclose(exact.core, wanted.core, rtol=1e-9)


def test_far_from_zero_float32_loses_little() -> None:
    features, targets, prior = rows(2000, noise=0.0)
    features = (features + 300).astype(np.float32)
    fitted = regress(features, targets.astype(np.float32), prior, damping=1e-6)
    error = ((fitted.predict(features.astype(np.float64)) - targets) ** 2).mean()
    assert error < 1e-4 * (targets**2).mean()


def test_half_precision_rows() -> None:
    features, targets, prior = (array.astype(np.float16) for array in rows())
    fitted = regress(features, targets, prior, relu=True)
    assert fitted.predict(features).dtype == np.float32
    wide = regress(*(array.astype(np.float64) for array in (features, targets, prior)), relu=True)
    np.testing.assert_allclose(fitted.core, wide.core, rtol=1e-2, atol=1e-2)


def test_directions_without_rows_stay_at_the_prior() -> None:
    features, targets, prior = rows(8, features=30)
    fitted = regress(features, targets, prior, damping=1e-3)
    unseen = np.linalg.svd(features - features.mean(axis=0)).Vh[7:]
    np.testing.assert_allclose(fitted.core @ unseen.T, prior @ unseen.T, atol=1e-8)
    seen = features - features.mean(axis=0)
    assert np.abs((fitted.core - prior) @ seen.T).max() > 0.1


def test_a_single_row_moves_the_bias_alone() -> None:
    features, targets, prior = rows(1)
    fitted = regress(features, targets, prior)
    np.testing.assert_allclose(fitted.core, prior)
    np.testing.assert_allclose(fitted.predict(features), targets, atol=1e-9)


@pytest.mark.parametrize("relu", [False, True])
def test_dead_features(relu: bool) -> None:
    features, targets, prior = rows()
    features[:, 2] = 0
    features[:, 4] = 7
    fitted = regress(features, targets, prior, relu=relu)
    np.testing.assert_allclose(fitted.core[:, [2, 4]], prior[:, [2, 4]])
    features[:] = 3
    fitted = regress(features, targets, prior, rank=2)
    assert np.isfinite(fitted.core).all()
    np.testing.assert_allclose(fitted.predict(features)[0], targets.mean(axis=0), atol=1e-9)


# -- reduced rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("damping", [1e-4, 0.3])
def test_no_start_leads_to_a_better_weight_of_this_rank(rank: int, damping: float) -> None:
    data = features, targets, prior = rows(60, features=5, outputs=4, noise=2.0)
    fitted = regress(*data, rank=rank, damping=damping)
    assert fitted.expand is not None
    assert (fitted.core.shape, fitted.expand.shape) == ((rank, 5), (4, rank))
    best = fitted_loss(fitted, data, damping)
    ridge = damping * features.var(axis=0).mean()
    centred, wanted = features - features.mean(axis=0), targets - targets.mean(axis=0)

    def objective(flat: Array) -> tuple[float, Array]:
        expand, core = flat[: 4 * rank].reshape(4, rank), flat[4 * rank :].reshape(rank, 5)
        weight = expand @ core
        missed, moved = wanted - centred @ weight.T, weight - prior
        slope = -2 * missed.T @ centred / len(features) + 2 * ridge * moved
        value = (missed**2).sum() / len(features) + ridge * (moved**2).sum()
        return value, np.concatenate([(slope @ core.T).ravel(), (expand.T @ slope).ravel()])

    rng = np.random.default_rng(1)
    found = [
        minimize(objective, rng.standard_normal(9 * rank), jac=True, method="BFGS").fun
        for _ in range(20)
    ]
    assert best <= min(found) * (1 + 1e-9)
    assert best == pytest.approx(min(found), rel=1e-5)


def test_full_rank_is_the_limit() -> None:
    data = rows()
    full = fitted_loss(regress(*data), data, 1e-3)
    losses = [fitted_loss(regress(*data, rank=rank), data, 1e-3) for rank in (1, 2, 3, 4)]
    assert sorted(losses, reverse=True) == losses
    assert full < losses[-1]


# -- behind a Relu ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_error_behind_a_relu_falls(rank: int | None, shifted: bool) -> None:
    """Targets far below zero matter to the plain solution only."""
    rng = np.random.default_rng(5)
    features, targets, prior = rows(2000, outputs=6, noise=0.1)
    targets = np.where(targets < 0, -((np.abs(targets)) ** 1.7), targets) - 1
    shift = 2 * rng.standard_normal(targets.shape) if shifted else None
    data = features, targets, prior
    plain = regress(*data, rank=rank)
    fitted = regress(*data, rank=rank, relu=True, shift=shift)
    by = 0.0 if shift is None else shift
    assert behind_relu(fitted, data, by) < 0.8 * behind_relu(plain, data, by)


@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 40),
    rank=st.sampled_from([None, 1, 3]),
    offset=st.sampled_from([-4.0, 0.0, 4.0]),
)
def test_a_relu_never_raises_the_error(
    seed: int, count: int, rank: int | None, offset: float
) -> None:
    data = rows(count, seed=seed, noise=2.0)
    shift = np.random.default_rng(seed).standard_normal(data[1].shape) + offset
    plain = regress(*data, rank=rank)
    fitted = regress(*data, rank=rank, relu=True, shift=shift)
    assert behind_relu(fitted, data, shift) <= behind_relu(plain, data, shift) * (1 + 1e-12)


def test_a_relu_that_clips_nothing_changes_nothing() -> None:
    data = rows()
    shift = np.full(data[1].shape, 100.0)
    fitted = regress(*data, relu=True, shift=shift)
    np.testing.assert_allclose(fitted.core, regress(*data).core, atol=1e-9)


def test_a_shift_linear_in_the_features_is_one_of_targets_and_prior() -> None:
    """With s = S f + c the Relu sees a layer of weight B + S and bias b + c."""
    rng = np.random.default_rng(3)
    features, targets, prior = rows(noise=2.0)
    more, offset = rng.standard_normal(prior.shape), rng.standard_normal(5)
    shift = features @ more.T + offset
    fitted = regress(features, targets, prior, relu=True, shift=shift)
    wanted = regress(features, targets + shift, prior + more, relu=True)
    plain = regress(features, targets, prior)
    np.testing.assert_allclose(fitted.core + more, wanted.core, atol=1e-8)
    np.testing.assert_allclose(fitted.bias + offset, wanted.bias, atol=1e-8)
    assert np.abs(fitted.core - plain.core).max() > 0.01


def test_a_shift_without_a_relu_changes_nothing() -> None:
    """(t + s) − (B f + b + s) is the error of the layer alone."""
    data = rows()
    shift = np.random.default_rng(0).standard_normal(data[1].shape)
    np.testing.assert_array_equal(regress(*data, shift=shift).core, regress(*data).core)


def test_the_auxiliary_target_is_the_best_of_a_grid() -> None:
    grid = np.linspace(-6, 6, 24_001)
    output, wanted = (a.ravel() for a in np.meshgrid(*[np.linspace(-3, 3, 13)] * 2))
    for penalty in (0.01, 0.1, 1.0):

        def cost(z: Array, p: float = penalty) -> Array:
            relu = np.maximum(wanted[:, None], 0) - np.maximum(z, 0)
            losses: Array = relu**2 + p * (z - output[:, None]) ** 2
            return losses

        found = cost(regression._auxiliary(output, wanted, penalty)[:, None])[:, 0]
        best = cost(grid).min(axis=1)
        np.testing.assert_allclose(found, best, atol=1e-5)


# -- what is not taken ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and 4"):
        regress(*rows(), rank=rank)


def test_rows_that_cannot_be_fitted() -> None:
    features, targets, prior = rows()
    with pytest.raises(ValueError, match="0 rows"):
        regress(features[:0], targets[:0], prior)
    with pytest.raises(ValueError, match="300 rows cannot be fitted to 299 targets"):
        regress(features, targets[1:], prior)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(where: int, value: float) -> None:
    data = rows()
    data[where][1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        regress(*data)


# -- patches ----------------------------------------------------------------------------------

CONVS = [
    ("9", "5", "pads=[2,1], strides=[2], dilations=[2]"),
    ("9", "1", "strides=[3]"),
    ("7,8", "3,3", "pads=[1,1,1,1]"),
    ("7,8", "3,2", "pads=[0,2,1,0], strides=[2,3], dilations=[2,1]"),
    ("7,8", "1,1", "strides=[2,2]"),
    ("7,8", "3,4", 'auto_pad="SAME_UPPER", strides=[2,1]'),
    ("7,8", "3,4", 'auto_pad="SAME_LOWER", strides=[2,3]'),
    ("7,8", "3,4", 'auto_pad="VALID"'),
    ("2,2", "5,5", "pads=[3,3,3,3]"),
    ("5,4,6", "3,1,2", "pads=[1,0,1,2,1,0], strides=[1,2,2], dilations=[1,1,3]"),
]


def layer_of(model: Model) -> Linear:
    layer = linear(model.graph.nodes[-1], shapes.infer(model, shapes.bind(model, batch=3)))
    assert isinstance(layer, Linear), layer
    return layer


@pytest.mark.parametrize(("size", "kernel", "attributes"), CONVS)
def test_weights_on_patches_are_the_convolution(size: str, kernel: str, attributes: str) -> None:
    model = parse(
        f"conv (float[N,3,{size}] x) => (float[] y) <float[4,3,{kernel}] w, float[4] b>"
        f" {{ y = Conv<{attributes}>(x, w, b) }}"
    )
    layer = layer_of(model)
    feeds = random_feeds(model, batch=3)
    (outputs,) = run(model, feeds)
    window = layer.window(feeds["x"].shape[2:])
    count = 3 * prod(outputs.shape[2:])
    positions = np.random.default_rng(0).permutation(count)[: count - 1]
    seen = patches(
        feeds["x"], positions, window.kernel, window.pads, window.strides, window.dilations
    )
    assert seen.shape == (count - 1, 3 * prod(window.kernel))
    assert seen.dtype == np.float32
    wanted = np.moveaxis(outputs, 1, -1).reshape(-1, 4)[positions]
    got = seen @ layer.weight().reshape(4, -1).T + layer.bias()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    pointwise = patches(outputs, positions, *point(outputs.ndim - 2))
    np.testing.assert_array_equal(pointwise, wanted)


def point(axes: int) -> tuple[tuple[int, ...], ...]:
    """Describe the window of one position."""
    return (1,) * axes, (0,) * 2 * axes, (1,) * axes, (1,) * axes


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4)], ids=str)
def test_patches_of_rows_are_rows(shape: tuple[int, ...]) -> None:
    values = np.arange(prod(shape)).reshape(shape)
    np.testing.assert_array_equal(
        patches(values, np.array([5, 0])), [[20, 21, 22, 23], [0, 1, 2, 3]]
    )


def test_no_positions() -> None:
    maps = np.zeros((2, 3, 5, 5))
    assert patches(maps, np.empty(0, int), *point(2)).shape == (0, 3)
