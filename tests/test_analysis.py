"""Which convolutions may be split, how, and what a model's layers cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import ASSETS, needs_assets
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from pwopt import cost
from pwopt.analysis import Analysis, Layer, analyze, size
from pwopt.candidates import AIM, Candidate, candidate, propose
from pwopt.cost import ConvSize, Sides
from pwopt.errors import ModelError, SpecError
from pwopt.model import Model
from pwopt.shapes import bind, infer


def conv_size(
    cin: int = 128, cout: int = 128, *, k: int = 3, groups: int = 1, stride: int = 1
) -> ConvSize:
    return ConvSize(
        in_channels=cin,
        out_channels=cout,
        kernel=(k, k),
        groups=groups,
        input_positions=28 * 28 * stride * stride,
        output_positions=28 * 28,
    )


class Energies:
    """Pretends that each side keeps what it is told, and remembers what it was asked."""

    def __init__(self, **kept: float) -> None:
        self.kept = kept
        self.asked: list[tuple[Sides, int]] = []

    def __call__(self, sides: Sides, rank: int) -> float:
        self.asked.append((sides, rank))
        return self.kept.get(sides, 0.5)


# -- propose ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "rank", "reason"),
    [
        (conv_size(groups=128), 16, "depthwise: 128 groups"),
        (conv_size(groups=2), 16, "grouped: 2 groups"),
        (conv_size(k=1), 16, "1×1 already"),
        (conv_size(31), 16, "only 31 input channels (fewer than 32)"),
        (conv_size(64, 64), 64, "rank 64 is not below its 64 → 64 channels"),
        (conv_size(), 120, "a split at rank 120 would not be cheaper: 0.88×"),
        (conv_size(32, 16), None, "no rank makes it 2× as fast: 1.22× at rank 16"),
    ],
)
def test_why_not(conv: ConvSize, rank: int | None, reason: str) -> None:
    energies = Energies()
    assert propose(conv, energies, rank=rank) == reason
    assert not energies.asked


def test_a_wide_kernel_in_one_dimension_is_enough() -> None:
    conv = ConvSize(
        in_channels=64, out_channels=64, kernel=(1, 7), input_positions=784, output_positions=784
    )
    assert isinstance(propose(conv, Energies(), rank=16), Candidate)


def test_a_forced_side_must_be_legal_on_that_side_only() -> None:
    conv = conv_size(512, 64)
    found = propose(conv, Energies(), rank=64, sides="input")
    assert isinstance(found, Candidate)
    assert found.sides == "input"
    others: dict[Sides, str] = {"output": "64 output channels", "both": "512 → 64 channels"}
    for sides, width in others.items():
        assert propose(conv, Energies(), rank=64, sides=sides) == (
            f"rank 64 is not below its {width}"
        )


def test_min_channels_may_be_lowered() -> None:
    narrow = conv_size(24, 64)
    assert propose(narrow, Energies(), rank=8) == "only 24 input channels (fewer than 32)"
    assert isinstance(propose(narrow, Energies(), rank=8, min_channels=16), Candidate)


def test_costs_of_a_candidate_are_those_of_its_convolutions() -> None:
    conv = conv_size(256, 512)
    found = propose(conv, Energies(), rank=64, sides="both")
    assert isinstance(found, Candidate)
    assert found.params == 256 * 64 + 9 * 64 * 64 + 64 * 512
    assert found.macs == 784 * found.params
    assert found.predicted_speedup == cost.Split(conv, "both", 64).speedup


def test_auto_loses_least_energy_per_mac_saved() -> None:
    conv = conv_size(256, 256)
    saved = {s: conv.macs - cost.Split(conv, s, 64).macs for s in ("input", "output", "both")}
    # Both sides save 1.22 times as much, so they may lose up to 1.22 times as much.
    allowed = 0.2 * saved["both"] / saved["input"]
    for lost, chosen in ((0.99 * allowed, "both"), (1.01 * allowed, "output")):
        energies = Energies(input=0.7, output=0.8, both=1 - lost)
        found = propose(conv, energies, rank=64)
        assert isinstance(found, Candidate)
        assert found.sides == chosen
        assert found.kept_energy == energies.kept[chosen]


def test_auto_takes_the_cheapest_of_equally_faithful_forms() -> None:
    found = propose(conv_size(256, 256), Energies(input=1.0, output=1.0, both=1 - 1e-9), rank=64)
    assert isinstance(found, Candidate)
    assert found.sides == "both"


def test_a_stride_speaks_for_the_output_side() -> None:
    found = propose(conv_size(64, 64, stride=2), Energies(both=0.1), rank=32)
    assert isinstance(found, Candidate)
    assert found.sides == "output"


def test_without_a_rank_the_largest_block_that_doubles_the_speed() -> None:
    conv = conv_size(512, 512)
    energies = Energies()
    assert isinstance(propose(conv, energies), Candidate)
    assert [sides for sides, _ in energies.asked] == ["input", "output", "both"]
    for sides, rank in energies.asked:
        assert rank % cost.KERNEL_BLOCK == 0
        assert cost.Split(conv, sides, rank).speedup >= AIM
        assert cost.Split(conv, sides, rank + cost.KERNEL_BLOCK).speedup < AIM


# -- analyze ----------------------------------------------------------------------------------


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    channels: int = 64,
    dtype: type = np.float32,
    extra_inputs: Sequence[onnx.ValueInfoProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Model:
    """A model with an image input x of [N, channels, 16, 16] and the last node's output."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", kind, ["N", channels, 16, 16])
    y = helper.make_tensor_value_info(nodes[-1].output[0], kind, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "net", [x, *extra_inputs], [y], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))
    return Model(proto)


