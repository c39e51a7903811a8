"""Statistics of layers are those of what the layers read and write."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Array, parse, random_feeds, run

from pwopt import runtime, shapes
from pwopt.calibration import statistics
from pwopt.calibration.statistics import gather
from pwopt.data import Batch
from pwopt.errors import ModelError
from pwopt.linear import Linear, linear
from pwopt.lowrank.moments import Moments
from pwopt.model import Model

NET = """
    net (float[N,4,6,6] x) => (float[N,3] y)
    <float[8,4,3,3] w, float[8] b, float[8,8,1,1] v, float[6,8,3,3] u, float[6,3] m, float[3] c>
    {
        a = Conv<pads = [1,1,1,1]>(x, w, b)
        p = Conv(a, v)
        q = Conv(a, u)
        g = GlobalAveragePool(q)
        f = Flatten(g)
        y = Gemm(f, m, c)
    }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layers(model: Model) -> list[Linear]:
    known = shapes.infer(model, shapes.bind(model))
    found = (linear(node, known) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def feed(model: Model, *sizes: int) -> list[Batch]:
    return [
        Batch(random_feeds(model, batch=size, seed=seed), None, size)
        for seed, size in enumerate(sizes)
    ]


def rows_of(model: Model, name: str, axis: int, batches: Sequence[Batch]) -> Array:
    """Compute all rows of a tensor, by the reference the tests have."""
    proto = model.to_proto()
    del proto.graph.output[:]
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    proto.graph.output.append(info)
    rows = []
    for batch in batches:
        (array,) = run(proto, batch.feeds) if name != "x" else (batch.feeds["x"],)
        array = np.moveaxis(array[: batch.samples], axis, -1)
        rows.append(array.reshape(-1, array.shape[-1]))
    return np.concatenate(rows)


def assert_same(ours: Moments, rows: Array) -> None:
    theirs = Moments.of(rows)
    assert ours.count == theirs.count
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-4, atol=1e-5)


def assert_right(model: Model, batches: Sequence[Batch]) -> None:
    """Check statistics of all positions, of which there are few enough."""
    before = model.to_proto()
    found = gather(model, layers(model), batches)
    assert [*found] == ["a", "p", "q", "y"]
    for layer in layers(model):
        axis = layer.channel_axis
        assert_same(found[layer.where].outputs, rows_of(model, layer.where, axis, batches))
        if layer.is_pointwise:
            assert found[layer.where].inputs is None
        else:
            ours = found[layer.where].inputs
            assert ours is not None
            assert_same(ours, rows_of(model, layer.node.inputs[0].name, axis, batches))
    assert model.to_proto() == before


def test_moments_of_inputs_and_outputs() -> None:
    model = parse(NET)
    assert_right(model, feed(model, 3, 3, 2))


