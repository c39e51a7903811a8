import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import torch

from pwopt.calibration import held_out
from pwopt.data import Batch, Samples, open_data
from pwopt.errors import DataError
from pwopt.learn import batches as batches_module
from pwopt.learn.augment import augment
from pwopt.learn.batches import Batches, TrainingBatch, batches_of, tensors
from pwopt.model import Model

COUNT = 50


def model(inputs: str = "float[N, 1] x") -> Model:
    return Model(
        parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g ({inputs}) => (float y) {{ y = Constant <value = float {{1.0}}> () }}"""
        )
    )


def numbered(count: int = COUNT, width: int = 1) -> np.ndarray:
    """Each sample holds its number."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, None], width, axis=1)


def taken(tmp_path: Path, count: int = COUNT, inputs: str = "float[N, 1] x") -> Samples:
    path = tmp_path / f"{count}.npz"
    np.savez(path, x=numbered(count), labels=np.arange(count))
    return open_data(path, model(inputs))


def streamed(count: int = COUNT, inputs: str = "float[N, 1] x", rows: int = 4) -> Samples:
    def feeds() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        x = numbered(count)
        for start in range(0, count, rows):
            yield {"x": x[start : start + rows]}, np.arange(count)[start : start + rows]

    return open_data(feeds, model(inputs))


@pytest.fixture(params=["taken", "streamed"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Samples]:
    return streamed if request.param == "streamed" else lambda *args: taken(tmp_path, *args)


def first(batches: Batches, count: int, step: int = 0) -> list[TrainingBatch]:
    return list(islice(batches.from_step(step), count))


def numbers(batches: list[TrainingBatch]) -> list[list[float]]:
    for batch in batches:
        assert batch.labels is not None
        assert batch.feeds["x"][:, 0].tolist() == batch.labels.tolist()
    return [batch.feeds["x"][:, 0].tolist() for batch in batches]


def test_a_batch_depends_on_seed_and_number_alone(source: Callable[..., Samples]) -> None:
    def noisy(batch: Batch, rng: np.random.Generator) -> Batch:
        x = batch.feeds["x"]
        return Batch({"x": x + rng.random(x.shape).astype(x.dtype)}, batch.labels, batch.samples)

    def drawn(count: int, step: int, seed: int, workers: int) -> list[Any]:
        batches = Batches(source(), 8, seed=seed, workers=workers, augment=noisy)
        return [batch.feeds["x"].tolist() for batch in first(batches, count, step)]

    whole = drawn(20, 0, seed=1, workers=1)
    assert drawn(20, 0, seed=1, workers=3) == whole
    assert drawn(7, 13, seed=1, workers=2) == whole[13:]
    assert drawn(20, 0, seed=2, workers=1) != whole


def test_an_epoch_has_every_sample_once_in_another_order(tmp_path: Path) -> None:
    batches = Batches(taken(tmp_path), 20)
    assert batches.count == COUNT
    drawn = np.concatenate(numbers(first(batches, 5)))
    one, other = drawn[:COUNT], drawn[COUNT:]
    assert sorted(one) == sorted(other) == list(range(COUNT))
    assert one.tolist() != other.tolist()
    assert one.tolist() != list(range(COUNT))


def test_a_batch_may_be_larger_than_the_source(tmp_path: Path) -> None:
    (batch,) = numbers(first(Batches(taken(tmp_path, 8), 20), 1))
    assert sorted(batch[:8]) == sorted(batch[8:16]) == list(range(8))


def test_a_stream_is_mixed_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "WAITING", 10)
    batches = Batches(streamed(), 5)
    assert batches.count is None
    drawn = np.concatenate(numbers(first(batches, 40)))
    counts = np.bincount(drawn.astype(int), minlength=COUNT)
    assert counts.min() >= 2
    assert drawn[:20].tolist() != sorted(drawn[:20])
    assert drawn[:5].max() < 20  # far less waits than there is


def test_samples_that_wait_are_few_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "WAITING_BYTES", 3)
    drawn = np.concatenate(numbers(first(Batches(streamed(), 5), 4)))
    assert drawn.tolist() == list(range(20))


def test_processes_share_a_large_batch(source: Callable[..., Samples]) -> None:
    large = numbers(first(Batches(source(), 12), 6))
    parts = [
        numbers(first(Batches(source(), 4, process=process, processes=3), 6))
        for process in range(3)
    ]
    assert np.hstack(parts).tolist() == large


def test_processes_augment_by_themselves(tmp_path: Path) -> None:
    def drawn(process: int) -> list[float]:
        def draw(batch: Batch, rng: np.random.Generator) -> Batch:
            return Batch({"x": rng.random((4, 1))}, None, 4)

        batches = Batches(taken(tmp_path), 4, process=process, processes=2, augment=draw)
        return [value for batch in first(batches, 3) for value in batch.feeds["x"][:, 0].tolist()]

    assert not set(drawn(0)) & set(drawn(1))


def test_held_out_samples_are_judged_by_and_not_learnt(source: Callable[..., Samples]) -> None:
    samples = source()
    left_out = held_out(samples)
    judged = list(batches_of(samples, left_out, 5))
    found = [int(x) for batch in judged for x in batch.feeds["x"][:, 0]]
    assert found == [n for n in left_out if n < COUNT]
    assert 0 < len(found) <= COUNT / 4
    learnt = np.concatenate(numbers(first(Batches(samples, 10, leave_out=left_out), 50)))
    assert set(learnt) == set(range(COUNT)) - set(found)


