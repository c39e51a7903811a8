"""linear: one view of Conv, Gemm and MatMul, and splits that compute what the layer computed."""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import assert_same_numbers, parse, random_feeds, run, values
from onnx import TensorProto, helper, numpy_helper

from pwopt import shapes
from pwopt.errors import ModelError
from pwopt.graph import Names, replace
from pwopt.linear import Linear, Window, linear
from pwopt.lowrank import Factors
from pwopt.model import Model

Array = npt.NDArray[Any]

CONV = """
conv (float[N,6,9,9] x) => (float[] y) <float[8,6,3,3] w, float[8] b> { y = Conv(x, w, b) }
"""
STRIDED = CONV.replace("3,3", "1,1").replace("Conv", "Conv<strides=[2,2]>")
CONV_1D = "conv (float[N,6,9] x) => (float[] y) <float[8,6,3] w, float[8] b> { y = Conv(x, w, b) }"
CONV_3D = """
conv (float[N,6,5,4,6] x) => (float[] y) <float[8,6,3,1,2] w> { y = Conv<pads=[1,0,1,1,0,1]>(x, w) }
"""
GEMM = "gemm (float[N,6] x) => (float[N,8] y) <float[6,8] w, float[8] b> { y = Gemm(x, w, b) }"
TRANSPOSED = GEMM.replace("6,8", "8,6").replace("Gemm", "Gemm<transB=1>")
SCALED = GEMM.replace("Gemm", "Gemm<alpha=0.5, beta=3.0>")
MATMUL = "matmul (float[N,6] x) => (float[N,8] y) <float[6,8] w> { y = MatMul(x, w) }"
ROWS = MATMUL.replace("[N,6]", "[N,5,6]").replace("[N,8]", "[N,5,8]")

LAYERS = [CONV, STRIDED, CONV_1D, CONV_3D, GEMM, TRANSPOSED, SCALED, MATMUL, ROWS]
IDS = [
    "conv", "strided 1×1", "1-D", "3-D", "gemm", "transB", "alpha and beta", "matmul", "3 axes"
]  # fmt: skip
EVERY_LAYER = pytest.mark.parametrize("text", LAYERS, ids=IDS)
SIDES = pytest.mark.parametrize("sides", ["input", "output", "both"])


def view(model: Model) -> Linear | str:
    """See the last node of a model as a linear layer."""
    known = shapes.infer(model, shapes.bind(model, batch=2))
    return linear(model.graph.nodes[-1], known)


def layer_of(model: Model) -> Linear:
    layer = view(model)
    assert isinstance(layer, Linear), layer
    return layer


def exact(weight: Array, sides: str, bias: Array | None = None) -> Factors:
    """Factor a weight without loss: what is put around it is turned by an orthogonal matrix."""
    out_channels, in_channels, *kernel = weight.shape
    rng, ones = np.random.default_rng(3), [1] * len(kernel)
    reduce = expand = None
    if sides != "output":
        turn = np.linalg.qr(rng.standard_normal((in_channels, in_channels))).Q
        weight = np.einsum("oi...,ri->or...", weight, turn)
        reduce = turn.reshape(in_channels, in_channels, *ones)
    if sides != "input":
        turn = np.linalg.qr(rng.standard_normal((out_channels, out_channels))).Q
        weight = np.einsum("or,o...->r...", turn, weight)
        expand = turn.reshape(out_channels, out_channels, *ones)
    return Factors(weight, reduce, expand, bias)


def split(model: Model, sides: str, bias: Array | None = None) -> Model:
    """Split the last node of a copy of `model`, without loss but for the bias."""
    after = model.copy()
    layer = layer_of(after)
    nodes = layer.split(exact(layer.weight(), sides, bias), Names(after))
    replace(after.graph, layer.node, nodes)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    return after


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.to_proto().graph.node]


# -- what it sees -----------------------------------------------------------------------------


