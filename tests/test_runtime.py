from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import pwopt.model
from pwopt import profiling, runtime
from pwopt.errors import ModelError
from pwopt.model import Model


def build(body: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{body}')
    for name, values in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


def kernel(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def norm(channels: int) -> dict[str, np.ndarray]:
    values = np.linspace(0.5, 1.5, channels, dtype=np.float32)
    return {"scale": values, "shift": values, "mean": values, "var": values}


def residual(channels: int, groups: int = 1) -> Model:
    """Conv, BatchNormalization, Relu, Conv, BatchNormalization, Add, Relu: fused and renamed."""
    conv = f"Conv <pads = [1, 1, 1, 1], group = {groups}>"
    return Model(
        build(
            f"""g (float[N, {channels}, 8, 8] x) => (float[N, {channels}, 8, 8] y) {{
                a = {conv} (x, w)
                b = BatchNormalization (a, scale, shift, mean, var)
                c = Relu (b)
                d = {conv} (c, w)
                e = BatchNormalization (d, scale, shift, mean, var)
                f = Add (e, x)
                y = Relu (f)
            }}""",
            w=kernel(channels, channels // groups, 3, 3),
            **norm(channels),
        )
    )


def feed(channels: int, batch: int = 1) -> dict[str, np.ndarray]:
    return {"x": kernel(batch, channels, 8, 8)}


# -- sessions ---------------------------------------------------------------------------------


def test_session_runs_the_edits_of_a_model() -> None:
    model = residual(4)
    model.graph.nodes[-1].op = "Sigmoid"
    y = runtime.run(runtime.session(model), feed(4), name="m")["y"]
    assert 0 <= y.min() < y.max() <= 1


def test_session_reads_external_weights_of_an_edited_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = residual(4)
    expected = runtime.run(runtime.session(model), feed(4), name="m")["y"]
    onnx.save(model.proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = Model.load(path)
    assert loaded.proto.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    for source in (loaded, path):
        y = runtime.run(runtime.session(source), feed(4), name="m")["y"]
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(("module", "limit"), [(pwopt.model, "PROTOBUF_LIMIT"), (runtime, "LARGE")])
def test_session_of_a_large_model(
    module: ModuleType, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = residual(16)  # its kernels take 9 kB
    del model.proto.graph.output[:]
    model.proto.graph.output.add(name="c")  # of unknown type
    expected = runtime.run(runtime.session(model), feed(16), name="m")["c"]
    monkeypatch.setattr(module, limit, 5_000)
    for _ in range(2):
        y = runtime.run(runtime.session(model), feed(16), name="m")["c"]
        np.testing.assert_array_equal(y, expected)
        assert model.graph.nodes  # and once more with the graph imported


def test_session_finds_weights_beside_a_link_to_the_model(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    store.mkdir()
    links.mkdir()
    model = residual(4)
    onnx.save(
        model.proto, store / "m", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    (links / "m.onnx").symlink_to(store / "m")
    (store / "w.bin").rename(links / "w.bin")
    runtime.run(runtime.session(Model.load(links / "m.onnx")), feed(4), name="m")


def test_session_says_in_one_line_why_a_model_does_not_load() -> None:
    proto = build("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    proto.graph.node[0].op_type = "Rleu"
    with pytest.raises(ModelError, match=r"^g: onnxruntime cannot load it: .*Rleu") as error:
        runtime.session(Model(proto))
    assert "\n" not in str(error.value)


def test_run_says_in_one_line_what_went_wrong() -> None:
    session = runtime.session(residual(4))
    with pytest.raises(ModelError, match=r"^m: onnxruntime cannot run it: .*x") as error:
        runtime.run(session, {"x": kernel(1, 5, 8, 8)}, name="m")
    assert "\n" not in str(error.value)


def test_run_refuses_outputs_that_are_no_tensors() -> None:
    proto = build("g (float[4] x) => (seq(float[4]) y) { y = SequenceConstruct (x) }")
    with pytest.raises(ModelError, match="output 'y' is not a tensor"):
        runtime.run(runtime.session(Model(proto)), {"x": kernel(4)}, name="m")


# -- latency ----------------------------------------------------------------------------------


def test_interleave_measures_every_session_in_every_round() -> None:
    sessions = [runtime.session(residual(c)) for c in (4, 4, 4)]
    timing = runtime.interleave(sessions, feed(4), seconds=0, min_rounds=5)
    assert timing.samples_ms.shape == (5, 3)
    assert (timing.samples_ms > 0).all()
    assert timing.median_ms == tuple(np.median(timing.samples_ms, axis=0))


def test_interleave_stops_at_max_rounds() -> None:
    timing = runtime.interleave([runtime.session(residual(4))], feed(4), seconds=60, max_rounds=9)
    assert timing.samples_ms.shape == (9, 1)


class Clocked:
    """A session whose runs take a second each, on clocks that nothing else moves."""

    def __init__(self, threads: int, clocks: dict[str, float], busy: float) -> None:
        self._options = runtime.session(residual(4), threads=threads).get_session_options()
        self._clocks = clocks
        self._busy = busy

    def get_session_options(self) -> object:
        return self._options

    def run(self, *_: object) -> None:
        self._clocks["thread"] += self._busy
        self._clocks["wall"] += 1


@pytest.mark.parametrize(
    ("threads", "expected"),
    [((1, 1), (250, 500)), ((1,), (250,)), ((2, 2), (1000, 1000)), ((1, 2), (1000, 1000))],
)
def test_sessions_of_one_thread_are_timed_by_processor_time(
    monkeypatch: pytest.MonkeyPatch, threads: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    """What others had the processor for does not count; if one has more threads, it does in all."""
    clocks = {"thread": 0.0, "wall": 0.0}
    clock = SimpleNamespace(
        thread_time=lambda: clocks["thread"], perf_counter=lambda: clocks["wall"]
    )
    monkeypatch.setattr(runtime, "time", clock)
    sessions: list[Any] = [
        Clocked(count, clocks, busy) for count, busy in zip(threads, (0.25, 0.5), strict=False)
    ]
    timing = runtime.interleave(sessions, {}, seconds=9.5 * len(threads), min_rounds=1)
    # For how long it goes on is a matter of the wall clock in any case.
    np.testing.assert_allclose(timing.samples_ms, [expected] * 10)


def test_speedup_is_the_ratio_of_medians_and_its_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    load = rng.gamma(2, 0.5, size=(200, 1))  # what disturbs both sessions of a round
    timing = runtime.Timing(
        np.array([[6.0, 2.0]]) * (1 + 0.1 * load) + rng.normal(0, 0.05, (200, 2))
    )
    speedup = timing.speedup(0, 1)
    before, after = timing.median_ms
    assert speedup.ratio == pytest.approx(before / after)
    assert speedup.ci95[0] < 3 < speedup.ci95[1]
    assert speedup.ci95[1] - speedup.ci95[0] < 0.2
    assert timing.speedup(0, 1) == speedup
    assert timing.speedup(1, 0).ratio == pytest.approx(1 / speedup.ratio)


# -- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(32, 1), (32, 2), (32, 32), (5, 1)])
def test_layer_times_of_a_residual_block(channels: int, groups: int) -> None:
    times = profiling.layer_times(residual(channels, groups), feed(channels), runs=5)
    assert {"a", "d"} <= times.layers.keys()
    assert times.layers.keys() <= {"a", "d", "f", "y"}  # all else is fused into the convolutions
    assert min(*times.layers.values(), times.run) > 0


def test_layer_times_keep_a_batch_normalization_apart_that_runs_on_its_own() -> None:
    proto = build(
        """g (float[N, 32, 8, 8] x) => (float[N, 32, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            b = Relu (a)
            c = BatchNormalization (b, scale, shift, mean, var)
            y = Conv <pads = [1, 1, 1, 1]> (c, w)
        }""",
        w=kernel(32, 32, 3, 3),
        **norm(32),
    )
    assert profiling.layer_times(Model(proto), feed(32), runs=3).layers.keys() == {"a", "c", "y"}


def test_layer_times_of_a_padded_convolution_with_factors_behind_it() -> None:
    proto = build(
        """g (float[N, 32, 8, 8] x) => (float[N, 32, 10, 10] y) {
            p = Pad (x, pads)
            a = Conv <pads = [1, 1, 1, 1]> (p, w)
            b = Mul (a, k)
            c = Add (b, k)
            y = Relu (c)
        }""",
        w=kernel(32, 32, 3, 3),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        k=np.ones((1, 32, 1, 1), np.float32),
    )
    assert profiling.layer_times(Model(proto), feed(32), runs=3).layers.keys() == {"a"}


def test_layer_times_of_matmul_with_bias_and_gemm() -> None:
    proto = build(
        """g (float[N, 32] x) => (float[N, 16] y) {
            a = MatMul (x, w)
            b = Add (a, k)
            c = Relu (b)
            y = Gemm (c, v)
        }""",
        w=kernel(32, 32),
        k=kernel(32),
        v=kernel(32, 16),
    )
    times = profiling.layer_times(Model(proto), {"x": kernel(2, 32)}, runs=3)
    assert times.layers.keys() == {"a", "y"}


def test_layer_times_do_not_need_unique_node_names() -> None:
    model = residual(32)
    for node in model.proto.graph.node:
        node.name = "same"
    times = profiling.layer_times(Model(model.proto), feed(32), runs=3)
    assert {"a", "d"} <= times.layers.keys()
    assert {node.name for node in model.proto.graph.node} == {"same"}


def test_layer_times_give_an_if_the_time_of_its_branch() -> None:
    proto = build(
        """g (bool p, float[N, 32, 8, 8] x) => (float[N, 32, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            y = If (p) <
                then_branch = t () => (float[N, 32, 8, 8] u) { u = Conv <pads = [1, 1, 1, 1]> (a, w) },
                else_branch = e () => (float[N, 32, 8, 8] v) { v = Relu (a) }
            >
        }""",  # noqa: E501
        w=kernel(32, 32, 3, 3),
    )
    times = profiling.layer_times(Model(proto), {"p": np.array(True), **feed(32)}, runs=5)
    assert times.layers.keys() == {"a", "y"}


def test_kernels_inside_a_kernel_are_not_counted_again() -> None:
    def event(name: str, start: int, duration: int) -> dict[str, object]:
        args = {"node_index": name}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration} | {
            "args": args
        }

    events = [event("inner", 2, 5), event("if", 1, 8), event("next", 9, 4), event("if", 20, 6)]
    assert profiling._kernel_durations(events) == {("if", "if"): [8, 6], ("next", "next"): [4]}


def test_layer_times_leave_no_profile_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profiling.layer_times(residual(4), feed(4), runs=1)
    assert list(tmp_path.iterdir()) == []
