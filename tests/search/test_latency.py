import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import parse, random_feeds

from pwopt import profiling, runtime
from pwopt.cost import KERNEL_BLOCK, ConvSize, Split
from pwopt.errors import ModelError, SpecError
from pwopt.graph import Names
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.search import latency
from pwopt.search.latency import Latencies, Option
from pwopt.shapes import bind, infer

RESIDUAL = """net (float[N,64,16,16] x) => (float[N,10] y)
<float[64,64,3,3] w1, float[64] scale, float[64] shift, float[64] mean, float[64] var,
 float[64,64,3,3] w2, float[64] b2, float[256,64,1,1] w3, float[256,256] w4, float[10,256] w5,
 float[10] b5>
{
    a = Conv <pads = [1,1,1,1]> (x, w1)
    b = BatchNormalization (a, scale, shift, mean, var)
    c = Relu (b)
    d = Conv <pads = [1,1,1,1]> (c, w2, b2)
    e = Add (x, d)
    f = Relu (e)
    g = Conv (f, w3)
    h = GlobalAveragePool (g)
    i = Flatten (h)
    j = MatMul (i, w4)
    k = Relu (j)
    y = Gemm <transB = 1> (k, w5, b5)
}
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)


def layers_of(model: Model, *, batch: int = 1) -> list[Linear]:
    shapes = infer(model, bind(model, batch=batch))
    found = (linear(node, shapes) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def layer(
    *, cin: int = 256, cout: int = 256, kernel: tuple[int, ...] = (3, 3), at: int = 196
) -> Linear:
    size = ConvSize(
        in_channels=cin, out_channels=cout, kernel=kernel, input_positions=at, output_positions=at
    )
    return Linear(None, size)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("opened a session")


# -- the grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cin", "cout"), [(64, 64), (128, 512), (512, 256), (4096, 4096)])
def test_options_are_whole_blocks_that_save_macs(cin: int, cout: int) -> None:
    wide = layer(cin=cin, cout=cout)
    found = latency.options(wide)
    assert {option.sides for option in found} == {"input", "output", "both"}
    for sides in ("input", "output", "both"):
        ranks = [option.rank for option in found if option.sides == sides]
        assert 2 <= len(ranks) <= latency.MOST_RANKS
        assert all(low < high for low, high in pairwise(ranks))
        assert all(rank % KERNEL_BLOCK == 0 for rank in ranks)
        assert all(Split(wide.size, sides, rank).macs < wide.size.macs for rank in ranks)
        limits = {"input": cin, "output": cout}
        assert max(ranks) < limits.get(sides, min(cin, cout))


def test_ranks_grow_in_steps_of_a_third_to_a_half() -> None:
    found = latency.options(layer(cin=512, cout=512))
    ranks = [option.rank for option in found if option.sides == "input"]
    assert ranks == [16, 32, 48, 64, 96, 128, 192, 256, 384]


@pytest.mark.parametrize("kernel", [(), (1, 1), (1,)])
def test_pointwise_layers_have_one_form(kernel: tuple[int, ...]) -> None:
    found = latency.options(layer(kernel=kernel))
    assert [str(option) for option in found] == [
        f"output {rank}" for rank in (16, 32, 48, 64, 96) if Option("output", rank) in found
    ]
    assert found


@pytest.mark.parametrize(
    "narrow",
    [layer(cin=3, cout=16), layer(cin=16, cout=16), layer(cin=512, cout=10, kernel=())],
)
def test_narrow_layers_have_no_options(narrow: Linear) -> None:
    assert latency.options(narrow) == []


def test_a_layer_as_wide_as_they_get_is_thinned_from_one_block_to_the_widest() -> None:
    ranks = [o.rank for o in latency.options(layer(cin=25088, cout=4096, kernel=(), at=1))]
    assert len(ranks) == latency.MOST_RANKS
    assert (ranks[0], ranks[-1]) == (16, 3072)


def test_every_option_is_in_one_variant() -> None:
    grid = {"a": [Option("input", 16), Option("output", 16)], "b": [Option("output", 32)], "c": []}
    found = latency.plans(grid)
    assert found == [{"a": grid["a"][0], "b": grid["b"][0]}, {"a": grid["a"][1]}]
    assert latency.plans({"c": []}) == []


def test_groups_keep_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MOST_BYTES", 100)
    monkeypatch.setattr(latency, "MOST_SESSIONS", 3)
    assert latency.groups([], 10) == []
    assert latency.groups([5] * 7, 10) == [range(3), range(3, 6), range(6, 7)]
    assert latency.groups([40, 50, 40, 60], 10) == [range(2), range(2, 3), range(3, 4)]
    assert latency.groups([200, 1, 1], 150) == [range(1), range(1, 2), range(2, 3)]


def test_nominal_factors_have_the_shapes_of_the_split_and_take_averages() -> None:
    size = layer(cin=64, cout=48).size
    factors = latency.nominal_factors(Split(size, "both", 16))
    assert factors.reduce is not None
    assert factors.expand is not None
    assert factors.reduce.shape == (16, 64, 1, 1)
    assert factors.core.shape == (16, 16, 3, 3)
    assert factors.expand.shape == (48, 16, 1, 1)
    for values in (factors.reduce, factors.core, factors.expand):
        assert values.dtype == np.float32
        assert values.base is not None  # a view of one number
        np.testing.assert_allclose(values.reshape(len(values), -1).sum(axis=1), 1, rtol=1e-5)
    one_sided = latency.nominal_factors(Split(size, "input", 16))
    assert one_sided.expand is None
    assert one_sided.core.shape == (48, 16, 3, 3)


# -- measuring --------------------------------------------------------------------------------


def test_every_option_of_every_layer_is_timed() -> None:
    model = parse(RESIDUAL)
    layers = layers_of(model)
    before = model.to_proto()
    told: list[tuple[int, int | None]] = []
    found = latency.measure(
        model, layers, progress=lambda _, done, total: told.append((done, total))
    )
    assert found.unit == "ms"
    assert list(found.layers) == ["a", "d", "g", "j", "y"]
    for found_layer in layers:
        assert list(found.options[found_layer.where]) == latency.options(found_layer)
    assert {option.sides for option in found.options["d"]} == {"input", "output", "both"}
    assert found.options["j"]
    times = [ms for row in found.options.values() for ms in row.values()]
    assert min(found.run_ms, *found.layers.values(), *times) > 0
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    assert model.to_proto() == before


def test_variants_hold_no_weights_and_run_the_same_kernels(tmp_path: Path) -> None:
    model = parse(RESIDUAL)
    layers = layers_of(model)
    feeds = random_feeds(model, side=16)
    profile, parts = latency._open(model, layers, {}, tmp_path, 1)
    split, split_parts = latency._open(model, layers, {"d": Option("both", 16)}, tmp_path, 1)
    for one in (profile, split):
        for _ in range(5):
            one.session.run(None, feeds)
    expected = profiling.layer_times(model, feeds, runs=3)
    found = profile.times()
    assert found.layers.keys() == expected.layers.keys()  # none fills a weight at run time
    assert parts == {name: [name] for name in "adgjy"}
    assert split_parts["d"] == ["d.reduce", "d.core", "d"]
    assert split.times().layers.keys() == expected.layers.keys() | {"d.reduce", "d.core"}


def test_weights_that_are_filled_differ_from_one_another() -> None:
    model = parse(RESIDUAL)
    latency._compute_weights(model.graph, set("adgjy"), Names(model))
    filled = {
        node.outputs[0].name: node for node in model.graph.nodes if node.op == "ConstantOfShape"
    }
    values = {float(node.attrs["value"].values[0]) for node in filled.values()}
    assert len(values) == len(filled) == 5
    assert all(len(tensor.dims) == 1 for tensor in model.to_proto().graph.initializer)


def test_a_model_with_nothing_to_split_is_timed_as_it_is() -> None:
    model = parse(
        "net (float[1,8,4,4] x) => (float[1,8,2,2] y) <float[8,8,3,3] w> { y = Conv (x, w) }"
    )
    found = latency.measure(model, layers_of(model))
    assert found.layers.keys() == {"y"}
    assert found.options == {"y": {}}


def test_a_model_that_does_not_run_is_told_by_name() -> None:
    model = parse(
        """net (float[N,64,8,8] x) => (float[M,7] y) <float[64,64,3,3] w, int64[2] s = {5, 7}>
        { a = Conv (x, w)  y = Reshape (a, s) }"""
    )
    with pytest.raises(ModelError, match="onnxruntime cannot run it"):
        latency.measure(model, layers_of(model))


def test_macs_stand_for_milliseconds() -> None:
    model = parse(RESIDUAL)
    one, two = (
        latency.by_macs(model, layers_of(model, batch=batch), batch=batch) for batch in (1, 2)
    )
    assert one.unit == "MACs"
    assert one.layers["a"] == 64 * 64 * 9 * 256
    assert one.layers["y"] == 2560
    assert one.run_ms == sum(one.layers.values())
    assert one.options["a"][Option("input", 16)] == 16 * (64 + 64 * 9) * 256
    assert two.run_ms == 2 * one.run_ms
    assert two.layers == {where: 2 * macs for where, macs in one.layers.items()}


# -- the cache --------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Latencies]:
    monkeypatch.setattr(latency, "MOST_RANKS", 1)
    model = parse(RESIDUAL)
    return model, latency.measure(model, layers_of(model))


def test_what_was_measured_is_recalled(
    measured: tuple[Model, Latencies], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = measured
    monkeypatch.setattr(runtime, "session", refuse)
    assert latency.measure(model, layers_of(model)) == found
    other_weights = parse(RESIDUAL, seed=5)
    assert latency.measure(other_weights, layers_of(other_weights)) == found
    with pytest.raises(AssertionError, match="opened a session"):
        latency.measure(model, layers_of(model), threads=2)


def test_a_file_says_what_it_is(measured: tuple[Model, Latencies], cache_folder: Path) -> None:
    (path,) = cache_folder.iterdir()
    kept = json.loads(path.read_text())
    assert "Milliseconds that pwopt measured for net" in kept["about"]
    told = kept["measured_for"]
    assert (told["inputs"], told["threads"], told["batch"]) == ({"x": [1, 64, 16, 16]}, 1, 1)
    assert told["processor"] == latency._processor()
    assert "both 16" in told["options"]["d"]


def _without_layer(kept: Any) -> Any:
    del kept["layers"]["d"]
    return kept


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: "",
        lambda kept: json.dumps(kept)[:200],
        lambda kept: "[1]",
        lambda kept: "null",
        lambda kept: json.dumps({**kept, "measured_for": {}}),
        lambda kept: json.dumps({**kept, "options": []}),
        lambda kept: json.dumps({**kept, "run_ms": "fast"}),
        lambda kept: json.dumps({**kept, "run_ms": -1.0}),
        lambda kept: json.dumps({**kept, "run_ms": float("nan")}),
        lambda kept: json.dumps(_without_layer(kept)),
    ],
)
def test_a_spoiled_file_is_measured_anew(
    spoil: Any,
    measured: tuple[Model, Latencies],
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, found = measured
    (path,) = cache_folder.iterdir()
    path.write_text(spoil(json.loads(path.read_text())))
    monkeypatch.setattr(latency, "_measured", lambda *_: found)
    assert latency.measure(model, layers_of(model)) == found
    monkeypatch.setattr(latency, "_measured", refuse)
    assert latency.measure(model, layers_of(model)) == found


def test_a_folder_that_cannot_be_written_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(latency, "MOST_RANKS", 1)
    model = parse(RESIDUAL)
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setenv("PWOPT_CACHE", str(folder))
        assert latency.measure(model, layers_of(model)).run_ms > 0


def key(model: Model, **settings: Any) -> dict[str, Any]:
    grid = {layer.where: latency.options(layer) for layer in layers_of(model)}
    return latency.cache_key(model, grid, **settings)


def test_the_key_is_of_all_that_the_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(RESIDUAL)
    keys = [
        key(model),
        key(model, threads=2),
        key(model, batch=2),
        key(model, shapes={"x": (3, 64, 16, 16)}),
        key(parse(RESIDUAL.replace("[256,64,1,1]", "[256,64,3,3]"))),
        key(parse(RESIDUAL.replace("Conv (f, w3)", "Conv <pads = [1,1,1,1]> (f, w3)"))),
        key(parse(RESIDUAL.replace("c = Relu", "c = Sigmoid"))),
        key(parse(RESIDUAL.replace("Add (x, d)", "Add (d, d)"))),
    ]
    monkeypatch.setattr(latency, "_processor", lambda: "another")
    keys.append(key(model))
    monkeypatch.setattr(latency.onnxruntime, "__version__", "1.0")
    keys.append(key(model))
    monkeypatch.setattr(latency, "MOST_RANKS", 2)
    keys.append(key(model))
    texts = [json.dumps(one) for one in keys]
    assert len(set(texts)) == len(texts)


def test_the_key_is_not_of_the_weights() -> None:
    assert key(parse(RESIDUAL, seed=1)) == key(parse(RESIDUAL, seed=2))


def test_the_key_survives_json() -> None:
    one = key(parse(RESIDUAL))
    assert json.loads(json.dumps(one)) == one


def test_a_shape_for_an_input_that_is_not_there_is_refused() -> None:
    model = parse(RESIDUAL)
    with pytest.raises(SpecError, match="no input 'z'"):
        latency.measure(model, layers_of(model), shapes={"z": (1,)})