def conv(x: str, w: str, y: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, *w.split()], [y], **attributes)


def one_conv(shape: tuple[int, ...], **attributes: object) -> Model:
    channels = shape[1] * int(str(attributes.get("group", 1)))
    return model([conv("x", "w", "y", **attributes)], {"w": weight(*shape)}, channels=channels)


def only_layer(analysis: Analysis) -> Layer:
    (layer,) = analysis.layers
    return layer


def test_a_layer_is_described_in_full() -> None:
    nodes = [conv("x", "w b", "y", name="stem", strides=[2, 2], pads=[1, 1, 1, 1])]
    analysis = analyze(model(nodes, {"w": weight(48, 64, 3, 3), "b": weight(48)}), bottleneck=16)
    layer = only_layer(analysis)
    assert (layer.name, layer.output, layer.op) == ("stem", "y", "Conv")
    assert (layer.kernel, layer.stride, layer.groups) == ((3, 3), (2, 2), 1)
    assert (layer.in_channels, layer.out_channels) == (64, 48)
    assert (layer.input_shape, layer.output_shape) == ((1, 64, 16, 16), (1, 48, 8, 8))
    assert layer.params == 48 * 64 * 9 + 48
    assert layer.macs == 48 * 64 * 9 * 64
    assert layer.mac_share == 1
    assert layer.candidate is not None
    assert layer.candidate.params == 64 * 16 * 9 + 16 * 48 + 48
    assert layer.why_not is None
    assert (analysis.inputs, analysis.assumed) == ({"x": (1, 64, 16, 16)}, {"N": 1})


def test_shapes_and_batch_can_be_given() -> None:
    net = one_conv((8, 64, 3, 3))
    analysis = analyze(net, shapes={"x": (5, 64, 16, 16)})
    assert analysis.totals.macs == 5 * analyze(net).totals.macs
    assert not analysis.assumed


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [((64, 64, 5), {}), ((64, 64, 3, 3, 3), {}), ((64, 64, 1, 3), {"pads": [0, 1, 0, 1]})],
)
def test_convolutions_of_any_dimension(
    shape: tuple[int, ...], attributes: dict[str, object]
) -> None:
    net = one_conv(shape, **attributes)
    dims: list[str | int | None] = ["N", 64, *([16] * (len(shape) - 2))]
    net.proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    found = only_layer(analyze(net, bottleneck=16)).candidate
    assert found is not None
    assert found.predicted_speedup > 1.1


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_kept_energy_is_that_of_the_svd(sides: Sides, dtype: type) -> None:
    w: np.ndarray = weight(48, 40, 3, 3).astype(dtype)
    net = model([conv("x", "w", "y")], {"w": w}, channels=40, dtype=dtype)
    node = net.graph.nodes[0]
    found = candidate(net, node, infer(net, bind(net)), rank=16, sides=sides)
    assert isinstance(found, Candidate)

    exact = w.astype(np.float64)
    kept = exact
    if sides != "output":
        unfolded = kept.transpose(0, 2, 3, 1).reshape(-1, 40)
        basis = np.linalg.svd(unfolded)[2][:16]
        kept = np.einsum("oihw,ri,rj->ojhw", kept, basis, basis)
    if sides != "input":
        basis = np.linalg.svd(kept.reshape(48, -1))[0][:, :16]
        kept = np.einsum("oihw,or,pr->pihw", kept, basis, basis)
    assert found.kept_energy == pytest.approx(np.sum(kept**2) / np.sum(exact**2), rel=1e-4)