@EVERY_LAYER
def test_weight_and_bias_are_what_the_layer_computes(text: str) -> None:
    model = parse(text)
    layer = layer_of(model)
    weight, bias = layer.weight(), layer.bias()
    assert weight.shape == (8, 6, *layer.size.kernel)
    assert bias.shape == (8,)
    assert weight.dtype == bias.dtype == np.float32
    feeds = random_feeds(model, batch=2)
    (wanted,) = run(model, feeds)
    if layer.node.op != "Conv":
        np.testing.assert_allclose(feeds["x"] @ weight.T + bias, wanted, atol=1e-5)
        return
    proto = model.to_proto()
    del proto.graph.initializer[:]
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(bias, "b"))
    assert np.array_equal(run(proto, feeds)[0], wanted)


@EVERY_LAYER
def test_size(text: str) -> None:
    layer = layer_of(parse(text))
    size, is_conv = layer.size, layer.node.op == "Conv"
    assert (size.in_channels, size.out_channels, size.groups) == (6, 8, 1)
    assert layer.channel_axis == (1 if is_conv else -1)
    assert layer.is_pointwise == (text not in (CONV, CONV_1D, CONV_3D))
    assert size.bias == (text not in (CONV_3D, MATMUL, ROWS))
    positions = {
        CONV: (162, 98),
        STRIDED: (162, 50),
        CONV_1D: (18, 14),
        CONV_3D: (240, 280),
        ROWS: (10, 10),
    }
    assert (size.input_positions, size.output_positions) == positions.get(text, (2, 2))


@pytest.mark.parametrize(
    ("text", "positions"), [(CONV, (28**2, 28**2)), (STRIDED, (56**2, 28**2)), (ROWS, (1, 1))]
)
def test_size_where_shapes_are_not_known(text: str, positions: tuple[int, int]) -> None:
    layer = linear(parse(text).graph.nodes[-1], {})
    assert isinstance(layer, Linear)
    assert (layer.size.input_positions, layer.size.output_positions) == positions


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ("", Window((3, 3), (0, 0, 0, 0), (1, 1), (1, 1))),
        (
            "<strides=[2,1], pads=[1,0,2,1], dilations=[1,2]>",
            Window((3, 3), (1, 0, 2, 1), (2, 1), (1, 2)),
        ),
        ('<auto_pad="NOTSET", pads=[1,1,1,1]>', Window((3, 3), (1, 1, 1, 1), (1, 1), (1, 1))),
        ('<auto_pad="VALID">', Window((3, 3), (0, 0, 0, 0), (1, 1), (1, 1))),
    ],
)
def test_window(attributes: str, window: Window) -> None:
    assert layer_of(parse(CONV.replace("Conv", f"Conv{attributes}"))).window((9, 9)) == window


@pytest.mark.parametrize("text", [GEMM, TRANSPOSED, MATMUL, ROWS])
def test_window_of_a_row(text: str) -> None:
    assert layer_of(parse(text)).window(()) == Window()


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel", [(1, 3), (4, 2)])
@pytest.mark.parametrize("strides", [[1, 2], [2, 3]])
@pytest.mark.parametrize("size", [(9, 9), (6, 8)])
def test_auto_pad_as_pads_computes_the_same(
    mode: str, kernel: tuple[int, int], strides: list[int], size: tuple[int, int]
) -> None:
    text = CONV.replace("9,9", "{},{}".format(*size)).replace("3,3", "{},{}".format(*kernel))
    model = parse(text.replace("Conv", f'Conv<auto_pad="{mode}", strides={strides}>'))
    window = layer_of(model).window(size)
    assert window.kernel == kernel
    explicit = f"Conv<pads={list(window.pads)}, strides={list(window.strides)}>"
    assert_same_numbers(parse(text.replace("Conv", explicit)), model)


def test_window_of_a_dilated_kernel_with_auto_pad() -> None:
    """By the operator's definition; onnxruntime itself declines."""
    text = CONV.replace("Conv", 'Conv<auto_pad="SAME_LOWER", dilations=[2,1], strides=[2,2]>')
    node = parse(text).graph.nodes[0]
    layer = linear(node, {})
    assert isinstance(layer, Linear)
    assert layer.window((9, 9)).pads == (2, 1, 2, 1)
    assert layer.window((8, 8)).pads == (2, 1, 1, 0)