@pytest.mark.parametrize("budget", [1, 2000, 10_000])
def test_runs_are_cut_to_the_memory(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = runtime.run

    def spy(session: object, feeds: dict[str, Array], *, name: str) -> dict[str, Array]:
        outputs = original(session, feeds, name=name)  # type: ignore[arg-type]
        sizes.append(sum(array.nbytes for array in outputs.values()))
        return outputs

    monkeypatch.setattr(statistics, "TAPS", budget)
    monkeypatch.setattr(runtime, "run", spy)
    model = parse(NET)
    assert_right(model, feed(model, 3, 2))
    assert max(sizes) <= max(budget, 8 * 6 * 6 * 4)  # a sample of the largest tensor at least
    monkeypatch.setattr(statistics, "TAPS", 1 << 30)
    sizes.clear()
    assert_right(model, feed(model, 3, 2))
    assert len(sizes) == 2


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_fixed_batch_and_rows_that_fill_it_up(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TAPS", budget)
    model = parse(NET.replace("[N,", "[4,"))
    batches = feed(model, 4, 4)
    batches[1].feeds["x"][2:] = 1e6
    assert_right(model, [batches[0], Batch(batches[1].feeds, None, 2)])


def test_positions_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "POSITIONS", 20)
    monkeypatch.setattr(statistics, "ROWS_PER_CHANNEL", 30)
    model = parse(NET.replace("6,6]", "32,32]"))
    batches = feed(model, 4, 4)
    # Stripes of the width of one column would deceive a sampling of every n-th position.
    for batch in batches:
        batch.feeds["x"][:, 0] = np.arange(32) % 8
    found = gather(model, layers(model), batches)
    inputs, outputs = found["a"].inputs, found["a"].outputs
    assert inputs is not None
    assert inputs.count == 8 * 20
    assert outputs.count == 8 * 30  # 30 rows for each of 8 channels, from 8 samples
    assert inputs.mean[0] == pytest.approx(3.5, abs=0.6)
    assert inputs.covariance[0, 0] == pytest.approx(5.25, rel=0.3)


def test_a_number_too_large_is_named() -> None:
    model = parse(NET)
    batches = feed(model, 2)
    batches[0].feeds["x"][:] = 3e38
    with pytest.raises(ModelError, match="layer 'a' writes NaN or infinite values"):
        gather(model, layers(model), batches)


def test_progress_ends_at_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TAPS", 1)
    model = parse(NET)
    told: list[tuple[str, int, int | None]] = []
    gather(model, layers(model), feed(model, 3, 2), progress=lambda *args: told.append(args))
    assert told[-1] == ("statistics", 5, 5)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_no_layers() -> None:
    model = parse(NET)
    assert gather(model, [], feed(model, 2)) == {}


# -- cache ------------------------------------------------------------------------------------


class Runs:
    """Counts runs of onnxruntime."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = runtime.run

        def counted(*args: object, **kwargs: object) -> dict[str, Array]:
            self.count += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(runtime, "run", counted)


def assert_equal(one: Moments | None, other: Moments | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.count == other.count
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.scatter, other.scatter)


def test_the_second_time_comes_from_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(NET)
    first = gather(model, layers(model), feed(model, 3))
    assert len(list(folder.rglob("*.npz"))) == 1
    runs = Runs(monkeypatch)
    again = parse(NET)
    second = gather(again, layers(again), feed(again, 3))
    assert not runs.count
    assert [*second] == [*first]
    for where, statistic in first.items():
        assert_equal(second[where].inputs, statistic.inputs)
        assert_equal(second[where].outputs, statistic.outputs)


def test_another_model_other_samples_or_layers_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parse(NET)
    gather(model, layers(model), feed(model, 3))
    runs = Runs(monkeypatch)
    other = parse(NET, seed=1)
    gather(other, layers(other), feed(other, 3))
    assert runs.count == 1
    gather(model, layers(model), [Batch(random_feeds(model, batch=3, seed=9), None, 3)])
    assert runs.count == 2
    gather(model, layers(model), [Batch(b.feeds, None, 2) for b in feed(model, 3)])
    assert runs.count == 3
    gather(model, layers(model)[:2], feed(model, 3))
    assert runs.count == 4


def test_external_weights_are_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for seed in (0, 1):
        path = tmp_path / str(seed) / "net.onnx"
        path.parent.mkdir()
        proto = parse(NET, seed=seed).to_proto()
        onnx.save(proto, path, save_as_external_data=True, location="w", size_threshold=0)
        models.append(Model.load(path))
    runs = Runs(monkeypatch)
    for model in (*models, *models):
        gather(model, layers(model), feed(model, 2))
    assert runs.count == 2


def test_a_corrupt_file_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(NET)
    gather(model, layers(model), feed(model, 2))
    (file,) = folder.rglob("*.npz")
    whole = file.read_bytes()
    runs = Runs(monkeypatch)
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        file.write_bytes(content)
        runs.count = 0
        gather(model, layers(model), feed(model, 2))
        assert runs.count == 1
        assert file.stat().st_size == len(whole)