def test_candidates_first_by_what_they_save_the_rest_in_graph_order() -> None:
    nodes = [
        conv("x", "w1", "a", name="pointwise"),
        helper.make_node("Relu", ["a"], ["ra"]),
        conv("ra", "w2", "b", name="small", strides=[2, 2]),
        helper.make_node("Relu", ["b"], ["rb"]),
        conv("ra", "w3", "c", name="large"),
        helper.make_node("Relu", ["c"], ["rc"]),
        conv("rc", "w4", "d", name="depthwise", group=64),
        helper.make_node("GlobalAveragePool", ["d"], ["y"]),
    ]
    weights = {
        "w1": weight(64, 64, 1, 1),
        "w2": weight(64, 64, 3, 3),
        "w3": weight(64, 64, 3, 3),
        "w4": weight(64, 1, 3, 3),
    }
    analysis = analyze(model(nodes, weights), bottleneck=16)
    assert [layer.name for layer in analysis.layers] == [
        "large",
        "small",
        "pointwise",
        "depthwise",
    ]
    savings = [layer.saved_macs for layer in analysis.layers]
    assert savings[0] > savings[1] > 0 == savings[2] == savings[3]
    assert sum(layer.mac_share or 0 for layer in analysis.layers) == pytest.approx(1)


def test_reasons_that_the_graph_gives() -> None:
    nodes = [
        conv("x", "w", "a", name="conv"),
        helper.make_node("Identity", ["w"], ["v"]),
        conv("a", "v", "b", name="computed weight"),
        helper.make_node("ConvTranspose", ["b", "t"], ["c"], name="transposed"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "gb"], ["h"], name="head", transB=1),
        helper.make_node("MatMul", ["h", "m"], ["y"]),
    ]
    weights = {
        "w": weight(64, 64, 3, 3),
        "t": weight(64, 8, 2, 2),
        "g": weight(10, 8),
        "gb": weight(10),
        "m": weight(10, 3),
    }
    layers = {layer.name: layer for layer in analyze(model(nodes, weights)).layers}
    assert layers["conv"].candidate is not None
    assert {name: layer.why_not for name, layer in layers.items() if layer.why_not} == {
        "computed weight": "weight is not a constant",
        "transposed": "only Conv is split",
        "head": "no k×k kernel to split",
        "y": "no k×k kernel to split",
    }
    transposed, head, product = layers["transposed"], layers["head"], layers["y"]
    assert (transposed.in_channels, transposed.out_channels) == (64, 8)
    assert transposed.macs == 12 * 12 * 64 * 8 * 4
    assert (head.in_channels, head.out_channels, head.kernel) == (8, 10, None)
    assert (head.params, head.macs) == (90, 80)
    assert (product.in_channels, product.out_channels, product.macs) == (10, 3, 30)


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_convolution_with_a_bottleneck_is_left_alone(side: str) -> None:
    if side == "before":
        nodes = [conv("x", "p", "a", name="reduce"), conv("a", "w", "y", name="core")]
        weights = {"p": weight(32, 64, 1, 1), "w": weight(64, 32, 3, 3)}
    else:
        nodes = [conv("x", "w", "a", name="core"), conv("a", "p", "y", name="expand")]
        weights = {"w": weight(32, 64, 3, 3), "p": weight(64, 32, 1, 1)}
    layers = {layer.name: layer for layer in analyze(model(nodes, weights), bottleneck=8).layers}
    assert layers.pop("core").why_not == "has a 1×1 bottleneck already"
    assert [layer.why_not for layer in layers.values()] == ["1×1 already"]

    relu = [nodes[0], helper.make_node("Relu", ["a"], ["r"]), nodes[1]]
    relu[2].input[0] = "r"
    layers = {layer.name: layer for layer in analyze(model(relu, weights), bottleneck=8).layers}
    assert layers["core"].candidate is not None


