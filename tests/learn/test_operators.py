"""Every operator against the outputs stored in onnx.backend.test, older versions in onnxruntime."""

import functools
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from helpers import assert_close, parse_proto, run
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

torch = pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

from pwopt.errors import LearnError  # noqa: E402  # after the skip
from pwopt.learn.network import Network, unsupported  # noqa: E402
from pwopt.learn.operators import OPERATORS  # noqa: E402
from pwopt.learn.operators.node import tensor  # noqa: E402
from pwopt.model import Model  # noqa: E402

Array = npt.NDArray[Any]

REFUSED = {
    r"_cast(like)?_.*(FLOAT8|FLOAT4|U?INT4|U?INT2)": "torch computes in none of these types",
    r"_batchnorm_.*_training_mode|_training_dropout": "training as the graph has it",
    r"_maxpool_with_argmax": "the places of the largest",
    r"_resize_.*_(cubic|antialias)|_resize_tf_crop": "modes of Resize that are rare in networks",
    r"_equal_string": "text",
    r"_not_\dd$": "opset 1",
}
"""Cases that are refused before anything runs."""

LEFT_OUT = {
    r"_uint(16|32|64)(_|$)": "torch has hardly any arithmetic on these types",
    r"_identity_(sequence|opt)$": "sequences, which no operator here makes",
    r"_reduce_(max|min)_empty_set": "torch has no largest of nothing",
    r"_resize_downsample_scales_linear_align_corners$": "sizes of 2.4 pixels; as onnxruntime, 2",
}
"""Cases that are not run."""

ELSEWHERE = {"Not"}
"""Operators that have stored cases only in versions that are refused; tested below."""


class Case(NamedTuple):
    """A model, inputs by name, and the outputs it must give."""

    name: str
    proto: ModelProto
    feeds: Mapping[str, Any]
    outputs: list[Any]
    rtol: float
    atol: float


