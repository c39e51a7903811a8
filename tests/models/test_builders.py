from collections.abc import Callable
from fractions import Fraction
from math import prod

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import SMALL
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from pwopt.models import BUILDERS, worked_example_input
from pwopt.models.layers import Net

SEEDED = sorted(set(BUILDERS) - {"worked_example"})


def build(name: str, **options: int) -> onnx.ModelProto:
    return BUILDERS[name](**SMALL.get(name, {}), **options)


def dims(value: onnx.ValueInfoProto) -> list[int]:
    """The shape, a symbolic axis as 0."""
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x})[0]
    return y


def parameters(model: onnx.ModelProto) -> int:
    """Learned parameters: BatchNormalization's running statistics do not count."""
    return sum(prod(w.dims) for w in model.graph.initializer if ".running_" not in w.name)


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and Gemms for a batch of one."""
    inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
    places = {v.name: prod(dims(v)[2:]) for v in (*inferred.value_info, *inferred.output)}
    weights = {w.name: prod(w.dims) for w in model.graph.initializer}
    return sum(
        weights[node.input[1]] * places[node.output[0]]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_model_is_valid_and_runs(name: str) -> None:
    model = build(name)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]

    (x,) = model.graph.input
    (output,) = model.graph.output
    batch = dims(x)[0] or 2
    images = np.random.default_rng(0).random((batch, *dims(x)[1:]), np.float32)
    y = run(model, images)
    assert list(y.shape) == [batch, *dims(output)[1:]]
    assert np.isfinite(y).all()
    assert 1e-3 < y.std() < 1e3


@pytest.mark.parametrize("name", BUILDERS)
def test_names_are_unique_and_every_initializer_is_read(name: str) -> None:
    graph = build(name).graph
    nodes = [node.name for node in graph.node]
    initializers = [w.name for w in graph.initializer]
    assert len(set(nodes)) == len(nodes)
    assert len(set(initializers)) == len(initializers)
    assert set(initializers) <= {i for node in graph.node for i in node.input}


@pytest.mark.parametrize("name", SEEDED)
def test_seed_decides_every_byte(name: str) -> None:
    first = build(name, seed=1).SerializeToString(deterministic=True)
    assert build(name, seed=1).SerializeToString(deterministic=True) == first
    assert build(name, seed=2).SerializeToString(deterministic=True) != first


@pytest.mark.parametrize(
    ("name", "params", "mac_count"),
    [
        ("project_features", 276_992, 256**2 * (27 * 512 + 512 * 512)),
        ("decrease_features", 47_168, 256**2 * (27 * 512 + 512 * 64)),
        ("increase_features", 539_648, 256**2 * (27 * 512 + 512 * 1024)),
        ("seven_by_seven", 1_605_696, 28**2 * 49 * 512 * 64),
        ("seven_by_seven_reduced", 32_832 + 200_768, 28**2 * (512 * 64 + 49 * 64 * 64)),
        ("twenty_filters", 1_020, 200**2 * 50 * 20),
        ("segmentation_head", 514, 20 * 72 * 256 * 2),
        ("network_in_network", 966_986, 222_486_528),
        ("inception_reduced", 163_696, 128_049_152),
        ("googlenet", 6_998_552, 1_582_671_872),
        ("naive_inception_net", 1_057_898, 59_840_640),
        ("resnet_bottleneck", 70_400, 218_365_952),
        ("resnet50", 25_557_032, 3_857_973_248),
        ("squeezenet", 1_248_424, 818_924_576),
        ("densenet121", 7_978_856, 2_834_161_664),
    ],
)
def test_full_size_has_the_published_counts(name: str, params: int, mac_count: int) -> None:
    model = BUILDERS[name]()
    assert parameters(model) == params
    assert macs(model) == mac_count


@pytest.mark.parametrize(
    ("count", "published"), [(parameters, 138_357_544), (macs, 15_470_264_320)]
)
def test_vgg16_has_the_published_counts(
    count: Callable[[onnx.ModelProto], int], published: int
) -> None:
    # Both counts are quadratic in the width, so three narrow networks tell the full one's,
    # whose weights alone would take half a gigabyte.
    points = [(width, count(BUILDERS["vgg16"](width=width))) for width in (1, 2, 3)]
    assert lagrange(points, 64) == published


def lagrange(points: list[tuple[int, int]], x: int) -> Fraction:
    """The value at `x` of the polynomial through the points."""
    value = Fraction(0)
    for at, y in points:
        others = [other for other, _ in points if other != at]
        value += Fraction(y * prod(x - o for o in others), prod(at - o for o in others))
    return value


def test_worked_example() -> None:
    y = run(BUILDERS["worked_example"](), worked_example_input())
    assert y.shape == (1, 1, 3, 3)
    assert y.ravel().tolist() == [5, 11, 17, 23, 29, 35, 41, 47, 53]


def test_segmentation_head_keeps_channels_last() -> None:
    graph = BUILDERS["segmentation_head"]().graph
    assert dims(graph.input[0]) == [1, 20, 72, 256]
    assert dims(graph.output[0]) == [1, 20, 72, 2]


def test_mlp_head_and_conv_head_are_the_same_function() -> None:
    mlp, conv = BUILDERS["mlp_head"](seed=3), BUILDERS["conv_head"](seed=3)
    for a, b in zip(mlp.graph.initializer, conv.graph.initializer, strict=True):
        assert a.name == b.name
        assert np.array_equal(numpy_helper.to_array(a).ravel(), numpy_helper.to_array(b).ravel())
    features = np.random.default_rng(0).standard_normal((4, 512, 7, 7), np.float32)
    np.testing.assert_allclose(run(mlp, features), run(conv, features), rtol=1e-5, atol=1e-5)


def test_resnet50_strides_in_the_pointwise_convolutions() -> None:
    strides = {
        (node.name, *attribute.ints)
        for node in build("resnet50").graph.node
        if node.op_type == "Conv" and node.name != "stem.conv"
        for attribute in node.attribute
        if attribute.name == "strides" and list(attribute.ints) != [1, 1]
    }
    assert strides == {
        (f"layer{stage}.0.{conv}.conv", 2, 2)
        for stage in (2, 3, 4)
        for conv in ("reduce", "shortcut")
    }


def test_two_layers_of_one_name_are_refused() -> None:
    net = Net("twice")
    x = net.input("x", 1, 4, 4)
    net.relu(x, name="relu")
    with pytest.raises(ValueError, match="two layers are called 'relu'"):
        net.relu(x, name="relu")