def test_constant_nodes_are_weights_shared_ones_count_once_and_integers_do_not() -> None:
    shape = numpy_helper.from_array(np.array([0, -1], np.int64))
    nodes = [
        helper.make_node(
            "Constant", [], ["w"], value=numpy_helper.from_array(weight(64, 64, 3, 3))
        ),
        helper.make_node("Constant", [], ["shape"], value=shape),
        conv("x", "w", "a", pads=[1, 1, 1, 1], name="first"),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"]),
        conv("n", "w", "c", pads=[1, 1, 1, 1], name="second"),
        helper.make_node("Reshape", ["c", "shape"], ["y"]),
    ]
    weights = {name: weight(64) for name in "sbmv"} | {"unused": weight(99)}
    net = model(nodes, weights)
    totals = analyze(net).totals
    assert totals.params == 64 * 64 * 9 + 4 * 64
    assert totals.weight_bytes == 4 * totals.params
    assert totals.macs == 2 * 64 * 64 * 9 * 256
    assert totals == size(net)
    assert all(layer.candidate for layer in analyze(net).layers)


def test_an_unknown_map_size_leaves_macs_open_but_not_the_candidate() -> None:
    nodes = [helper.make_node("Reshape", ["x", "target"], ["r"]), conv("r", "w", "y")]
    target = helper.make_tensor_value_info("target", TensorProto.INT64, [4])
    net = model(nodes, {"w": weight(64, 64, 3, 3)}, extra_inputs=[target])
    analysis = analyze(net)
    layer = only_layer(analysis)
    assert (layer.macs, layer.mac_share, analysis.totals.macs) == (None, None, None)
    assert layer.candidate is not None


def test_an_input_that_is_an_output_too_keeps_its_shape() -> None:
    net = model([conv("x", "w", "y")], {"w": weight(64, 64, 3, 3)})
    macs = analyze(net).totals.macs
    net.proto.graph.output.append(net.proto.graph.input[0])
    assert analyze(Model(net.proto)).totals.macs == macs


def test_a_message_is_a_model_too() -> None:
    net = model([conv("x", "w", "y")], {"w": weight(64, 64, 3, 3)})
    assert analyze(net.proto) == analyze(net)


def test_layers_inside_subgraphs_and_functions_are_named_as_not_counted() -> None:
    branch = helper.make_graph(
        [conv("x", "w", "inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    function = helper.make_function(
        "local",
        "Block",
        ["a", "k"],
        ["b"],
        [conv("a", "k", "b")],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("Block", ["i", "w"], ["y"], domain="local"),
    ]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    net = model(nodes, {"w": weight(64, 64, 3, 3)}, extra_inputs=[flag], functions=[function])
    analysis = analyze(net)
    assert not analysis.layers
    assert analysis.uncounted == 3
    assert analysis.totals.params == 64 * 64 * 9


def test_a_weight_with_nan_is_refused_by_name() -> None:
    broken = weight(64, 64, 3, 3)
    broken[3, 5, 1, 1] = np.nan
    net = model([conv("x", "w", "y", name="stem")], {"w": broken})
    with pytest.raises(ModelError, match=r"^net: layer 'stem': .* holds NaN .* again$"):
        analyze(net)


@pytest.mark.parametrize(("rank", "message"), [(0, "at least 1"), (65, "the widest has 64")])
def test_a_rank_that_fits_nothing_is_refused(rank: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        analyze(one_conv((64, 48, 3, 3)), bottleneck=rank)


def test_measured_times_are_those_of_the_model_s_own_layers() -> None:
    nodes = [
        conv("x", "w", "a", name="first"),
        helper.make_node("Relu", ["a"], ["r"]),
        conv("r", "w", "y", name="second"),
    ]
    analysis = analyze(model(nodes, {"w": weight(64, 64, 3, 3)}), bottleneck=16, measure=True)
    times = [layer.time_ms for layer in analysis.layers]
    assert analysis.run_ms is not None
    assert all(time is not None and 0 < time < analysis.run_ms for time in times)
    saved = [layer.saved_ms for layer in analysis.layers]
    assert saved == sorted(saved, reverse=True)
    assert saved[1] > 0


# -- a real network ---------------------------------------------------------------------------


@needs_assets
def test_vgg16_has_the_known_size_and_its_head_is_never_decoded() -> None:
    net = Model.load(ASSETS / "models" / "vgg16_cifar10.onnx")
    analysis = analyze(net)
    assert (analysis.totals.params, analysis.totals.macs) == (14_984_522, 313_463_808)
    assert sum(layer.candidate is not None for layer in analysis.layers) == 12
    heads = [node for node in net.graph.nodes if node.op == "Gemm"]
    assert len(heads) == 2
    assert all(isinstance(node.inputs[1]._values, LazyValues) for node in heads)
