"""relu-bottlenecks: the graph it makes, the numbers it starts from, and where it stays away."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    REPOSITORY,
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_skipped,
    parse,
    random_weight,
    run,
    values,
)
from onnx import TensorProto

from pwopt.data import Samples, open_data
from pwopt.errors import DataError
from pwopt.model import Model
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.merge_linear_convs import MergeLinearConvs
from pwopt.passes.relu_bottlenecks import ReluBottlenecks
from pwopt.registry import pipeline
from pwopt.rewriting import Context
from pwopt.shapes import inputs

Array = npt.NDArray[Any]

RELU = ReluBottlenecks()


def pair(
    front: str = "kernel_shape=[1,1]",
    behind: str = "pads=[1,1,1,1]",
    *,
    size: str = "9,8",
    first: str = "8,32,1,1",
    second: str = "32,8,3,3",
    biases: str = "",
) -> str:
    """Write a model of two Conv; `biases` holds the letters of those that have one, a or b."""
    declared = "".join(
        f", float[{(first, second)['ab'.index(n)].split(',')[0]}] {n}" for n in biases
    )
    a, b = (f", {name}" if name in biases else "" for name in "ab")
    return f"""
    pair (float[N,{first.split(",")[1]},{size}] x) => (float[] y)
    <float[{first}] v, float[{second}] w{declared}>
    {{
      z = Conv<{front}>(x, v{a})
      y = Conv<{behind}>(z, w{b})
    }}
    """


def even(model: Model, count: int = 3, seed: int = 1) -> Array:
    """Draw inputs from -1 to 1: no sum of 32 comes near 3 norms of its weights."""
    shape = [size if isinstance(size, int) else 9 for size in inputs(model)[0].shape[1:]]
    dtype = inputs(model)[0].dtype
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(dtype)


def assert_starts_alike(model: Model, *, rtol: float = 1e-4, convs: int = 2) -> Outcome:
    """Assert that a Relu was put in, cuts nothing of even inputs, and that they give the same."""
    outcome = apply(model, RELU)
    assert len(outcome.rewrote) == convs - 1
    operators = [node.op_type for node in outcome.proto.graph.node]
    assert operators == ["Conv", *["Relu", "Conv"] * (convs - 1)]
    for count in (1, 3):
        feeds = {"x": even(model, count)}
        assert_close(run(outcome.model, feeds), run(model, feeds), rtol)
    return outcome


# -- the graph it makes -----------------------------------------------------------------------


def test_input_side() -> None:
    after = """
    pair (float[N,32,9,8] x) => (float[N,32,9,8] y)
    <float[8,32,1,1] v, float[8] z.bias, float[32,8,3,3] w, float[32] b>
    {
      z.bottleneck = Conv<kernel_shape=[1,1], pads=[1,1,1,1]>(x, v, z.bias)
      z.bottleneck.relu = Relu(z.bottleneck)
      y = Conv<pads=[0,0,0,0]>(z.bottleneck.relu, w, b)
    }
    """
    outcome = assert_pass(pair(biases="b"), RELU, after)
    assert [(e.where, e.reason, dict(e.data)) for e in outcome.events] == [
        ("y", "Relu on 8 channels", {"channels": 8})
    ]


def test_output_side() -> None:
    before = pair("pads=[1,1,1,1]", "kernel_shape=[1,1]", first="8,32,3,3", second="32,8,1,1")
    after = """
    pair (float[N,32,9,8] x) => (float[N,32,9,8] y)
    <float[8,32,3,3] v, float[8] z.bias, float[32,8,1,1] w, float[32] y.bias>
    {
      z.bottleneck = Conv<pads=[1,1,1,1]>(x, v, z.bias)
      z.bottleneck.relu = Relu(z.bottleneck)
      y = Conv<kernel_shape=[1,1]>(z.bottleneck.relu, w, y.bias)
    }
    """
    assert_pass(before, RELU, after)


PLAIN = """
conv (float[N,32,9,8] x) => (float[N,32,9,8] y)
<float[32,32,3,3] w, float[32] b>
{ y = Conv<pads=[1,1,1,1]>(x, w, b) }
"""


def test_both_sides() -> None:
    linear = apply(parse(PLAIN), Bottleneck(rank=8, sides="both", min_channels=8)).model
    outcome = assert_starts_alike(linear, convs=3)
    assert outcome.rewrote == ["y.core", "y"]
    names = [node.name for node in outcome.proto.graph.node]
    assert names == [
        "y.reduce",
        "y.reduce.bottleneck.relu",
        "y.core",
        "y.core.bottleneck.relu",
        "y.expand",
    ]


def test_a_name_that_is_taken_stays_with_its_owner() -> None:
    taken = "z.bottleneck.relu"
    text = pair().replace("{", f"{{ {taken} = Abs(x)", 1).replace("y)", f"y, float[] {taken})", 1)
    after = apply(parse(text), RELU).proto.graph.node
    assert [node.output[0] for node in after] == [taken, "z.bottleneck", f"{taken}_2", "y"]


def test_what_is_declared_of_the_tensor_between_goes_with_it() -> None:
    text = pair().replace("<float[8", "<float[N,8,9,8] z, float[8")
    model = parse(text)
    assert [info.name for info in model.proto.graph.value_info] == ["z"]
    outcome = assert_starts_alike(model)
    assert not outcome.proto.graph.value_info


def test_biases_that_are_shared_stay_what_they_are_for_others() -> None:
    text = """
    two (float[N,8,9,9] x) => (float[N,8,9,9] y, float[N,8,9,9] u)
    <float[4,8,1,1] v, float[8,4,3,3] w, float[8] b, float[8,8,1,1] k>
    {
      z = Conv(x, v)
      y = Conv<pads=[1,1,1,1]>(z, w, b)
      u = Conv(x, k, b)
    }
    """
    model = parse(text)
    outcome = apply(model, RELU)
    np.testing.assert_array_equal(values(outcome.proto)["b"], values(model.proto)["b"])
    feeds = {"x": even(model)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_bottlenecks_that_share_weights_go_on_sharing() -> None:
    text = """
    two (float[N,32,9,9] x) => (float[N,32,9,9] y)
    <float[32,32,3,3] w, float[32] b>
    {
      t = Conv<pads=[1,1,1,1]>(x, w, b)
      u = Relu(t)
      y = Conv<pads=[1,1,1,1]>(u, w, b)
    }
    """
    linear = apply(parse(text), Bottleneck(rank=8, sides="input", min_channels=8)).model
    after = apply(linear, RELU).proto.graph.node
    assert [n.op_type for n in after] == ["Conv", "Relu", "Conv", "Relu", "Conv", "Relu", "Conv"]
    first, second = ([n.input[1] for n in after if n.op_type == "Conv"][i:][:2] for i in (0, 2))
    assert first == second


# -- the numbers it starts from ---------------------------------------------------------------


@pytest.mark.parametrize("biases", ["", "b"])
@pytest.mark.parametrize(
    "behind",
    [
        "group=1",
        "pads=[1,1,1,1]",
        "pads=[0,2,1,0]",
        "strides=[2,2], pads=[1,1,1,1]",
        "strides=[3,1]",
        "dilations=[2,3], pads=[2,3,2,3]",
        'auto_pad="SAME_UPPER"',
        'auto_pad="SAME_LOWER"',
        'auto_pad="VALID", strides=[2,2]',
        'auto_pad="NOTSET", kernel_shape=[3,3]',
    ],
)
def test_attributes_of_the_kernel_behind(behind: str, biases: str) -> None:
    assert_starts_alike(parse(pair(behind=behind, biases=biases)))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_that_is_odd(mode: str) -> None:
    assert_starts_alike(parse(pair(behind=f'auto_pad="{mode}"', second="32,8,2,4")))


@pytest.mark.parametrize(
    "front",
    ["strides=[2,3]", "pads=[1,0,0,2]", "strides=[3,2], pads=[0,1,2,0]", 'auto_pad="SAME_UPPER"'],
)
@pytest.mark.parametrize("behind", ["pads=[1,2,0,1]", "strides=[2,2], pads=[1,1,1,1]"])
@pytest.mark.parametrize("size", ["9,8", "10,13"])
def test_attributes_of_the_1x1_in_front(front: str, behind: str, size: str) -> None:
    assert_starts_alike(parse(pair(front, behind, size=size)))


@pytest.mark.parametrize(
    "front", ["pads=[1,1,1,1]", 'auto_pad="SAME_UPPER", strides=[2,2]', "strides=[2,1]"]
)
@pytest.mark.parametrize("biases", ["", "a", "ab"])
def test_attributes_of_the_output_side(front: str, biases: str) -> None:
    text = pair(front, "group=1", first="8,32,3,3", second="32,8,1,1", biases=biases)
    assert_starts_alike(parse(text))


@pytest.mark.parametrize(("size", "kernel"), [("20", "5"), ("5,6,4", "3,3,3")])
def test_other_ranks(size: str, kernel: str) -> None:
    ones = ",".join("1" for _ in kernel.split(","))
    pads = ",".join("1" for _ in (*kernel.split(","), *kernel.split(",")))
    text = pair(
        "group=1", f"pads=[{pads}]", size=size, first=f"8,32,{ones}", second=f"32,8,{kernel}"
    )
    assert_starts_alike(parse(text))


def test_a_split_1x1() -> None:
    text = pair("group=1", "group=1", second="32,8,1,1", biases="ab")
    assert_starts_alike(parse(text))


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 21])
def test_opsets(opset: int) -> None:
    assert_starts_alike(parse(f'<ir_version: 7, opset_import: ["" : {opset}]>{pair(biases="b")}'))


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 5e-2), ("double", 1e-12)])
def test_other_types(dtype: str, rtol: float) -> None:
    text = pair(biases="b").replace("float[", f"{dtype}[")
    after = assert_starts_alike(parse(text), rtol=rtol).proto
    kind = {"float16": TensorProto.FLOAT16, "double": TensorProto.DOUBLE}[dtype]
    assert {t.data_type for t in after.graph.initializer} == {kind}


def test_the_shift_is_of_the_weights_without_samples() -> None:
    model = parse(pair("group=1", "group=1", biases="a"))
    weights = values(model.proto)
    after = values(apply(model, RELU).proto)
    raised = np.maximum(weights["a"], 3 * np.linalg.norm(weights["v"].reshape(8, 32), axis=1))
    np.testing.assert_allclose(after["a"], raised, rtol=1e-5)


def test_a_channel_that_is_high_enough_is_not_raised() -> None:
    model = parse(pair("group=1", "group=1", biases="a"), {"a": np.full(8, 100.0)})
    np.testing.assert_array_equal(values(apply(model, RELU).proto)["a"], 100)


# -- with samples -----------------------------------------------------------------------------


def lopsided(count: int = 64, seed: int = 0) -> Array:
    """Draw maps as a Relu leaves them, of channels unequally loud."""
    rng = np.random.default_rng(seed)
    loud = np.linspace(0.1, 3, 32).reshape(-1, 1, 1)
    return np.maximum(loud * rng.standard_normal((count, 32, 9, 8)), 0).astype(np.float32)


def samples(model: Model, x: Array) -> Samples:
    return Samples("made up", inputs(model), lambda: iter([({"x": x}, None)]), len(x))


def written_between(model: Model, x: Array) -> Array:
    """Return what the first Conv writes."""
    proto = model.to_proto()
    del proto.graph.node[1:]
    proto.graph.output[0].CopyFrom(proto.graph.input[0])
    proto.graph.output[0].name = proto.graph.node[0].output[0]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (z,) = run(proto, {"x": x})
    return z


@pytest.mark.parametrize("sides", ["input", "output"])
def test_with_samples_three_deviations_pass(sides: str) -> None:
    text = pair()
    if sides == "output":
        text = pair("pads=[1,1,1,1]", "group=1", first="8,32,3,3", second="32,8,1,1")
    model = parse(text)
    outcome = apply(model, RELU, samples=samples(model, lopsided()))
    z = written_between(model, lopsided()).transpose(1, 0, 2, 3).reshape(8, -1)
    wanted = np.maximum(3 * z.std(axis=1) - z.mean(axis=1), 0)
    np.testing.assert_allclose(values(outcome.proto)["z.bias"], wanted, rtol=0.05)

    unseen = {"x": lopsided(seed=7)}
    (linear,), (activated,) = run(model, unseen), run(outcome.model, unseen)
    error = np.linalg.norm(activated - linear) / np.linalg.norm(linear - linear.mean())
    assert 0 < error < 0.03  # something is cut, and little


def test_too_few_samples() -> None:
    model = parse(pair())
    with pytest.raises(DataError, match="7 samples are too few"):
        apply(model, RELU, samples=samples(model, lopsided(7)))


@pytest.mark.parametrize("sides", ["input", "both"])
def test_the_demo_network_starts_as_the_linear_one(sides: str) -> None:
    folder = REPOSITORY / "models" / "demo"
    model = Model.load(folder / "naive_inception.onnx")
    data = open_data(folder / "calib.npz", model, preprocess="unit")
    context = Context(samples=data, most_samples=64)
    linear = model.copy()
    pipeline(f"fold-affine,bottleneck{{rank=32,sides={sides}}}").run(linear, context)
    activated = linear.copy()
    (report,) = pipeline("relu-bottlenecks").run(activated, context)
    assert report.rewrote == 4  # of four layers, or both sides of two
    images = np.load(folder / "eval.npz")["images"][::10].transpose(0, 3, 1, 2)
    feeds = {"images": (images / 255).astype(np.float32)}
    (before,), (after,) = run(linear, feeds), run(activated, feeds)
    assert np.linalg.norm(after - before) < 0.1 * np.linalg.norm(before - before.mean(axis=0))
    assert (before.argmax(1) == after.argmax(1)).mean() >= 0.98


# -- where it stays away ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            pair(first="32,32,1,1", second="32,32,3,3"),
            "neither a narrowing 1×1 in front nor a widening one behind",
        ),
        (pair(first="8,32,3,3"), "neither a narrowing 1×1 in front nor a widening one behind"),
        (
            pair("pads=[1,1,1,1]", first="8,32,3,3", second="32,8,1,1"),
            "the second Conv is padded, and the first is not 1×1",
        ),
        (pair(biases="a"), "the second Conv is padded, and the first has a bias"),
        (
            pair(behind='auto_pad="SAME_UPPER", strides=[2,2]'),
            "the padding of auto_pad depends on the size where there is a stride",
        ),
        (
            pair('auto_pad="SAME_UPPER", strides=[2,2]'),
            "the padding of auto_pad depends on the size where there is a stride",
        ),
        (pair(behind="group=2", second="32,4,3,3"), "second Conv: grouped: 2 groups"),
        (
            pair("group=8", "group=1", first="32,4,1,1", second="64,32,1,1").replace(
                "N,4,", "N,32,"
            ),
            "first Conv: grouped: 8 groups",
        ),
        (
            pair().replace("=> (float[] y)", "=> (float[] y, float[] z)"),
            "what lies between is read elsewhere too",
        ),
        (
            pair().replace("y = ", "u = Relu(z) y = ").replace("y)", "y, float[] u)", 1),
            "what lies between is read elsewhere too",
        ),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert_skipped(text, RELU, reason)


def test_a_weight_that_is_no_constant() -> None:
    text = pair().replace("] x)", "] x, float[8,32,1,1] v)").replace("<float[8,32,1,1] v, ", "<")
    assert_skipped(text, RELU, "first Conv: weight is not a constant")


def test_matrices() -> None:
    text = """
    head (float[N,32] x) => (float[N,10] y)
    <float[32,4] v, float[4,10] w, float[10] b>
    { z = MatMul(x, v)  y = Gemm(z, w, b) }
    """
    assert_skipped(text, RELU, "only between two Conv, not MatMul and Gemm")


def test_biases_beyond_their_type() -> None:
    text = pair(biases="b").replace("float[", "float16[")
    weights = {"v": np.full((8, 32, 1, 1), 6e3), "w": np.full((32, 8, 3, 3), 1e3)}
    assert_skipped(parse(text, weights), RELU, "the biases would not be finite in float16")


def test_a_bias_that_the_pass_itself_made_is_one() -> None:
    text = """
    chain (float[N,32,9,8] x) => (float[] y)
    <float[8,32,1,1] u, float[4,8,1,1] v, float[32,4,3,3] w>
    { t = Conv(x, u)  z = Conv(t, v)  y = Conv<pads=[1,1,1,1]>(z, w) }
    """
    outcome = apply(parse(text), RELU)
    assert outcome.rewrote == ["z"]
    assert outcome.reasons == {"y": "the second Conv is padded, and the first has a bias"}


# -- what other passes make of it -------------------------------------------------------------


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_a_bottleneck_with_a_relu_is_not_split_again(sides: Any) -> None:
    again = Bottleneck(rank=8, min_channels=8)
    wide = {"w": random_weight(np.random.default_rng(2), "w", (64, 64, 3, 3))}
    model = parse(PLAIN.replace("32", "64"), wide)
    linear = apply(model, Bottleneck(rank=16, sides=sides, min_channels=8)).model
    activated = apply(linear, RELU).model
    kernel = {"input": "y", "output": "y.core.bottleneck", "both": "y.core.bottleneck"}[sides]
    outcome = apply(activated, again)
    assert not outcome.rewrote
    assert outcome.reasons[kernel] == "has a 1×1 bottleneck already"


@pytest.mark.parametrize("name", ["z.bottleneck.relu_2", "z.relu", "bottleneck.relu"])
def test_a_relu_of_the_network_s_own_is_none(name: str) -> None:
    text = pair(first="32,64,1,1", second="64,32,3,3").replace("y = ", f"{name} = Relu(z) y = ")
    text = text.replace("(z, w", f"({name}, w")
    outcome = apply(parse(text), Bottleneck(rank=8, min_channels=8))
    assert outcome.rewrote == ([] if name == "z.bottleneck.relu_2" else ["y"])


def test_convolutions_are_not_merged_across_the_relu() -> None:
    # Rank 30 of 32 costs more than it saves: without the Relu they would be merged.
    text = pair("group=1", "group=1", first="30,32,1,1", second="32,30,1,1")
    model = parse(text)
    assert apply(model, MergeLinearConvs()).rewrote == ["y"]
    assert not apply(apply(model, RELU).model, MergeLinearConvs()).events
