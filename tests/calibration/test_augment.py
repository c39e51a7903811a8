"""Copies of images are shifted and mirrored, or mixed; what is no image is left alone."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers import ASSETS, needs_assets, parse

from pwopt import runtime
from pwopt.calibration.augment import (
    JUDGED_COPIES,
    KEPT,
    Layout,
    is_image,
    mixed,
    prepare,
    shifted,
)
from pwopt.data import Batch, Samples, open_data
from pwopt.model import Model
from pwopt.shapes import Input

REACH = 1 / 8

FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (("N", 3, 32, 32), "NCHW"),
        ((1, 1, 16, 16), "NCHW"),
        ((8, 4, None, "W"), "NCHW"),
        (("N", 224, 224, 3), "NHWC"),
        ((None, "H", "W", 1), "NHWC"),
        (("N", 2, 32, 32), None),
        (("N", 3, 15, 32), None),
        (("N", 32, 15, 3), None),
        (("N", 64, 64, 64), None),
        (("N", "C", "H", "W"), None),
        (("N", 3, 32), None),
        (("N", 3, 8, 32, 32), None),
    ],
)
def test_what_looks_like_images(shape: tuple[int | str | None, ...], layout: Layout | None) -> None:
    assert is_image(Input("x", FLOAT, shape)) == layout
    assert is_image(Input("x", np.dtype(np.float16), shape)) == layout
    assert is_image(Input("x", BYTE, shape)) is None


def images(count: int, height: int = 16, width: int = 32) -> np.ndarray:
    """Make images [count, 3, height, width] without zeros, no two values alike."""
    size = (count, 3, height, width)
    return np.arange(1, np.prod(size) + 1, dtype=np.float32).reshape(size)


def batch(count: int) -> Batch:
    return Batch({"x": images(count)}, np.arange(count), count)


def movement(before: np.ndarray, after: np.ndarray) -> tuple[int, int, bool]:
    """Return how far down and right an image (C, H, W) was moved, and whether it was mirrored.

    Fails where it is not the image moved, with zeros around.
    """
    rows, columns = after.any(axis=(0, 2)).nonzero()[0], after.any(axis=(0, 1)).nonzero()[0]
    kept = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert kept.all()
    mirrored = bool(kept[0, 0, 0] > kept[0, 0, 1])
    image = kept[..., ::-1] if mirrored else kept
    channel, top, left = (int(i[0]) for i in (before == image[0, 0, 0]).nonzero())
    assert channel == 0
    height, width = image.shape[1:]
    np.testing.assert_array_equal(before[:, top : top + height, left : left + width], image)
    # What is missing is missing on one side, and lies beyond the border there.
    sides = [(rows, top, height, before.shape[1])]
    start = before.shape[2] - left - width if mirrored else left
    sides += [(columns, start, width, before.shape[2])]
    shifts = []
    for place, first, size, whole in sides:
        assert size == whole - max(int(place[0]), first)
        assert 0 in (int(place[0]), first)
        shifts.append(int(place[0]) - first)
    return shifts[0], shifts[1], mirrored


def test_each_image_is_moved_on_its_own() -> None:
    source = batch(400)
    (copy,) = shifted([source], seed=0, reach=REACH)
    moves = [movement(*pair) for pair in zip(source.feeds["x"], copy.feeds["x"], strict=True)]
    down, right, mirrored = map(np.array, zip(*moves, strict=True))
    np.testing.assert_array_equal(np.unique(down), np.arange(-2, 3))  # an eighth of 16
    np.testing.assert_array_equal(np.unique(right), np.arange(-4, 5))  # an eighth of 32
    assert np.bincount(down + 2).min() > 50  # of 80
    assert np.bincount(right + 4).min() > 25  # of 44
    assert 150 < mirrored.sum() < 250
    assert len(set(moves)) > 80  # of 90, so the three are independent


def test_reach() -> None:
    source = batch(100)
    (copy,) = shifted([source], seed=0, reach=0)
    for pair in zip(source.feeds["x"], copy.feeds["x"], strict=True):
        assert movement(*pair)[:2] == (0, 0)
    (copy,) = shifted([source], seed=0, reach=0.5)
    moves = [movement(*pair) for pair in zip(source.feeds["x"], copy.feeds["x"], strict=True)]
    assert {abs(down) for down, *_ in moves} == set(range(9))


def test_channels_last_and_first_are_moved_alike() -> None:
    first = batch(8)
    last = Batch({"x": np.ascontiguousarray(images(8).transpose(0, 2, 3, 1))}, None, 8)
    (a,), (b,) = (shifted([source], seed=3, reach=REACH) for source in (first, last))
    assert b.feeds["x"].flags.c_contiguous
    np.testing.assert_array_equal(a.feeds["x"], b.feeds["x"].transpose(0, 3, 1, 2))


def test_several_images_of_a_sample_are_moved_alike() -> None:
    x = images(20)
    (copy,) = shifted([Batch({"left": x, "right": -x}, None, 20)], seed=0, reach=REACH)
    np.testing.assert_array_equal(copy.feeds["left"], -copy.feeds["right"])


def test_all_else_is_kept() -> None:
    table, style = np.ones((4, 7), np.float32), images(1)
    feeds = {"x": images(4).astype(np.float16), "table": table, "style": style}
    source = Batch(feeds, np.array([5, 6, 7]), 3)  # the last row only fills it up
    (copy,) = shifted([source], seed=0, reach=REACH)
    assert copy.samples == 3
    assert copy.labels is source.labels
    assert copy.feeds["table"] is table
    assert copy.feeds["style"] is style  # one for all samples
    assert copy.feeds["x"].dtype == np.float16
    np.testing.assert_array_equal(copy.feeds["x"][3], feeds["x"][3])
    assert not np.array_equal(copy.feeds["x"][:3], feeds["x"][:3])
    np.testing.assert_array_equal(feeds["x"], images(4).astype(np.float16))


def test_copies_differ_and_are_the_same_every_time() -> None:
    source = [batch(5), batch(3)]
    copies = shifted(source, seed=1, reach=REACH)
    assert [copy.samples for copy in copies] == [5, 3]
    for one, other in zip(copies, shifted(source, seed=1, reach=REACH), strict=True):
        np.testing.assert_array_equal(one.feeds["x"], other.feeds["x"])
    assert not np.array_equal(
        copies[0].feeds["x"], shifted(source, seed=2, reach=REACH)[0].feeds["x"]
    )


def test_no_copies_without_images() -> None:
    table = Batch({"x": np.ones((4, 7), np.float32)}, None, 4)
    assert shifted([table], seed=0, reach=REACH) == []
    assert len(shifted([table, batch(2)], seed=0, reach=REACH)) == 1


# -- mixed ------------------------------------------------------------------------------------


def numbered(count: int, size: int = 16, start: int = 0) -> Batch:
    """Make a batch of images of one colour each, which is 1 for sample 0, 10 for sample 1, ..."""
    numbers = 10.0 ** np.arange(start, start + count)
    x = np.broadcast_to(numbers[:, None, None, None], (count, 3, size, size)).copy()
    return Batch({"x": x}, np.arange(start, start + count), count)


def partners(batches: Sequence[Batch], turn: int) -> list[int]:
    """Tell which sample each was mixed with: with 0.8 of its own colour stands 0.2 of that one."""
    found = []
    for source, copy in zip(batches, mixed(batches, turn=turn), strict=True):
        for one, result in zip(source.feeds["x"], copy.feeds["x"], strict=True):
            (rest,) = np.unique((result - KEPT * one) / (1 - KEPT))
            number = int(np.log10(rest).round())
            assert rest == pytest.approx(10.0**number)
            found.append(number)
    return found


def test_each_image_is_mixed_with_another_one_every_turn() -> None:
    batches = [numbered(3), numbered(3, start=3), numbered(1, start=6)]
    assert partners(batches, 0) == [1, 2, 3, 4, 5, 6, 0]
    assert partners(batches, 2) == [3, 4, 5, 6, 0, 1, 2]
    assert partners(batches, 5) == [6, 0, 1, 2, 3, 4, 5]
    assert partners(batches, 6) == partners(batches, 0)  # not with itself


@pytest.mark.parametrize("turn", range(4))
def test_few_images_are_never_mixed_with_themselves(turn: int) -> None:
    assert partners([numbered(2)], turn) == [1, 0]
    assert partners([numbered(1), numbered(1, start=1)], turn) == [1, 0]


def test_images_are_mixed_with_those_of_their_size() -> None:
    batches = [numbered(2), numbered(1, 20, start=2), numbered(1, start=3), numbered(1, 24, 4)]
    copies = mixed(batches, turn=0)
    assert partners([batches[0], batches[2]], 0) == [1, 3, 0]
    for copy, expected in zip(copies[::2], mixed([batches[0], batches[2]], turn=0), strict=False):
        np.testing.assert_array_equal(copy.feeds["x"], expected.feeds["x"])
    for copy, alone in zip(copies[1::2], batches[1::2], strict=True):
        np.testing.assert_allclose(copy.feeds["x"], alone.feeds["x"])


def test_several_images_of_a_sample_are_mixed_alike() -> None:
    x = images(5)
    last = np.ascontiguousarray(-x.transpose(0, 2, 3, 1))
    (copy,) = mixed([Batch({"left": x, "right": last}, None, 5)], turn=1)
    np.testing.assert_array_equal(copy.feeds["left"], -copy.feeds["right"].transpose(0, 3, 1, 2))
    np.testing.assert_allclose(copy.feeds["left"], 0.8 * x + 0.2 * x[[2, 3, 4, 0, 1]], rtol=1e-5)


def test_all_else_is_kept_of_what_is_mixed() -> None:
    table, style = np.ones((4, 7), np.float32), images(1)
    feeds = {"x": images(4).astype(np.float16), "table": table, "style": style}
    source = Batch(feeds, np.array([5, 6, 7]), 3)  # the last row only fills it up
    (copy,) = mixed([source], turn=1)
    assert copy.samples == 3
    assert copy.labels is source.labels
    assert copy.feeds["table"] is table
    assert copy.feeds["style"] is style  # one for all samples
    x, result = feeds["x"], copy.feeds["x"]
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result[3], x[3])
    np.testing.assert_allclose(result[:3], 0.8 * x[:3] + 0.2 * x[[2, 0, 1]], rtol=2e-3)
    np.testing.assert_array_equal(x, images(4).astype(np.float16))


def test_nothing_is_mixed_without_images() -> None:
    table = Batch({"x": np.ones((4, 7), np.float32)}, None, 4)
    assert mixed([table], turn=0) == []
    assert len(mixed([table, batch(2)], turn=0)) == 1


# -- which of them serves for what ------------------------------------------------------------

IMAGES = parse("net (float[N,3,16,16] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }")


def source(tmp_path: Path, model: Model, x: np.ndarray, **arrays: np.ndarray) -> Samples:
    path = tmp_path / "data.npz"
    np.savez(path, x=x, **arrays)
    return open_data(path, model)


def plain(count: int) -> np.ndarray:
    """Make images [count, 3, 16, 16] of one colour each, from 1 on."""
    numbers = np.arange(1, count + 1, dtype=np.float32)
    return np.broadcast_to(numbers[:, None, None, None], (count, 3, 16, 16)).copy()


def colours(batches: Sequence[Batch]) -> list[int]:
    """Tell which of the plain images these are, though shifted."""
    return [int(image.max()) for batch in batches for image in batch.feeds["x"]]


def raw(groups: Sequence[Sequence[Batch]]) -> set[bytes]:
    return {b"".join(batch.feeds["x"].tobytes() for batch in group) for group in groups}


def test_copies_follow_their_originals_and_labels(tmp_path: Path) -> None:
    labels = np.arange(1, 41)
    ready = prepare(source(tmp_path, IMAGES, plain(40), labels=labels))
    fitted, judged = colours(ready.fit), colours(ready.judged[0])
    assert sorted({*fitted, *judged}) == list(labels)
    assert not {*fitted} & {*judged}
    assert sorted(fitted) == sorted(2 * [*{*fitted}])  # each as it is and shifted
    half = len(ready.fit) // 2
    assert all((batch.feeds["x"] > 0).all() for batch in ready.fit[:half])
    assert any((batch.feeds["x"] == 0).any() for batch in ready.fit[half:])
    assert len(ready.judged) == 1 + JUDGED_COPIES
    for group in (ready.tried, *ready.judged):
        assert [*np.concatenate([batch.labels for batch in group])] == judged
    for group in (ready.tried, *ready.judged[1:]):
        others = []
        for image, own in zip((i for b in group for i in b.feeds["x"]), judged, strict=True):
            (colour,) = np.unique(image)
            others.append(round(5 * (float(colour) - 0.8 * own)))
        assert sorted(others) == sorted(judged)  # held out, too
        assert all(other != own for other, own in zip(others, judged, strict=True))


def test_every_copy_is_another(tmp_path: Path) -> None:
    ready = prepare(source(tmp_path, IMAGES, plain(64)))
    assert len(raw([ready.tried, *ready.judged])) == 2 + JUDGED_COPIES


def test_a_model_that_takes_one_image_is_judged_on_mixed_ones(tmp_path: Path) -> None:
    one = parse("net (float[1,3,16,16] x) => (float[1,3,1,1] y) { y = GlobalAveragePool(x) }")
    ready = prepare(source(tmp_path, one, plain(40)))
    assert {batch.samples for group in ready.judged for batch in group} == {1}
    assert len(raw([ready.tried, *ready.judged])) == 2 + JUDGED_COPIES


def test_the_seed_is_that_of_the_shifts(tmp_path: Path) -> None:
    samples = source(tmp_path, IMAGES, plain(24))
    first, again, other = (prepare(samples, seed=seed) for seed in (0, 0, 9))
    assert raw([first.fit]) == raw([again.fit]) != raw([other.fit])
    held_out = [raw([ready.tried, *ready.judged]) for ready in (first, again, other)]
    assert held_out[0] == held_out[1] == held_out[2]


def test_samples_beyond_the_limit_are_left_out(tmp_path: Path) -> None:
    ready = prepare(source(tmp_path, IMAGES, plain(40)), limit=16)
    assert len({*colours(ready.fit), *colours(ready.judged[0])}) == 16


def test_without_images_there_are_only_the_samples(tmp_path: Path) -> None:
    model = parse("net (float[N,7] x) => (float[N,7] y) { y = Softmax<axis = 1>(x) }")
    ready = prepare(source(tmp_path, model, np.ones((32, 7), np.float32)))
    assert sum(batch.samples for batch in ready.fit) == 24
    assert [sum(batch.samples for batch in group) for group in ready.judged] == [8]
    assert ready.tried == ready.judged[0]


@needs_assets
def test_a_network_errs_on_copies_of_what_it_was_trained_on() -> None:
    right: dict[str, list[float]] = {}
    for name in ("vgg16_cifar10", "resnet56_cifar10"):
        model = Model.load(ASSETS / f"models/{name}.onnx")
        source = open_data(ASSETS / "data/cifar10_calib.npz", model, preprocess="unit", batch=128)
        batches = [*islice(source, 2)]
        copies = shifted(batches, seed=0, reach=REACH), mixed(batches, turn=0)
        right[name] = [accuracy(model, group) for group in (batches, *copies)]
    for as_it_is, _, with_another in right.values():
        assert as_it_is == 1.0
        assert 0.95 < with_another < 1.0
    assert 0.88 < right["vgg16_cifar10"][1] < 0.96  # 0.92 of unseen images
    assert right["resnet56_cifar10"][1] == 1.0  # it was trained on such


def accuracy(model: Model, batches: Sequence[Batch]) -> float:
    session, right = runtime.session(model), []
    for batch in batches:
        (logits,) = runtime.run(session, batch.feeds, name=model.name).values()
        right.append(logits.argmax(1) == batch.labels)
    return float(np.mean(right))