def test_names() -> None:
    model = parse(CONV)
    layer = layer_of(model)
    assert (layer.name, layer.where) == ("y", "y")
    layer.node.name = "features.3"
    assert (layer.name, layer.where) == ("features.3", "y")


@pytest.mark.parametrize("text", [CONV, SCALED, MATMUL])
def test_weights_are_decoded_when_asked_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(text)
    monkeypatch.setattr(gs.Constant, "values", property(lambda self: pytest.fail("decoded")))
    layer_of(model)


@pytest.mark.parametrize(("tensor", "what"), [("w", "weight"), ("b", "bias")])
def test_what_is_not_finite_is_an_error_that_names_the_layer(tensor: str, what: str) -> None:
    given = np.full((6, 8) if tensor == "w" else 8, np.nan)
    layer = layer_of(parse(GEMM, {tensor: given}))
    with pytest.raises(ModelError, match=f"layer 'y': the {what} holds NaN or infinite values"):
        getattr(layer, what)()


# -- splits -----------------------------------------------------------------------------------


@EVERY_LAYER
@SIDES
def test_a_split_without_loss_computes_the_same(text: str, sides: str) -> None:
    model = parse(text)
    after = split(model, sides)
    assert_same_numbers(after, model)
    assert len(after.graph.nodes) == (3 if sides == "both" else 2)
    wanted = [n.output for n in model.proto.graph.node]
    assert [after.to_proto().graph.node[-1].output] == wanted


@EVERY_LAYER
def test_a_bottleneck_of_identities(text: str) -> None:
    model = parse(text)
    after = model.copy()
    layer = layer_of(after)
    ones = [1] * len(layer.size.kernel)
    eyes = [np.eye(n).reshape(n, n, *ones) for n in (6, 8)]
    nodes = layer.split(Factors(layer.weight(), *eyes), Names(after))
    replace(after.graph, layer.node, nodes)
    assert_same_numbers(after, model)


@EVERY_LAYER
@SIDES
def test_a_bias_of_the_factors_takes_the_place_of_the_layer_s(text: str, sides: str) -> None:
    model = parse(text)
    shift = np.arange(8) - 3.0
    after = split(model, sides, layer_of(model).bias() + shift)
    feeds = random_feeds(model, batch=2)
    shifted = shift.reshape(-1, *[1] * len(layer_of(model).size.kernel))
    np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0] + shifted, atol=1e-4)
    assert "y.bias" in values(after.to_proto())
    assert "b" not in values(after.to_proto())


@EVERY_LAYER
def test_a_bias_of_zeros(text: str) -> None:
    """It takes the place of the layer's own, but is no reason for an Add behind a MatMul."""
    model = parse(text)
    after = split(model, "output", np.zeros(8))
    node = after.graph.nodes[-1]
    if layer_of(model).node.op == "MatMul":
        assert ops(after) == ["MatMul", "MatMul"]
    else:
        assert not node.inputs[2].values.any()


@pytest.mark.parametrize(
    ("text", "bias", "wanted"),
    [
        (CONV, None, ["Conv", "Conv", "Conv"]),
        (GEMM, None, ["MatMul", "MatMul", "Gemm"]),
        (MATMUL, None, ["MatMul", "MatMul", "MatMul"]),
        (ROWS, np.ones(8), ["MatMul", "MatMul", "MatMul", "Add"]),
    ],
)
def test_operators_and_names(text: str, bias: Array | None, wanted: list[str]) -> None:
    model = parse(text)
    model.proto.graph.node[0].name = "head"
    proto = split(model, "both", bias).to_proto()
    assert [node.op_type for node in proto.graph.node] == wanted
    parts = ["reduce", "core", "expand", "bias"][: len(wanted)]
    assert [node.name for node in proto.graph.node] == [f"head.{part}" for part in parts]
    assert [node.output[0] for node in proto.graph.node] == [f"y.{p}" for p in parts[:-1]] + ["y"]
    weights = {f"y.{part}.weight" for part in parts[:3]}
    assert set(values(proto)) - {"b"} == weights | ({"y.bias"} if bias is not None else set())


