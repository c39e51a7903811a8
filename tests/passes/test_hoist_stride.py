"""hoist-stride: how far a stride moves up, how exactly, and what keeps it where it is."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ASSETS,
    RANDOM_GRAPHS,
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    needs_assets,
    parse,
    parse_proto,
    random_feeds,
    random_weight,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pwopt.analysis import analyze
from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.hoist_stride import HoistStride
from pwopt.rewriting import Context, Judgement

HOIST = HoistStride()

HEADER = "net (float[N,3,H,W] x) => (float[] y) <float[4,3,3,3] w, float[5,4,1,1] v>"


def hoisted(model: Model | str, *, rtol: float = 1e-6) -> Outcome:
    """Apply the pass; assert that it moved something and that the numbers stay, at two sizes."""
    model = parse(model) if isinstance(model, str) else model
    outcome = apply(model, HOIST)
    assert outcome.rewrote
    for side in (8, 9):
        assert_same_numbers(outcome.model, model, rtol, side=side)
    return outcome


def strides(outcome: Outcome) -> dict[str, list[int]]:
    """Output of each Conv and MaxPool → its strides, where they are not all 1."""
    found = {}
    for node in outcome.proto.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Conv", "MaxPool") and max(attributes.get("strides", [1])) > 1:
            found[node.output[0]] = attributes["strides"]
    return found


# -- how far it goes --------------------------------------------------------------------------


def test_the_last_block_of_a_stage() -> None:
    before = """
    resnet (float[N,4,9,9] x) => (float[N,6,5,5] y, float[N,5,5,5] z, float[N,4,9,9] a)
    <float[4,4,1,1] u, float[4,4,3,3] w, float[4] b, float[4,4,1,1] v,
     float[6,4,1,1] p, float[5,4,1,1] q>
    {
      x1 = Relu(x)
      a = Conv(x1, u)
      a1 = Relu(a)
      c = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(a1, w, b)
      c1 = Relu(c)
      d = Conv<strides=[1,1]>(c1, v)
      e = Add(d, x1)
      e1 = Relu(e)
      y = Conv<strides=[2,2]>(e1, p)
      z = Conv<strides=[2,2]>(e1, q)
    }
    """
    after = """
    resnet (float[N,4,9,9] x) => (float[N,6,5,5] y, float[N,5,5,5] z, float[N,4,9,9] a)
    <float[4,4,1,1] u, float[4,4,3,3] w, float[4] b, float[4,4,1,1] v,
     float[6,4,1,1] p, float[5,4,1,1] q>
    {
      x1 = Relu(x)
      a = Conv(x1, u)
      a1 = Relu(a)
      c.strided = Conv<pads=[1,1,1,1], kernel_shape=[3,3], strides=[2,2]>(a1, w, b)
      c1.strided = Relu(c.strided)
      d.strided = Conv<strides=[1,1]>(c1.strided, v)
      x1.pick = MaxPool<kernel_shape=[1,1], strides=[2,2]>(x1)
      e.strided = Add(d.strided, x1.pick)
      e1.strided = Relu(e.strided)
      y = Conv<strides=[1,1]>(e1.strided, p)
      z = Conv<strides=[1,1]>(e1.strided, q)
    }
    """
    outcome = assert_pass(before, HOIST, after)
    event = outcome.events[0]
    assert (event.where, event.reason, event.data) == (
        "y",
        "stride moved up",
        {"convs": 2, "picks": 1},
    )
    hoisted(before, rtol=0)


def test_two_blocks_are_two_sites() -> None:
    outcome = hoisted(
        f"""{HEADER} <float[4,5,3,3] w2, float[5,4,1,1] v2>
        {{
          a = Conv<pads=[1,1,1,1]>(x, w)  b = Conv<strides=[2,2]>(a, v)
          c = Conv<pads=[1,1,1,1]>(b, w2)  y = Conv<strides=[2,2]>(c, v2)
        }}""".replace("> <", ", ")
    )
    assert outcome.rewrote == ["b", "y"]
    assert strides(outcome) == {"a.strided": [2, 2], "c.strided": [2, 2]}


def test_strides_multiply() -> None:
    text = f"""{HEADER} <float[4,5,1,1] u>
    {{ a = Conv<pads=[1,1,1,1], strides=[2,1]>(x, w)  b = Conv<strides=[2,2]>(a, v)
       c = Relu(b)  y = Conv<strides=[1,2]>(c, u) }}""".replace("> <", ", ")
    outcome = hoisted(text)
    assert strides(outcome) == {"a.strided": [4, 4]}
    assert outcome.rewrote == ["b"]


def test_a_map_goes_no_further_than_all_its_readers_allow() -> None:
    text = f"""{HEADER} <float[5,4,1,1] u>
    {{ a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)
       c = Conv<strides=[2,4]>(b, v)  d = Conv<strides=[4,2]>(b, u)
       e = ReduceMean<axes=[2,3]>(c)  f = ReduceMean<axes=[2,3]>(d)  y = Add(e, f) }}"""
    outcome = hoisted(text.replace("> <", ", "))
    assert strides(outcome) == {"a.strided": [2, 2], "c": [1, 2], "d": [2, 1]}


def test_an_operand_read_at_a_smaller_step_is_picked_behind_it() -> None:
    text = f"""{HEADER} <float[5,4,1,1] u>
    {{ a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  c = Sigmoid(b)
       d = Conv<strides=[2,2]>(b, v)  e = Conv<strides=[4,4]>(c, u)
       f = ReduceMean<axes=[2,3]>(d)  g = ReduceMean<axes=[2,3]>(e)  y = Add(f, g) }}"""
    outcome = hoisted(text.replace("> <", ", "))
    assert strides(outcome) == {"a.strided": [2, 2], "b.pick": [2, 2]}


def test_the_stride_moves_along_one_axis() -> None:
    text = f"{HEADER} {{ a = Conv(x, w)  y = Conv<strides=[2,1]>(a, v) }}"
    assert strides(hoisted(text)) == {"a.strided": [2, 1]}


def test_a_kernel_of_1_along_one_axis_is_enough() -> None:
    text = f"{HEADER} {{ a = Conv(x, w)  y = Conv<strides=[2,2], pads=[0,1,0,1]>(a, v) }}"
    text = text.replace("[5,4,1,1] v", "[5,4,1,3] v")
    assert strides(hoisted(text)) == {"a.strided": [2, 1], "y": [1, 2]}


def test_a_pointwise_convolution_takes_the_stride_itself() -> None:
    text = f"{HEADER} {{ a = Conv(x, w)  b = Relu(a)  y = Conv<strides=[2,2]>(b, v)  z = Neg(x) }}"
    text = text.replace("[4,3,3,3] w", "[4,3,1,1] w").replace("y)", "y, float[] z)")
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


def test_one_pick_serves_all() -> None:
    text = f"""{HEADER}
    {{ a = Relu(x)  b = Conv<pads=[1,1,1,1]>(a, w)  c = Conv<pads=[1,1,1,1]>(x, w)
       d = Add(b, a)  e = Mul(a, c)  f = Sub(d, e)  y = Conv<strides=[2,2]>(f, v) }}"""
    outcome = hoisted(text.replace("N,3", "N,4").replace("4,3,3,3", "4,4,3,3"))
    assert strides(outcome) == {"b.strided": [2, 2], "c.strided": [2, 2], "a.pick": [2, 2]}


def test_a_map_added_to_itself() -> None:
    text = f"{HEADER} {{ a = Conv(x, w)  b = Add(a, a)  y = Conv<strides=[2,2]>(b, v) }}"
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


@pytest.mark.parametrize(
    ("axes", "kernel"), [("H", "3"), ("H,W", "3,2"), ("H,W,D", "3,2,2")], ids=["1-D", "2-D", "3-D"]
)
def test_any_number_of_axes(axes: str, kernel: str) -> None:
    rank = kernel.count(",") + 1
    ones, twos = ",".join("1" * rank), ",".join("2" * rank)
    text = f"""net (float[N,4,{axes}] x) => (float[] y) <float[4,2,{kernel}] w, float[5,4,{ones}] v>
    {{ s = Sigmoid(x)  a = Conv<group=2, auto_pad="SAME_UPPER">(s, w)  b = Mul(a, s)
       y = Conv<strides=[{twos}]>(b, v) }}"""
    assert strides(hoisted(text)) == {"a.strided": [2] * rank, "s.pick": [2] * rank}


def test_four_axes_stay() -> None:
    text = """net (float[N,2,5,5,5,5] x) => (float[] y) <float[2,2,1,1,1,1] w>
    { a = Conv(x, w)  y = Conv<strides=[2,2,2,2]>(a, w) }"""
    assert_skipped(text, HOIST, "onnxruntime pools no maps of more than three spatial axes")


# -- the convolution that takes it ------------------------------------------------------------


@pytest.mark.parametrize("side", range(5, 12))
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        "pads=[0,0]",
        "pads=[1,1]",
        "pads=[0,1]",
        "pads=[2,0]",
        "strides=[2]",
        "strides=[3], pads=[1,0]",
        "dilations=[2]",
        "dilations=[2], strides=[2], pads=[3,2]",
        'auto_pad="VALID", strides=[2]',
        'auto_pad="SAME_UPPER"',
        'auto_pad="SAME_LOWER"',
    ],
)
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_sizes(side: int, stride: int, attributes: str, kernel: int) -> None:
    model = parse(
        f"""net (float[1,2,{side}] x) => (float[] y) <float[2,2,{kernel}] w, float[2,2,1] v>
        {{ a = Conv<{attributes}>(x, w)  y = Conv<strides=[{stride}]>(a, v) }}"""
    )
    outcome = apply(model, HOIST)
    assert len(outcome.rewrote) == 1
    feeds = random_feeds(model)
    assert_close(run(outcome.model, feeds), run(model, feeds), 1e-6)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("attribute", ["strides=[2,2]", "strides=[1,2]", "dilations=[2,1]"])
def test_same_pads_that_depend_on_the_size(pad: str, attribute: str) -> None:
    proto = parse_proto(
        f'{HEADER} {{ a = Conv<auto_pad="{pad}", {attribute}>(x, w)'
        " y = Conv<strides=[2,2]>(a, v) }"
    )
    rng = np.random.default_rng(0)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = random_weight(rng, info.name, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, info.name))
    del proto.graph.value_info[:]
    reason = f"the pads of auto_pad={pad} depend on the size"
    assert_skipped(checked(proto), HOIST, reason)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_kernel_of_1_is_not_padded_by_auto_pad(pad: str) -> None:
    text = f'{HEADER} {{ a = Conv(x, w)  y = Conv<auto_pad="{pad}", strides=[2,2]>(a, v) }}'
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("layer", ["a", "y"])
def test_auto_pad_and_pads_contradict_each_other(pad: str, layer: str) -> None:
    text = through("b = Relu(a)")
    if layer == "a":
        text = text.replace("pads=[1,1,1,1]", f'pads=[1,1,1,1], auto_pad="{pad}"')
    else:
        text = text.replace("strides=[2,2]", f'strides=[2,2], pads=[1,1,1,1], auto_pad="{pad}"')
    assert_skipped(text, HOIST, "the Conv has both auto_pad and pads")


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_onnxruntime_may_crop_for_a_kernel_of_1_and_a_stride_above_2(pad: str) -> None:
    conv = f'Conv<auto_pad="{pad}", strides=[3,3]>'
    reason = f"the pads of auto_pad={pad} depend on the size"
    assert_skipped(f"{HEADER} {{ a = Conv(x, w)  y = {conv}(a, v) }}", HOIST, reason)
    below = f"{{ a = {conv}(x, w)  y = Conv<strides=[2,2]>(a, v) }}"
    events = apply(parse(f"{HEADER.replace('4,3,3,3', '4,3,1,1')} {below}"), HOIST).events
    assert [(e.where, e.reason) for e in events] == [("a", reason), ("y", reason)]


def test_weights_may_be_anything() -> None:
    text = """net (float[N,3,8,8] x, float[4,3,3,3] w) => (float[] y) <float[5,4,1,1] v>
    { u = Neg(w)  a = Conv(x, u)  y = Conv<strides=[2,2]>(a, v) }"""
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


def test_a_shared_weight_stays_shared() -> None:
    text = f"""{HEADER.replace("4,3,3,3", "3,3,3,3").replace("5,4", "5,3")}
    {{ t = Conv(x, w)  a = Conv(t, w)  y = Conv<strides=[2,2]>(a, v) }}"""
    outcome = hoisted(text)
    assert strides(outcome) == {"a.strided": [2, 2]}
    assert [t.name for t in outcome.proto.graph.initializer] == ["w", "v"]


@pytest.mark.parametrize("weight", ["Reshape(x, s)", "Neg(w)"])
@pytest.mark.parametrize("attributes", ["", "<strides=[2,2]>"])
def test_an_unknown_kernel_stays(weight: str, attributes: str) -> None:
    text = f"""net (float[N,3,8,8] x, float[A,B,C,D] w, int64[E] s) => (float[N,5,R,S] y)
    <float[5,4,1,1] v>
    {{ u = {weight}  a = Conv{attributes}(x, u)  y = Conv<strides=[2,2]>(a, v) }}"""
    assert_skipped(text, HOIST, "the kernel of the Conv that writes 'a' is not known")


# -- what it passes through -------------------------------------------------------------------


def through(operators: str, weights: str = "", header: str = HEADER) -> str:
    """Write a network with `operators`, that make b of a, between the two convolutions."""
    header = header.replace("v>", f"v{weights}>")
    return (
        f"{header} {{ a = Conv<pads=[1,1,1,1]>(x, w) {operators} y = Conv<strides=[2,2]>(b, v) }}"
    )


@pytest.mark.parametrize(
    "operators",
    [
        *(f"b = {op}(a)" for op in ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Neg")),
        *(f"b = {op}(a)" for op in ("Elu", "Selu", "Softplus", "Softsign", "Erf", "Identity")),
        "b = LeakyRelu<alpha=0.3>(a)",
        "b = Clip(a, low, high)",
        "b = Clip(a, , high)",
        "b = Dropout(a)",
        "b = Dropout(a, low, no)",
        "c = Exp(a)  d = Abs(c)  e = Sqrt(d)  b = Log(e)",
        "c = Sigmoid(a)  b = Mul(a, c)",
        "c = Cast<to=11>(a)  d = Relu(c)  b = Cast<to=1>(d)",
    ],
)
def test_through_activations(operators: str) -> None:
    weights = ", float low = {0}, float high = {6}, bool no = {0}"
    assert "a.strided" in strides(hoisted(through(operators, weights)))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "PRelu", "Max", "Sum"])
@pytest.mark.parametrize("shape", ["", "1", "1,1", "4,1,1", "1,4,1,1"])
def test_through_arithmetic_with_constants(op: str, shape: str) -> None:
    kind = f"float[{shape}]" if shape else "float"
    outcome = hoisted(through(f"b = {op}(a, s)", f", {kind} s"))
    assert strides(outcome) == {"a.strided": [2, 2]}


def test_the_constant_may_come_first_and_from_a_node() -> None:
    text = through("s = Constant<value = float[4,1,1] {1, 2, 3, 4}>()  b = Div(s, a)")
    assert strides(hoisted(text, rtol=1e-5)) == {"a.strided": [2, 2]}


@pytest.mark.parametrize("op", ["Add", "Mul", "PRelu"])
@pytest.mark.parametrize("shape", ["8", "8,1", "4,8,1", "8,8", "1,4,8,8"])
def test_constants_that_vary_over_space(op: str, shape: str) -> None:
    text = through(f"b = {op}(a, s)", f", float[{shape}] s").replace("H,W", "8,8")
    assert_skipped(text, HOIST, f"the constant operand of {op} varies over space")


@pytest.mark.parametrize("shape", ["8,1", "1,4,8,1"])
def test_constants_may_vary_along_the_other_axis(shape: str) -> None:
    text = through("b = Mul(a, s)", f", float[{shape}] s").replace("H,W", "8,8")
    outcome = hoisted(text.replace("strides=[2,2]", "strides=[1,2]"))
    assert strides(outcome) == {"a.strided": [1, 2]}


def test_a_constant_that_enlarges_the_map() -> None:
    text = through("b = Mul(a, s)", ", float[4,5,5] s").replace("H,W", "1,1")
    assert_skipped(text, HOIST, "the constant operand of Mul varies over space")


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Sum", "Mean"])
def test_through_arithmetic_of_two_maps(op: str) -> None:
    text = f"""{HEADER.replace("v>", "v, float[4,3,1,1] u>")}
    {{ c = Conv<pads=[1,1,1,1]>(x, w)  d = Conv(x, u)  e = Exp(d)  b = {op}(c, e)
       y = Conv<strides=[2,2]>(b, v) }}"""
    assert strides(hoisted(text, rtol=1e-5)) == {"c.strided": [2, 2], "d.strided": [2, 2]}


def test_an_operand_per_image_and_channel_stays() -> None:
    text = through("s = GlobalAveragePool(x)  t = Conv(s, u)  b = Mul(a, t)", ", float[4,3,1,1] u")
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


def test_an_operand_that_may_be_of_size_1_is_picked() -> None:
    text = through("b = Mul(a, m)").replace("W] x", "W] x, float[N,4,P,Q] m")
    model = parse(text)
    outcome = apply(model, HOIST)
    assert strides(outcome) == {"a.strided": [2, 2], "m.pick": [2, 2]}
    for side in [(9, 9), (1, 9), (9, 1), (1, 1)]:
        feeds = random_feeds(model)
        feeds["m"] = np.random.default_rng(2).standard_normal((1, 4, *side)).astype(np.float32)
        assert_close(run(outcome.model, feeds), run(model, feeds), 1e-6)


def test_an_operand_without_all_axes() -> None:
    text = through("b = Mul(a, m)").replace("W] x", "W] x, float[H,W] m")
    assert_skipped(text, HOIST, "the operand 'm' of Mul lacks the batch or channel axis")


def test_an_operand_of_unknown_shape() -> None:
    text = through("m = Reshape(x, s)  b = Mul(a, m)")
    text = text.replace("W] x", "W] x, int64[R] s").replace("[] y", "[N,5,R,S] y")
    assert_skipped(text, HOIST, "the shape of 'm' is not known")


NORMS = ", float[4] gamma, float[4] beta, float[4] mean, float[4] var"


def test_through_batch_normalization() -> None:
    text = through("b = BatchNormalization(a, gamma, beta, mean, var)", NORMS)
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


def test_batch_normalization_in_training_mode() -> None:
    norm = "b, m, n = BatchNormalization<training_mode=1>(a, gamma, beta, mean, var)"
    assert_skipped(through(norm, NORMS), HOIST, "BatchNormalization has a second output")


@pytest.mark.parametrize("mode", ["yes", "maybe"])
def test_dropout_that_may_be_in_training_mode(mode: str) -> None:
    text = through(f"b = Dropout(a, r, {mode})", ", float r = {0.5}, bool yes = {1}")
    if mode == "maybe":
        text = text.replace("W] x", "W] x, bool maybe")
    assert_skipped(text, HOIST, "Dropout is in training mode")


def test_dropout_with_a_mask() -> None:
    assert_skipped(through("b, m = Dropout(a)"), HOIST, "Dropout has a second output")


@pytest.mark.parametrize(
    "operator",
    [
        "MaxPool<kernel_shape=[2,2]>(a)",
        "Softmax<axis=1>(a)",
        "Transpose<perm=[0,1,3,2]>(a)",
        "LRN<size=3>(a)",
        "GlobalAveragePool(a)",
    ],
)
def test_not_through_other_operators(operator: str) -> None:
    op = operator.partition("<")[0].partition("(")[0]
    assert_skipped(through(f"b = {operator}"), HOIST, f"{op} cannot skip positions")


def test_not_through_an_operator_of_another_domain() -> None:
    model = parse(through("b = Relu(a)").replace("[] y", "[N,5,R,S] y"))
    model.proto.opset_import.add(domain="acme", version=1)
    model.proto.graph.node[1].domain = "acme"
    assert_skipped(model, HOIST, "Relu cannot skip positions")


# -- who else reads ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "op"),
    [
        ("z = Neg(b)", "Neg"),
        ("z = Conv(b, v)", "Conv"),
        ("z = Conv<strides=[1,1]>(b, v)", "Conv"),
        ("z = Conv<strides=[2,2], pads=[1,1,1,1]>(b, v)", "Conv"),
        ("z = Conv<strides=[2,2]>(b, k)", "Conv"),
        ("z = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)", "MaxPool"),
        ("z = GlobalAveragePool(b)", "GlobalAveragePool"),
        ("z = Shape(b)", "Shape"),
        ("z = ConvTranspose<strides=[2,2]>(b, k)", "ConvTranspose"),
        ("z = Conv<strides=[2,2]>(u, b)", "Conv"),
    ],
)
def test_another_reader_needs_all(other: str, op: str) -> None:
    text = through(f"b = Relu(a) {other}", ", float[4,4,2,2] k, float[1,4,9,9] u")
    kind = "int64[]" if op == "Shape" else "float[]"
    kind = kind if "u, b" not in other else "float[1,N,R,S]"
    model = parse(text.replace("[] y)", f"[] y, {kind} z)"))
    outcome = apply(model, HOIST)
    assert not outcome.rewrote
    assert outcome.reasons["y"] == f"{op} reads all of 'b'"


def test_strides_without_a_common_factor() -> None:
    text = through("b = Relu(a)  z = Conv<strides=[3,3]>(b, v)").replace(
        "[] y)", "[] y, float[] z)"
    )
    reason = "the readers of 'b' have strides without a common factor"
    assert apply(parse(text), HOIST).reasons == {"y": reason, "z": reason}


def test_strides_along_different_axes() -> None:
    text = through("b = Relu(a)  z = Conv<strides=[1,3]>(b, v)").replace(
        "[] y)", "[] y, float[] z)"
    )
    reason = "the readers of 'b' have strides without a common factor"
    text = text.replace("strides=[2,2]", "strides=[2,1]")
    assert apply(parse(text), HOIST).reasons == {"y": reason, "z": reason}


def test_the_map_is_an_output() -> None:
    text = through("b = Relu(a)").replace("[] y)", "[] y, float[] b)")
    assert_skipped(text, HOIST, "'b' is an output of the model")


def test_an_inner_map_is_an_output() -> None:
    text = through("b = Relu(a)").replace("[] y)", "[] y, float[] a)")
    assert_skipped(text, HOIST, "'a' is an output of the model")


def test_a_subgraph_reads_the_map() -> None:
    text = through(
        "b = Relu(a)"
        " z = If(c) <then_branch = t () => (float[N,4,H,W] p) { p = Neg(b) },"
        " else_branch = e () => (float[N,4,H,W] q) { q = Conv<pads=[1,1,1,1]>(x, w) }>"
    )
    text = text.replace("W] x", "W] x, bool c").replace("[] y)", "[] y, float[N,4,H,W] z)")
    assert_skipped(text, HOIST, "Neg reads all of 'b'")


def test_a_strided_convolution_in_a_subgraph_does_not_count() -> None:
    text = through(
        "b = Relu(a)"
        " z = If(c) <then_branch = t () => (float[N,5,H,W] p) { p = Conv<strides=[2,2]>(b, v) },"
        " else_branch = e () => (float[N,5,H,W] q) { q = Conv<strides=[2,2]>(x, u) }>",
        ", float[5,3,1,1] u",
    )
    text = text.replace("W] x", "W] x, bool c").replace("[] y)", "[] y, float[N,5,R,S] z)")
    text = text.replace("[N,5,H,W]", "[N,5,R,S]")
    assert_skipped(text, HOIST, "Conv reads all of 'b'")


def test_nothing_above() -> None:
    text = "net (float[N,4,8,8] x) => (float[] y) <float[5,4,1,1] v>"
    strided = "y = Conv<strides=[2,2]>"
    assert_skipped(f"{text} {{ {strided}(x, v) }}", HOIST, "no layer computes 'x'")
    assert_skipped(f"{text} {{ a = Relu(x) {strided}(a, v) }}", HOIST, "no layer computes 'x'")


def test_no_convolution_above() -> None:
    text = through("b = Relu(a)", header=HEADER.replace("N,3", "N,4"))
    text = text.replace("Conv<pads=[1,1,1,1]>(x, w)", "MaxPool<kernel_shape=[3,3]>(x)")
    assert_skipped(text, HOIST, "MaxPool cannot skip positions")


@pytest.mark.parametrize("pads", ["1,1,1,1", "0,1,1,0"])
def test_a_padded_pointwise_convolution(pads: str) -> None:
    text = through("b = Relu(a)").replace("strides=[2,2]", f"strides=[2,2], pads=[{pads}]")
    assert_skipped(text, HOIST, "it is padded")


@pytest.mark.parametrize(
    "network",
    [
        "{ a = Conv<strides=[2,2]>(x, w)  y = Conv(a, v) }",
        "{ a = Conv(x, w)  y = Conv(a, v) }",
        "{ a = Conv(x, w)  y = MaxPool<kernel_shape=[1,1], strides=[2,2]>(a) }",
    ],
)
def test_what_is_no_site(network: str) -> None:
    assert apply(parse(f"{HEADER} {network}"), HOIST).events == []


# -- types and opsets -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_types(kind: str) -> None:
    text = through(
        "c = Relu(a)  d = Relu(x)  e = Conv(d, w2)  b = Sum(c, d, e)", ", float[4,4,1,1] w2"
    )
    text = text.replace("N,3", "N,4").replace("4,3", "4,4").replace("float", kind)
    text = text.replace("H,W", "9,8")
    outcome = hoisted(text, rtol=1e-3 if kind == "float16" else 1e-9)
    assert strides(outcome) == {"a.strided": [2, 2], "x.pick": [2, 2]}


def test_integer_maps() -> None:
    text = through("c = Cast<to=6>(a)  d = Add(c, i)  b = Cast<to=1>(d)")
    text = text.replace("W] x", "W] x, int32[N,4,H,W] i")
    reason = "'d' is not known to be float16, float32 or float64"
    assert_skipped(text, HOIST, reason)


def test_bfloat16_maps() -> None:
    header = '<ir_version: 10, opset_import: ["" : 22]>'
    text = f"{header} {through('b = Relu(a)')}".replace("float[", "bfloat16[")
    reason = "'a' is not known to be float16, float32 or float64"
    assert_skipped(text, HOIST, reason)


def test_before_opset_7() -> None:
    header = '<ir_version: 8, opset_import: ["" : 6]>'
    text = f"{header} {through('b = Relu(a)')}".replace("H,W", "8,8")
    assert_skipped(text, HOIST, "before opset 7, Relu has other rules")


def test_convolutions_before_opset_7() -> None:
    header = '<ir_version: 8, opset_import: ["" : 6]>'
    text = f"{header} {through('')}".replace("(b, v)", "(a, v)").replace("H,W", "8,8")
    assert strides(hoisted(text)) == {"a.strided": [2, 2]}


# -- the judge --------------------------------------------------------------------------------


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay", {"ratio": 0.9})


def test_a_judge_that_refuses() -> None:
    model = parse(through("b = Relu(a)"))
    before = model.to_proto().SerializeToString(deterministic=True)
    events = list(HOIST.apply(model, Context(judge=refuse)))
    assert [(e.kind, e.reason, e.data["ratio"]) for e in events] == [
        ("skipped", "does not pay", 0.9)
    ]
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_the_judge_sees_the_whole_region() -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def judge(model: Model, edit: Edit, *, free: bool) -> Judgement:
        seen.append(([n.op for n in edit.old], [n.op for n in edit.new]))
        return Judgement(True, "")

    model = parse(through("c = Relu(a)  b = Add(c, m)").replace("W] x", "W] x, float[N,4,H,W] m"))
    list(HOIST.apply(model, Context(judge=judge)))
    ops = ["Conv", "Relu", "Add", "Conv"]
    assert seen == [(ops, ["Conv", "Relu", "MaxPool", "Add", "Conv"])]


# -- random graphs ----------------------------------------------------------------------------

SIDES = ((7, 6), (10, 9))
CHANNELS = 2


class Network:
    """A network that grows layer by layer; knows the size of each map at both `SIDES`."""

    def __init__(self, draw: Callable[..., Any], *, known: bool) -> None:
        self.draw = draw
        self.known = known
        self.maps: dict[str, tuple[tuple[int, ...], ...]] = {"x": SIDES[:1] if known else SIDES}
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.rng = np.random.default_rng(draw(st.integers(0, 99)))

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, inputs: list[str], sizes: Any, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.maps[name] = sizes
        return name

    def any_map(self) -> str:
        """One of the latest maps, most of the time the very last."""
        names = list(self.maps)
        back = self.draw(st.sampled_from([1, 1, 1, 1, 2, 3, 5]))
        return names[-min(back, len(names))]

    def conv(self, tensor: str, *, strided: bool = False) -> None:
        draw = self.draw
        axis = st.sampled_from
        pointwise = strided or draw(st.booleans())
        kernel = [1, 1] if pointwise else draw(axis([[3, 3], [2, 2], [1, 3], [3, 2]]))
        stride = [1, 1]
        if strided:
            stride = draw(axis([[2, 2]] * 6 + [[2, 1], [4, 2], [3, 3], [4, 4]]))
        elif draw(st.integers(0, 7)) == 0:
            stride = draw(axis([[2, 2], [1, 2]]))
        dilation, pads = [1, 1], [0, 0, 0, 0]
        attributes: dict[str, Any] = {}
        auto = draw(axis(["NOTSET"] * 5 + ["SAME_UPPER", "SAME_LOWER", "VALID"]))
        if auto != "NOTSET":
            attributes["auto_pad"] = auto
        else:
            if not pointwise:
                pads = draw(axis([[1, 1, 1, 1]] * 4 + [[0, 0, 0, 0], [0, 1, 1, 0], [2, 1, 0, 1]]))
                dilation = draw(axis([[1, 1]] * 4 + [[2, 1]]))
            elif draw(st.integers(0, 9)) == 0:
                pads = [1, 0, 1, 0]
            attributes |= {"pads": pads, "dilations": dilation}
        if draw(st.booleans()):
            attributes["kernel_shape"] = kernel
        group = draw(axis([1, 1, 2]))
        sizes = []
        for size in self.maps[tensor]:
            if auto.startswith("SAME"):
                sizes.append(tuple(-(-n // s) for n, s in zip(size, stride, strict=True)))
                continue
            sizes.append(
                tuple(
                    (size[i] + pads[i] + pads[i + 2] - dilation[i] * (kernel[i] - 1) - 1)
                    // stride[i]
                    + 1
                    for i in range(2)
                )
            )
        if min(min(size) for size in sizes) < 1:
            return
        weights = [self.weight(CHANNELS, CHANNELS // group, *kernel)]
        if draw(st.booleans()):
            weights.append(self.weight(CHANNELS))
        inputs = [tensor, *weights]
        self.add("Conv", inputs, tuple(sizes), strides=stride, group=group, **attributes)

    def unary(self, tensor: str) -> None:
        op = self.draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish", "Identity", "Dropout"]))
        self.add(op, [tensor], self.maps[tensor])

    def norm(self, tensor: str) -> None:
        parameters = [self.weight(CHANNELS) for _ in range(3)]
        variance = numpy_helper.from_array(np.ones(CHANNELS, np.float32), f"w{len(self.weights)}")
        self.weights.append(variance)
        inputs = [tensor, *parameters, variance.name]
        self.add("BatchNormalization", inputs, self.maps[tensor])

    def constant(self, tensor: str) -> None:
        shapes = [(CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (), (1,)]
        if self.known:
            height, width = self.maps[tensor][0]
            shapes += [(width,), (height, 1), (CHANNELS, height, width)]
        op = self.draw(st.sampled_from(["Add", "Mul", "Sub", "PRelu"]))
        self.add(op, [tensor, self.weight(*self.draw(st.sampled_from(shapes)))], self.maps[tensor])

    def pair(self, tensor: str) -> None:
        others = [name for name, sizes in self.maps.items() if sizes == self.maps[tensor]]
        others = [name for name in others if name != tensor] or others
        op = self.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"]))
        self.add(op, [tensor, self.draw(st.sampled_from(others))], self.maps[tensor])

    def gate(self, tensor: str) -> None:
        source = self.draw(st.sampled_from([tensor, "x"]))
        ones = ((1, 1),) * len(self.maps[tensor])
        pooled = self.add("GlobalAveragePool", [source], ones)
        del self.maps[pooled]
        self.add("Mul", [tensor, pooled], self.maps[tensor])

    def model(self) -> Model:
        heads = [n.output[0] for n in self.nodes if not self._read(n.output[0])]
        also = self.draw(st.sampled_from([*[None] * 5, *self.maps]))
        outputs = dict.fromkeys([*heads, *([also] if also not in (None, "x") else [])])
        size: list[Any] = list(SIDES[0]) if self.known else ["H", "W"]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, *size])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        opset = helper.make_opsetid("", 17)
        return checked(helper.make_model(graph, opset_imports=[opset], ir_version=8))

    def _read(self, name: str) -> bool:
        return any(name in node.input for node in self.nodes)


@st.composite
def networks(draw: Callable[..., Any]) -> Any:
    """Draw a few layers with strided 1×1 convolutions behind them."""
    network = Network(draw, known=draw(st.booleans()))
    layers = [network.conv, network.conv, network.unary, network.pair, network.pair]
    layers += [network.constant, network.norm, network.gate]
    network.conv("x")
    for _ in range(draw(st.integers(1, 7))):
        draw(st.sampled_from(layers))(network.any_map())
    last = list(network.maps)[-1]
    for _ in range(draw(st.integers(1, 2))):
        network.conv(draw(st.sampled_from([last, last, network.any_map()])), strided=True)
    if draw(st.integers(0, 3)) == 0:
        network.conv(list(network.maps)[-1], strided=True)
    return network.model()


@settings(max_examples=RANDOM_GRAPHS)
@given(networks())
def test_random_networks(model: Model) -> None:
    outcome = apply(model, HOIST)
    before = model.to_proto().SerializeToString(deterministic=True)
    refused = list(HOIST.apply(model, Context(judge=refuse)))
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert [e.where for e in refused] == [e.where for e in outcome.events]
    if not outcome.rewrote:
        return
    rng = np.random.default_rng(0)
    symbolic = not model.proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    for batch, side in zip((1, 3), SIDES if symbolic else SIDES[:1] * 2, strict=True):
        feeds = {"x": rng.standard_normal((batch, CHANNELS, *side)).astype(np.float32)}
        assert_close(run(outcome.model, feeds), run(model, feeds), 1e-5)


# -- the real thing ---------------------------------------------------------------------------


@needs_assets
def test_resnet50(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["unpack.py", str(tmp_path)])
    runpy.run_path(str(ASSETS / "unpack.py"), run_name="__main__")
    model = Model.load(tmp_path / "resnet50_imagenet.onnx")
    feeds = random_feeds(model)
    expected = run(model, feeds)
    macs = analyze(model).totals.macs

    list(FoldAffine().apply(model, Context()))
    events = list(HOIST.apply(model, Context()))
    assert [e.where for e in events] == ["bn3a_branch2a", "bn4a_branch2a", "bn5a_branch2a"]
    assert all((e.kind, e.data) == ("rewrote", {"convs": 2, "picks": 1}) for e in events)
    assert not [e for e in HOIST.apply(model, Context()) if e.kind == "rewrote"]
    assert analyze(model).totals.macs <= 0.91 * macs
    assert_close(run(model, feeds), expected)