@functools.cache
def cases() -> dict[str, list[Case]]:
    """Load the cases that use known operators only: by operator, and under '' those of several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from how some cases are computed
        loaded = load_model_tests(kind="node")
    found: dict[str, list[Case]] = defaultdict(list)
    for case in loaded:
        nodes = case.model.graph.node if case.model is not None else []
        ops = {node.op_type for node in nodes}
        if not nodes or ops - OPERATORS.keys() or any(node.domain for node in nodes):
            continue
        for inputs, outputs in case.data_sets:
            names = [info.name for info in case.model.graph.input]
            feeds = dict(zip(names, map(decoded, inputs), strict=True))
            known = Case(
                case.name, case.model, feeds, [*map(decoded, outputs)], case.rtol, case.atol
            )
            found[nodes[0].op_type if len(nodes) == 1 else ""].append(known)
    return found


def decoded(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else value


def matches(table: Mapping[str, str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in table)


def assert_case(case: Case) -> bool:
    """Run a case, or assert that it is refused; tell whether it ran."""
    if matches(LEFT_OUT, case.name):
        return False
    if matches(REFUSED, case.name):
        with pytest.raises(LearnError, match="does not know"):
            Network(Model(case.proto))
        return False
    network = Network(Model(case.proto))
    results = network({name: tensor(np.asarray(value)) for name, value in case.feeds.items()})
    for name, stored in zip(network.outputs, case.outputs, strict=True):
        expected = tensor(np.asarray(stored)).numpy()  # half precision is computed in float32
        ours = results[name].detach().numpy()
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), case.name
        rtol = 2**-7 if stored.dtype.name == "bfloat16" else case.rtol
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=case.atol, err_msg=case.name)
    return True


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_operator(op: str) -> None:
    ran = [assert_case(case) for case in cases()[op]]
    assert any(ran) or op in ELSEWHERE


def test_operators_in_company() -> None:
    """Functions of the standard, written out as nodes."""
    assert sum(map(assert_case, cases()[""])) > 180


@pytest.mark.parametrize("pattern", [*REFUSED, *LEFT_OUT])
def test_exceptions_are_real(pattern: str) -> None:
    assert any(re.search(pattern, case.name) for found in cases().values() for case in found)


@pytest.mark.parametrize(("kind", "count"), [("pytorch-converted", 80), ("pytorch-operator", 30)])
def test_as_pytorch_exported_them_at_opset_6(kind: str, count: int) -> None:
    ran = 0
    for stored in load_model_tests(kind=kind):
        folder = Path(stored.model_dir)
        model = Model.load(folder / "model.onnx")
        if unsupported(model):
            assert all("with axis" in text for text in unsupported(model)), stored.name
            continue
        network = Network(model)
        for data in folder.glob("test_data_set_*"):
            feeds = dict(zip(network.inputs, read(data, "input"), strict=True))
            results = network({name: tensor(value) for name, value in feeds.items()})
            for name, expected in zip(network.outputs, read(data, "output"), strict=True):
                ours = results[name].detach().numpy()
                assert ours.dtype == expected.dtype
                np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
            ran += 1
    assert ran >= count


def read(folder: Path, kind: str) -> list[Array]:
    files = [folder / f"{kind}_{index}.pb" for index in range(len([*folder.glob(f"{kind}_*.pb")]))]
    return [numpy_helper.to_array(onnx.load_tensor(file)) for file in files]


# -- against onnxruntime ----------------------------------------------------------------------


def assert_as_onnxruntime(
    text: str, *, opset: int, x: tuple[int, ...] = (2, 3, 4, 5), kind: str = "float"
) -> None:
    """Compare on a random x; tensors named in `text` beside x are written out there."""
    shape = ",".join(map(str, x))
    outputs = "float[] y, float[] z" if re.search(r"\bz\b", text.split("=")[0]) else "float[] y"
    proto = parse_proto(
        f'<ir_version: 8, opset_import: ["" : {opset}]> '
        f"m ({kind}[{shape}] x) => ({outputs}) {text if '{' in text else '{ ' + text + ' }'}"
    )
    rng = np.random.default_rng(0)
    values = rng.standard_normal(x)
    feed = values > 0 if kind == "bool" else values.astype(np.float32)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    del proto.graph.output[:]
    proto.graph.output.extend(inferred.graph.output)
    network = Network(Model(proto))
    results = network({"x": tensor(feed)})
    assert_close(
        [results[name].detach().numpy() for name in network.outputs], run(proto, {"x": feed})
    )


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (7, "y = Unsqueeze<axes=[0,3]>(x)"),
        (11, "y = Unsqueeze<axes=[-1,0]>(x)"),
        (11, "{ a = Unsqueeze<axes=[1,3]>(x) b = Squeeze<axes=[-3]>(a) y = Squeeze(b) }"),
        (9, "y = Slice<axes=[3,1], starts=[-3,1], ends=[1000,2]>(x)"),
        (9, "y = Slice<starts=[1,0], ends=[2,-1]>(x)"),
        (7, "y = Pad<pads=[0,0,1,2,0,0,3,-1], value=1.5>(x)"),
        (7, "y = Pad<pads=[0,0,1,2,0,0,3,0], mode=\"reflect\">(x)"),
        (7, "y = Pad<pads=[1,0,1,2,0,2,3,1], mode=\"edge\">(x)"),
        (7, "y = Clip<min=-0.5, max=0.25>(x)"),
        (7, "y = Clip<max=0.25>(x)"),
        (7, "y = Softmax(x)"),
        (11, "y = Softmax<axis=-1>(x)"),
        (11, "y = LogSoftmax<axis=2>(x)"),
        (13, "y = Softmax(x)"),
        (7, "y, z = Split<axis=1, split=[1,2]>(x)"),
        (11, "y, z = Split<axis=-2>(x)"),
        (7, "y = Dropout<ratio=0.9>(x)"),
        (11, "y = ReduceSum<axes=[1,-1], keepdims=0>(x)"),
        (11, "y = ReduceMean<axes=[2,3]>(x)"),
        (11, "y = ReduceMax(x)"),
        (17, "y = ReduceL2<axes=[1]>(x)"),
        (9, "{ y, places = TopK<k=2, axis=1>(x) }"),
        (7, "y = Upsample<mode=\"nearest\", scales=[1.0,1.0,2.0,3.0]>(x)"),
        (7, "y = Upsample<mode=\"linear\", scales=[1.0,1.0,2.0,2.0]>(x)"),
        (9, "<float[4] s = {1,1,2,2.5}> { y = Upsample<mode=\"nearest\">(x, s) }"),
        (10, "<float[4] s = {1,1,0.5,2}> { y = Resize<mode=\"linear\">(x, s) }"),
        (10, "<float[4] s = {1,1,0.6,2}> { y = Resize(x, s) }"),
        (8, "y = Flatten<axis=2>(x)"),
        (8, "y = Expand(x, s)".join(("<int64[4] s = {2,3,4,5}> { ", " }"))),
        (8, "y = Sum(x, x, x)"),
        (9, "<float[3] s = {1,2,3}, float[3] b = {0,1,0}, float[3] m = {1,0,-1}, "
            "float[3] v = {1,2,4}> { y = BatchNormalization<epsilon=0.1>(x, s, b, m, v) }"),
        (18, "<float[3] s = {1,2,3}, float[3] b = {0,1,0}> "
             "{ y = GroupNormalization<num_groups=3>(x, s, b) }"),
        (17, "<float[5] s = {1,2,3,4,5}> { y = LayerNormalization(x, s) }"),
        (12, "y = LRN<size=3, alpha=0.5>(x)"),
        (12, "y = Celu<alpha=0.5>(x)"),
        (12, "y = Mean(x, x)"),
        (12, "y = DepthToSpace<blocksize=1>(x)"),
        (9, "y = Cast<to=1>(x)"),
    ],
)  # fmt: skip
def test_older_versions(opset: int, text: str) -> None:
    assert_as_onnxruntime(text, opset=opset)


def test_not() -> None:
    assert_as_onnxruntime("{ a = Not(x) y = Cast<to=1>(a) }", opset=13, kind="bool")


@pytest.mark.parametrize("c", ["float c = {2}", "float[3] c = {1,2,3}", "float[2,1] c = {1,2}"])
def test_gemm_adds_what_can_be_broadcast(c: str) -> None:
    w = "float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}"
    text = f"<{w}, {c}> {{ y = Gemm<alpha=0.5, beta=2.0>(x, w, c) }}"
    assert_as_onnxruntime(text, opset=13, x=(2, 4))


# -- windows, drawn at random -----------------------------------------------------------------


def drawn(rng: np.random.Generator, rank: int) -> dict[str, Any]:
    """Draw kernel, strides, dilations and padding for a map of `rank` axes."""
    attributes: dict[str, Any] = {
        "kernel_shape": rng.integers(1, 4, rank).tolist(),
        "strides": rng.integers(1, 3, rank).tolist(),
        "dilations": rng.integers(1, 3, rank).tolist(),
    }
    how = rng.choice(["pads", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
    if how == "pads":
        attributes["pads"] = [int(rng.integers(0, k)) for k in attributes["kernel_shape"] * 2]
    else:
        attributes["auto_pad"] = str(how)
        if how.startswith("SAME"):  # else runtimes differ
            attributes["dilations"] = [1] * rank
            attributes["kernel_shape"] = rng.integers(2, 4, rank).tolist()
    return attributes


def assert_layer(
    op: str, shape: tuple[int, ...], weights: Mapping[str, Array], opset: int, **attributes: Any
) -> None:
    """Compare a layer with onnxruntime's, on a random map of `shape`."""
    node = helper.make_node(op, ["x", *weights], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y = Network(Model(proto))({"x": tensor(x)})["y"].detach().numpy()
    assert_close([y], run(proto, {"x": x}))


@pytest.mark.parametrize("seed", range(40))
def test_conv(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    attributes = drawn(rng, rank)
    shape = (8, 4 // group, *attributes["kernel_shape"])
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    if seed % 2:
        weights["b"] = rng.standard_normal(8).astype(np.float32)
    assert_layer("Conv", (2, 4, *(9, 8, 7)[:rank]), weights, 13, group=group, **attributes)


@pytest.mark.parametrize("seed", range(40))
def test_conv_transpose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank, group = int(rng.integers(1, 4)), int(rng.choice([1, 2]))
    attributes = drawn(rng, rank)
    if seed % 3 == 1:
        attributes["output_padding"] = [s - 1 for s in attributes["strides"]]
    weights = {"w": rng.standard_normal((4, 3, *attributes["kernel_shape"])).astype(np.float32)}
    if seed % 2:
        weights["b"] = rng.standard_normal(3 * group).astype(np.float32)
    assert_layer("ConvTranspose", (2, 4, *(5, 4, 3)[:rank]), weights, 11, group=group, **attributes)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [[9, 7], [11, 8], [10, 9]])
def test_conv_transpose_to_a_given_size(size: list[int], auto_pad: str) -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)}
    assert_layer(
        "ConvTranspose",
        (2, 4, 5, 4),
        weights,
        11,
        strides=[2, 2],
        output_shape=size,
        auto_pad=auto_pad,
    )


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pool(op: str, seed: int, ceil_mode: int) -> None:
    rng = np.random.default_rng(seed)
    attributes = drawn(rng, int(rng.integers(1, 4)))
    if "auto_pad" not in attributes or op == "MaxPool":
        attributes["ceil_mode"] = ceil_mode
    if op == "AveragePool":
        attributes["count_include_pad"] = int(rng.integers(2))
    shape = (2, 3, *(9, 8, 7)[: len(attributes["strides"])])
    assert_layer(op, shape, {}, 22, **attributes)


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.0, 2.0, 2.6])
@pytest.mark.parametrize(
    "how", ["linear", "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
)
@pytest.mark.parametrize(
    "transform",
    ["half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric"],
)
def test_resize(transform: str, how: str, factor: float) -> None:
    rounding = {"mode": "linear"} if how == "linear" else {"nearest_mode": how}
    scales = np.array([1, 1, factor, 2], np.float32)
    assert_layer(
        "Resize",
        (2, 3, 5, 4),
        {"roi": np.zeros(0, np.float32), "scales": scales},
        19,
        coordinate_transformation_mode=transform,
        **rounding,
    )