def test_the_core_keeps_all_that_concerns_the_kernel() -> None:
    attributes = "strides=[2,1], pads=[1,0,2,1], dilations=[1,2], group=1"
    model = parse(CONV.replace("Conv", f"Conv<{attributes}>"))
    after = split(model, "both")
    assert_same_numbers(after, model)
    reduce, core, expand = after.graph.nodes
    assert reduce.attrs == expand.attrs == {"kernel_shape": [1, 1]}
    assert core.attrs == {
        "strides": [2, 1],
        "pads": [1, 0, 2, 1],
        "dilations": [1, 2],
        "group": 1,
        "kernel_shape": [3, 3],
    }


@SIDES
def test_auto_pad(sides: str) -> None:
    model = parse(CONV.replace("Conv", 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>'))
    assert_same_numbers(split(model, sides), model)


def test_a_strided_1x1_keeps_its_stride_in_the_core() -> None:
    core, expand = split(parse(STRIDED), "output").graph.nodes
    assert core.attrs == {"kernel_shape": [1, 1], "strides": [2, 2]}
    assert expand.attrs == {"kernel_shape": [1, 1]}


@pytest.mark.parametrize("shape", [(), (1,), (8,), (1, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("attributes", ["alpha=1.0", "alpha=2.0, beta=0.25, transB=1"])
def test_shapes_of_a_gemm_s_bias(shape: tuple[int, ...], attributes: str) -> None:
    text = GEMM.replace("Gemm", f"Gemm<{attributes}>")
    if "transB" in attributes:
        text = text.replace("6,8", "8,6")
    sizes = list(shape)
    bias = np.arange(2.0, 2 + prod(sizes))
    model = parse(
        text.replace("[8] b", f"{sizes} b" if sizes else " b"), {"b": bias.reshape(sizes)}
    )
    layer = layer_of(model)
    assert layer.bias().shape == (8,)
    assert layer.bias()[-1] == bias[-1] * layer.node.attrs.get("beta", 1.0)
    assert_same_numbers(split(model, "output"), model)


def test_a_gemm_without_a_bias() -> None:
    model = parse(GEMM.replace(", float[8] b", "").replace("w, b", "w"))
    assert not layer_of(model).bias().any()
    after = split(model, "output")
    assert_same_numbers(after, model)
    assert [len(node.inputs) for node in after.graph.nodes] == [2, 2]


def test_a_gemm_from_before_its_bias_could_be_left_out() -> None:
    model = parse(f'<ir_version: 4, opset_import: ["" : 9]>\n{GEMM}')
    assert_same_numbers(split(model, "output"), model)


def test_an_own_bias_stays_shared_as_it_is() -> None:
    assert "b" in values(split(parse(CONV), "output").to_proto())
    assert "b" in values(split(parse(GEMM), "output").to_proto())


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("text", [CONV, SCALED, ROWS], ids=["conv", "gemm", "matmul"])
def test_new_constants_have_the_weight_s_type(text: str, dtype: int) -> None:
    name = "float16[" if dtype == TensorProto.FLOAT16 else "double["
    model = parse(text.replace("float[", name))
    weight = layer_of(model).weight()
    assert weight.dtype == layer_of(model).bias().dtype == helper.tensor_dtype_to_np_dtype(dtype)
    after = split(model, "both", np.ones(8))  # factors in double precision
    assert {t.data_type for t in after.to_proto().graph.initializer} == {dtype}
    rtol = 2e-2 if dtype == TensorProto.FLOAT16 else 1e-9
    assert_same_numbers(split(model, "both"), model, rtol)


def test_values_beyond_the_type_become_infinite() -> None:
    model = parse(MATMUL.replace("float[", "float16["))
    layer = layer_of(model)
    factors = Factors(layer.weight(), expand=np.full((8, 8), 1e6))
    *_, last = layer.split(factors, Names(model))
    assert np.isposinf(last.inputs[1].values).all()


def test_weight_and_bias_of_constant_nodes() -> None:
    model = parse("""
    conv (float[N,1,9,9] x) => (float[] y)
    {
      w = Constant<value = float[2,1,1,1] {1.0, 2.0}>()
      b = Constant<value = float[2] {3.0, 4.0}>()
      y = Conv(x, w, b)
    }
    """)
    after = split(model, "output")
    assert_same_numbers(after, model)
    assert ops(after) == ["Conv", "Conv"]
    assert "y.bias" in values(after.to_proto())  # an initialiser, for fast kernels need that


# -- what it declines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[N,6,9,9] x) => (float[] y) <float[8,3,3,3] w> { y = Conv<group=2>(x, w) }",
            "grouped: 2 groups",
        ),
        (
            "g (float[N,6,9,9] x) => (float[] y) <float[6,1,3,3] w> { y = Conv<group=6>(x, w) }",
            "depthwise: 6 groups",
        ),
        (
            "g (float[N,6,9,9] x) => (float[] y) <float[6,8,3,3] w> { y = ConvTranspose(x, w) }",
            "only Conv, Gemm and MatMul are split",
        ),
        (
            "g (float[N,6] x) => (float[N,6] y) { y = Relu(x) }",
            "only Conv, Gemm and MatMul are split",
        ),
        (
            "g (float[N,6,9,9] x, float[8,6,3,3] w) => (float[] y) { y = Conv(x, w) }",
            "weight is not a constant",
        ),
        (
            "g (float[2,6] x) => (float[] y) <float[4,2] w> { y = MatMul(w, x) }",
            "weight is not a constant",
        ),
        (
            "g (float[N,6,9,9] x, float[8] b) => (float[] y) <float[8,6,3,3] w>"
            " { y = Conv(x, w, b) }",
            "bias is not a constant",
        ),
        (
            "g (float[N,6] x, float[8] b) => (float[] y) <float[6,8] w> { y = Gemm(x, w, b) }",
            "bias is not a constant",
        ),
        (
            "g (int32[N,6] x) => (int32[N,8] y) <int32[6,8] w> { y = MatMul(x, w) }",
            "weight is int32: only float16, float32 and float64 are split",
        ),
        (
            "g (bfloat16[N,6] x) => (bfloat16[N,8] y) <bfloat16[6,8] w> { y = MatMul(x, w) }",
            "weight is bfloat16: only float16, float32 and float64 are split",
        ),
        (
            "g (float[6,3] x) => (float[] y) <float[6,8] w> { y = Gemm<transA=1>(x, w) }",
            "Gemm with transA",
        ),
        (
            "g (float[3,6] x) => (float[] y) <float[6,8] w, float[3,8] b> { y = Gemm(x, w, b) }",
            "bias is not one number a channel",
        ),
        (
            "g (float[8,6] x) => (float[] y) <float[6,8] w, float[8,1] b> { y = Gemm(x, w, b) }",
            "bias is not one number a channel",
        ),
        (
            "g (float[N,5,6] x) => (float[] y) <float[1,6,8] w> { y = MatMul(x, w) }",
            "weight of MatMul is not a matrix",
        ),
        (
            "g (float[N,5,6] x) => (float[] y) <float[6] w> { y = MatMul(x, w) }",
            "weight of MatMul is not a matrix",
        ),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert view(parse(text)) == reason


def test_a_gemm_with_an_integer_weight_of_eight_bits() -> None:
    """No valid graph has one; a quantized weight is seen behind its DequantizeLinear."""
    text = "g (float[N,6] x) => (float[] y) <float[6,8] w> { y = Gemm(x, w) }"
    node = parse(text).graph.nodes[0]
    node.inputs[1] = gs.Constant("q", np.zeros((6, 8), np.int8))
    assert linear(node, {}) == "weight is int8: only float16, float32 and float64 are split"


def test_a_convolution_of_another_domain_is_none() -> None:
    node = parse(CONV).graph.nodes[0]
    node.domain = "com.example"
    assert linear(node, {}) == "only Conv, Gemm and MatMul are split"