@pytest.mark.parametrize(
    ("count", "expected"), [(8, 2), (100, 25), (500, 64), (2000, 250), (45_000, 1024)]
)
def test_held_out_samples_are_spread_evenly(tmp_path: Path, count: int, expected: int) -> None:
    chosen = np.array(held_out(taken(tmp_path, count)))
    assert len(chosen) == expected
    np.testing.assert_allclose(chosen, (np.arange(expected) + 0.5) * count / expected, atol=32)


def test_held_out_of_a_stream_is_every_eighth_of_its_start() -> None:
    chosen = held_out(streamed())
    assert list(chosen)[:3] == [7, 15, 23]
    assert len(chosen) == 1024


def test_the_batch_is_the_one_that_the_model_demands(source: Callable[..., Samples]) -> None:
    samples = source(COUNT, "float[4, 1] x")
    batches = Batches(samples, 32)
    assert batches.size == 4
    assert all(batch.feeds["x"].shape == (4, 1) for batch in first(batches, 15))
    judged = list(batches_of(samples, range(0, 12, 2), 32))
    assert [batch.samples for batch in judged] == [4, 2]
    assert [batch.feeds["x"].shape for batch in judged] == [(4, 1)] * 2


def test_a_model_without_a_batch_axis_takes_one_sample_at_a_time() -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for number in range(3):
            yield {"x": np.float32(number)}

    batches = Batches(open_data(feeds, model("float x")), 32)
    assert batches.size == 1
    assert {float(batch.feeds["x"]) for batch in first(batches, 12)} <= {0.0, 1.0, 2.0}


def test_images_are_augmented(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    samples = open_data(tmp_path / "images.npz", model("float[N, 3, 16, 16] x"), preprocess="unit")
    (plain,), (moved,) = (
        first(Batches(samples, 12, augment=augmented), 1) for augmented in (None, augment)
    )
    assert moved.feeds["x"].shape == plain.feeds["x"].shape == (12, 3, 16, 16)
    assert moved.feeds["x"].dtype == torch.float32
    assert moved.labels is None
    assert not torch.equal(moved.feeds["x"], plain.feeds["x"])


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pwopt-batches")]


def test_closing_ends_the_workers(source: Callable[..., Samples]) -> None:
    running = Batches(source(), 4).from_step(0)
    next(running)
    assert alive()
    running.close()
    assert not alive()


def test_what_is_wrong_with_a_sample_is_told_where_batches_are_taken(tmp_path: Path) -> None:
    x = numbered()
    x[33] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    samples = open_data(tmp_path / "nan.npz", model())
    with pytest.raises(DataError, match=r"nan.npz: 'x' holds NaN"):
        first(Batches(samples, 5), 10)
    first(Batches(samples, 5, leave_out=[33]), 20)
    assert not alive()

    def broken() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": numbered(4)}
        raise KeyError("lost")

    with pytest.raises(DataError, match=r"broken: failed \(KeyError: 'lost'\)"):
        first(Batches(open_data(broken, model()), 2), 10)


def test_a_reader_that_cannot_rewind_is_told_about() -> None:
    class Reader:
        left = 20

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"x": np.full((1, 1), self.left, np.float32)} if self.left >= 0 else None

    with pytest.raises(DataError, match=r"Reader: .* has no rewind\(\); add one"):
        first(Batches(open_data(Reader(), model()), 4), 10)


def test_samples_of_other_shapes_cannot_share_a_batch_but_come_alone() -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for width in (2, 3) * 10:
            yield {"x": np.ones((1, width), np.float32)}

    samples = open_data(feeds, model("float[N, W] x"))
    with pytest.raises(DataError, match=r"feeds: samples of one batch differ in shape: 'x'"):
        first(Batches(samples, 16), 1)
    widths = {batch.feeds["x"].shape[1] for batch in first(Batches(samples, 1), 20)}
    assert widths == {2, 3}


def test_too_few_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"7.npz: 7 samples are too few to learn from"):
        held_out(taken(tmp_path, 7))
    with pytest.raises(DataError, match=r"8.npz: has no samples left"):
        Batches(taken(tmp_path, 8), 4, leave_out=range(8))
    with pytest.raises(DataError, match="has no samples left to learn from"):
        first(Batches(streamed(8), 4, leave_out=range(8)), 1)
    short = streamed(7)
    with pytest.raises(DataError, match="too few samples to hold some out"):
        list(batches_of(short, held_out(short), 4))


def test_tensors() -> None:
    pixels = np.arange(3, dtype=np.uint8)
    pixels.flags.writeable = False
    batch = tensors(Batch({"x": pixels, "z": np.array(2.0)}, np.array([4, 5, 6]), 3))
    assert batch.feeds["x"].tolist() == [0, 1, 2]
    assert batch.feeds["z"].shape == ()
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64
    with pytest.raises(DataError, match=r"input 'e' takes <U1, of which torch has no tensors"):
        tensors(Batch({"e": np.array(["a"])}, None, 1))
