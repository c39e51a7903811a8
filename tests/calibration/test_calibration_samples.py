"""Calibration takes its samples from the whole source and keeps some to judge by."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import parse

from pwopt.calibration import Calibration, calibration_samples
from pwopt.calibration.samples import real, spread
from pwopt.data import open_data
from pwopt.errors import DataError
from pwopt.model import Model

OPEN = "net (float[N,2] x) => (float[N,2] y) { y = Relu(x) }"
FIXED = OPEN.replace("[N,", "[10,")
ONE = OPEN.replace("[N,", "[1,")


def arrays(tmp_path: Path, count: int) -> Path:
    """Number the samples; the label is the thousand."""
    path = tmp_path / "samples.npz"
    x = np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1)
    np.savez(path, x=x, labels=np.arange(count) // 1000)
    return path


def numbers(calibration: Calibration) -> tuple[list[int], list[int]]:
    """Return which samples are to be fitted, and which held out."""
    sides = [calibration.fit, calibration.held_out]
    fit, held = ([int(v) for b in s for v in b.feeds["x"][: b.samples, 0]] for s in sides)
    return fit, held


def drawn(model: Model, path: Path, **options: Any) -> Calibration:
    return calibration_samples(open_data(path, model), **options)


@pytest.mark.parametrize("text", [OPEN, FIXED, ONE])
def test_spread_over_the_source_and_mixed(tmp_path: Path, text: str) -> None:
    calibration = drawn(parse(text), arrays(tmp_path, 5000), limit=640)
    fit, held = numbers(calibration)
    assert len(fit) == 480
    assert len(held) == 160
    assert len({*fit, *held}) == 640
    stretches = np.sort([*fit, *held]) * 640 // 5000
    np.testing.assert_allclose(stretches, np.arange(640), atol=1)
    for side in (calibration.fit, calibration.held_out):
        labels = np.concatenate([b.labels for b in side if b.labels is not None])
        assert np.bincount(labels).min() > 0.1 * len(labels)
    for batch in (*calibration.fit, *calibration.held_out):
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, batch.feeds["x"][: batch.samples, 0] // 1000)


def test_no_others_are_read_where_those_can_be_taken(tmp_path: Path) -> None:
    source = replace(open_data(arrays(tmp_path, 100), parse(FIXED)), draw=pytest.fail)
    fit, held = numbers(calibration_samples(source, limit=16))
    assert (len(fit), len(held)) == (12, 4)


def test_the_same_every_time(tmp_path: Path) -> None:
    path = arrays(tmp_path, 100)
    assert numbers(drawn(parse(OPEN), path)) == numbers(drawn(parse(OPEN), path))


def test_few_samples_still_give_both(tmp_path: Path) -> None:
    for text, rows in ((OPEN, 2), (FIXED, 10), (ONE, 1)):
        calibration = drawn(parse(text), arrays(tmp_path, 8))
        fit, held = numbers(calibration)
        assert (len(fit), len(held)) == (6, 2)
        assert {len(b.feeds["x"]) for b in calibration.fit} == {rows}


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"samples.npz: 7 samples .* give at least 8"):
        drawn(parse(OPEN), arrays(tmp_path, 7))


def test_first_ones_where_nobody_knows_how_many() -> None:
    given = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, 10**6, 7):
            given.append(start)
            yield {"x": np.arange(start, start + 7, dtype=np.float32)[:, None] + np.zeros(2)}

    source = open_data(lambda: ({"x": f["x"].astype(np.float32)} for f in endless()), parse(OPEN))
    fit, held = numbers(calibration_samples(source, limit=40))
    assert sorted([*fit, *held]) == list(range(40))
    assert len(given) <= 7


def test_samples_of_different_size_share_no_batch() -> None:
    model = parse("net (float[N,2,H] x) => (float[N,2,H] y) { y = Relu(x) }")

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for i in range(24):
            yield {"x": np.full((1, 2, 3 + i % 2), i, np.float32)}

    calibration = calibration_samples(open_data(feeds, model))
    shapes = {b.feeds["x"].shape for b in (*calibration.fit, *calibration.held_out)}
    assert shapes == {(6, 2, 3), (6, 2, 4)}


def test_other_inputs_stay_with_their_samples() -> None:
    model = parse("net (float[N,2] x, float scale) => (float[N,2] y) { y = Mul(x, scale) }")

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for i in range(20):
            yield {"x": np.full((2, 2), i % 2, np.float32), "scale": np.float32(i % 2)}

    calibration = calibration_samples(open_data(feeds, model))
    for batch in (*calibration.fit, *calibration.held_out):
        assert (batch.feeds["x"] == batch.feeds["scale"]).all()


def test_a_model_without_a_batch() -> None:
    model = parse("net (float x) => (float y) { y = Relu(x) }")
    source = open_data(lambda: ({"x": np.float32(i)} for i in range(8)), model)
    calibration = calibration_samples(source)
    assert [float(b.feeds["x"]) for b in calibration.held_out] == [3, 7]
    assert len(calibration.fit) == 6


def test_spread_is_not_deceived_by_what_repeats() -> None:
    chosen = spread(10_000, 1000, np.random.default_rng(0))
    assert len(np.unique(chosen)) == 1000
    assert np.bincount(chosen % 10).min() > 60
    np.testing.assert_array_equal(spread(5, 9, np.random.default_rng(0)), np.arange(5))


def test_real_rows() -> None:
    assert len(real(np.zeros((4, 2)), rows=4, samples=3)) == 3
    assert len(real(np.zeros((12, 2)), rows=4, samples=3)) == 9  # three positions for each row
    assert len(real(np.zeros((5, 2)), rows=4, samples=3)) == 5
    assert real(np.float32(1), rows=4, samples=3) == 1
