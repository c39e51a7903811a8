"""Copies of images are shifted and mirrored; what is no image is left alone."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers import ASSETS, needs_assets, parse, random_feeds

from pwopt import runtime
from pwopt.calibration.augment import (
    FAR,
    JUDGED_COPIES,
    NEAR,
    Layout,
    is_image,
    prepare,
    shifted,
    unsure_reach,
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


# -- how far, and which -----------------------------------------------------------------------

CLASSIFIER = """
    net (float[N,3,16,16] x) => (float[N,2] y) <float[2,3] w, float[2] b>
    { g = GlobalAveragePool(x)  f = Flatten(g)  y = Gemm<transB = 1>(f, w, b) }
"""


def classifier(slope: float, bright: float) -> Model:
    """Make a network that is sure of images that are brighter than `bright` on average."""
    weight = np.array([[slope, 0, 0], [0, 0, 0]])
    return parse(CLASSIFIER, {"w": weight, "b": np.array([-slope * bright, 0])})


def white(count: int, size: int = 16) -> Batch:
    return Batch({"x": np.ones((count, 3, size, size), np.float32)}, None, count)


@pytest.mark.parametrize(
    ("bright", "reach"),
    [
        (1.00, 1 / 32),  # unsure of all of them, moved or not
        (0.93, 1 / 16),  # a pixel of zeros makes it unsure
        (0.82, 1 / 8),
        (0.70, 1 / 4),
        (0.10, 1 / 4),  # sure of everything
    ],
)
def test_images_are_shifted_until_the_network_is_unsure(bright: float, reach: float) -> None:
    assert unsure_reach(classifier(100, bright), [white(64), white(64)]) == reach


def test_rows_that_only_fill_up_a_batch_do_not_make_it_sure() -> None:
    model = classifier(40, 0.99)
    white_and_dark = np.concatenate([np.ones((2, 3, 16, 16)), np.full((254, 3, 16, 16), -9)])
    filled = Batch({"x": white_and_dark.astype(np.float32)}, None, 2)
    assert unsure_reach(model, [filled]) == 1 / 32


@pytest.mark.parametrize(
    "text",
    [
        "net (float[N,3,16,16] x) => (float[N,3,16,16] y) { y = Identity(x) }",  # no classes
        "net (float[N,7] x) => (float[N,7] y) { y = Softmax<axis = 1>(x) }",  # no images
    ],
)
def test_where_nothing_tells_they_are_shifted_least(text: str) -> None:
    model = parse(text)
    rows = random_feeds(model, batch=8)
    assert unsure_reach(model, [Batch(rows, None, 8)]) == min(NEAR)


def source(tmp_path: Path, model: Model, x: np.ndarray, **arrays: np.ndarray) -> Samples:
    path = tmp_path / "data.npz"
    np.savez(path, x=x, **arrays)
    return open_data(path, model)


def numbered(count: int) -> np.ndarray:
    """Make images [count, 3, 16, 16] of one colour each, from 1 on."""
    numbers = np.arange(1, count + 1, dtype=np.float32)
    return np.broadcast_to(numbers[:, None, None, None], (count, 3, 16, 16)).copy()


def colours(batches: Sequence[Batch]) -> list[int]:
    """Tell which of the numbered images these are, though shifted."""
    return [int(image.max()) for batch in batches for image in batch.feeds["x"]]


def raw(groups: Sequence[Sequence[Batch]]) -> set[bytes]:
    return {b"".join(batch.feeds["x"].tobytes() for batch in group) for group in groups}


def test_copies_follow_their_originals_and_labels(tmp_path: Path) -> None:
    labels = np.arange(1, 41)
    samples = source(tmp_path, classifier(0, 0), numbered(40), labels=labels)
    ready = prepare(classifier(0, 0), samples)
    fitted, judged = colours(ready.fit), colours(ready.judged[0])
    assert sorted({*fitted, *judged}) == list(labels)
    assert not {*fitted} & {*judged}
    assert sorted(fitted) == sorted(2 * [*{*fitted}])  # each as it is and shifted
    half = len(ready.fit) // 2
    assert all((batch.feeds["x"] > 0).all() for batch in ready.fit[:half])
    assert any((batch.feeds["x"] == 0).any() for batch in ready.fit[half:])
    assert len(ready.judged) == 1 + JUDGED_COPIES
    for group in (ready.tried, *ready.judged):
        assert colours(group) == judged
        assert [*np.concatenate([batch.labels for batch in group])] == judged


def edge(batches: Sequence[Batch]) -> int:
    """Count the rows of pixels that the farthest shift leaves black."""
    images = [image for batch in batches for image in batch.feeds["x"]]
    return max(int((image[0] == 0).all(axis=1).sum()) for image in images)


@pytest.mark.parametrize(("model", "pixels"), [(classifier(0, 0), 0), (classifier(99, -9), 4)])
def test_models_are_judged_as_far_out_as_it_takes(
    tmp_path: Path, model: Model, pixels: int
) -> None:
    ready = prepare(model, source(tmp_path, model, numbered(64)))
    assert edge([batch for group in ready.judged for batch in group]) == pixels
    assert edge(ready.fit) == edge(ready.tried) == 16 * FAR


def test_every_copy_is_another(tmp_path: Path) -> None:
    model = classifier(99, -9)
    ready = prepare(model, source(tmp_path, model, numbered(64)))
    as_is, *copies = ready.judged
    assert len(raw([ready.tried, as_is, *copies])) == 2 + JUDGED_COPIES
    assert all((batch.feeds["x"] > 0).all() for batch in as_is)
    for copy in copies:
        assert any((batch.feeds["x"] == 0).any() for batch in copy)


def test_the_same_seed_gives_the_same_copies(tmp_path: Path) -> None:
    model = classifier(99, -9)
    samples = source(tmp_path, model, numbered(24))
    first, again, other = (prepare(model, samples, seed=seed) for seed in (0, 0, 9))
    for drawn in (lambda r: r.judged[1:], lambda r: [r.tried], lambda r: [r.fit]):
        one, same, another = (raw(drawn(ready)) for ready in (first, again, other))
        assert one == same
        assert not one & another
    # What is held out stays, as it is.
    assert raw(first.judged[:1]) == raw(again.judged[:1]) == raw(other.judged[:1])


def test_samples_beyond_the_limit_are_left_out(tmp_path: Path) -> None:
    model = classifier(0, 0)
    ready = prepare(model, source(tmp_path, model, numbered(40)), limit=16)
    assert len({*colours(ready.fit), *colours(ready.judged[0])}) == 16


def test_without_images_there_are_only_the_samples(tmp_path: Path) -> None:
    model = parse("net (float[N,7] x) => (float[N,7] y) { y = Softmax<axis = 1>(x) }")
    ready = prepare(model, source(tmp_path, model, np.ones((32, 7), np.float32)))
    assert sum(batch.samples for batch in ready.fit) == 24
    assert [sum(batch.samples for batch in group) for group in ready.judged] == [8]
    assert ready.tried == ready.judged[0]


@needs_assets
def test_a_network_errs_on_copies_of_what_it_was_trained_on() -> None:
    model = Model.load(ASSETS / "models/vgg16_cifar10.onnx")
    source = open_data(ASSETS / "data/cifar10_calib.npz", model, preprocess="unit", batch=128)
    batches = [*islice(source, 2)]
    session = runtime.session(model)

    def accuracy(batches: list[Batch]) -> float:
        right = []
        for batch in batches:
            (logits,) = runtime.run(session, batch.feeds, name=model.name).values()
            right.append(logits.argmax(1) == batch.labels)
        return float(np.mean(right))

    assert accuracy(batches) == 1.0
    assert 0.88 < accuracy(shifted(batches, seed=0, reach=REACH)) < 0.96  # 0.92 of unseen images
