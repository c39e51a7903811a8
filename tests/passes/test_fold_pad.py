"""fold-pad: which padding moves, that it pads the same, and what stays for which reason."""

import numpy as np
import pytest
from helpers import (
    RANDOM_GRAPHS,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    parse,
    random_feeds,
    random_weight,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.passes.fold_pad import FoldPad
from pwopt.rewriting import Judgement

FOLD = FoldPad()


HEADER = "pad (float[N,4,7,7] x) => (float[] y)"

CONV = "y = Conv(t, w)"

AVERAGE = "y = AveragePool<kernel_shape=[3,3]>(t)"

MAXIMUM = "y = MaxPool<kernel_shape=[3,3]>(t)"

SPATIAL = "int64[8] p = {0, 0, 1, 0, 0, 0, 2, 1}"


def padded(reader: str, amounts: str = SPATIAL, attributes: str = "", inputs: str = "") -> Model:
    """A Pad with `reader` behind it."""
    weight = ", float[6,4,3,3] w" if "w)" in reader else ""
    nodes = f"{{ t = Pad{attributes}(x, p{inputs})  {reader} }}"
    return parse(f"{HEADER} <{amounts}{weight}> {nodes}")


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay")


# -- what moves -------------------------------------------------------------------------------


def test_into_a_conv() -> None:
    before = f"""
    {HEADER}
    <{SPATIAL}, float[6,4,3,3] w, float[6] b>
    {{ t = Pad(x, p)  y = Conv<pads=[1,1,0,3], strides=[2,1]>(t, w, b) }}
    """
    after = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b>
    {{ y = Conv<pads=[2,1,2,4], strides=[2,1]>(x, w, b) }}
    """
    outcome = assert_pass(before, FOLD, after)
    assert [(e.where, e.reason) for e in outcome.events] == [("t", "Pad folded")]


def test_a_valid_conv_pads_by_itself_from_then_on() -> None:
    before = f"""
    {HEADER} <{SPATIAL}, float[6,4,3,3] w>
    {{ t = Pad(x, p)  y = Conv<auto_pad="VALID">(t, w) }}
    """
    after = f"{HEADER} <float[6,4,3,3] w> {{ y = Conv<pads=[1,0,2,1]>(x, w) }}"
    assert_pass(before, FOLD, after)


def test_padding_wider_than_the_kernel_of_a_conv() -> None:
    model = padded(CONV, "int64[8] p = {0, 0, 4, 0, 0, 0, 5, 9}")
    assert apply(model, FOLD).rewrote == ["t"]
    assert_same_numbers(apply(model, FOLD).model, model)


def test_into_an_average_pool() -> None:
    before = f"{HEADER} <{SPATIAL}> {{ t = Pad(x, p)  {AVERAGE} }}"
    after = f"""
    {HEADER}
    {{ y = AveragePool<kernel_shape=[3,3], pads=[1,0,2,1], count_include_pad=1>(x) }}
    """
    assert_pass(before, FOLD, after)


def test_into_an_average_pool_that_counts_its_padding() -> None:
    before = f"""
    {HEADER} <int64[8] p = {{0, 0, 1, 0, 0, 0, 1, 1}}>
    {{
      t = Pad(x, p)
      y = AveragePool<kernel_shape=[3,3], pads=[1,1,0,1], count_include_pad=1>(t)
    }}
    """
    after = f"""
    {HEADER}
    {{ y = AveragePool<kernel_shape=[3,3], pads=[2,1,1,2], count_include_pad=1>(x) }}
    """
    assert_pass(before, FOLD, after)


@pytest.mark.parametrize("value", [0.0, -1.0, -np.inf])
@pytest.mark.parametrize("before", ["Relu(x)", "Sigmoid(x)", "Clip(x, zero)"])
def test_into_a_max_pool_behind_what_is_never_negative(value: float, before: str) -> None:
    text = f"""
    {HEADER} <{SPATIAL}, float zero = {{0}}, float v>
    {{ r = {before}  t = Pad(r, p, v)  {MAXIMUM} }}
    """
    model = parse(text, {"v": np.array(value)})
    outcome = apply(model, FOLD)
    assert [node.op_type for node in outcome.proto.graph.node][1:] == ["MaxPool"]
    assert_same_numbers(outcome.model, model)


def test_infinity_into_a_max_pool() -> None:
    text = f"{HEADER} <{SPATIAL}, float v> {{ t = Pad(x, p, v)  {MAXIMUM} }}"
    model = parse(text, {"v": np.array(-np.inf)})
    outcome = apply(model, FOLD)
    assert outcome.rewrote == ["t"]
    assert_same_numbers(outcome.model, model)


def test_into_all_readers() -> None:
    before = f"""
    pad (float[N,4,7,7] x) => (float[] y, float[] z, float[] a) <{SPATIAL}, float[6,4,3,3] w>
    {{
      t = Pad(x, p)
      a = AveragePool<kernel_shape=[3,3]>(t)
      y = Conv(t, w)
      z = Conv<dilations=[2,2]>(t, w)
    }}
    """
    after = """
    pad (float[N,4,7,7] x) => (float[] y, float[] z, float[] a) <float[6,4,3,3] w>
    {
      a = AveragePool<kernel_shape=[3,3], pads=[1,0,2,1], count_include_pad=1>(x)
      y = Conv<pads=[1,0,2,1]>(x, w)
      z = Conv<dilations=[2,2], pads=[1,0,2,1]>(x, w)
    }
    """
    assert_pass(before, FOLD, after)


def test_two_pads_in_a_row() -> None:
    before = f"""
    {HEADER} <{SPATIAL}, float[6,4,3,3] w>
    {{ s = Pad(x, p)  t = Pad(s, p)  y = Conv(t, w) }}
    """
    after = f"{HEADER} <float[6,4,3,3] w> {{ y = Conv<pads=[2,0,4,2]>(x, w) }}"
    assert_pass(before, FOLD, after)


@pytest.mark.parametrize(
    ("size", "kernel", "amounts"),
    [("9", "3", "0,0,1,0,0,2"), ("5,6,4", "3,3,2", "0,0,1,0,2,0,0,0,1,1")],
)
def test_one_and_three_dimensions(size: str, kernel: str, amounts: str) -> None:
    count = len(amounts.split(","))
    text = f"""
    pad (float[N,4,{size}] x) => (float[] y)
    <int64[{count}] p = {{{amounts}}}, float[6,4,{kernel}] w> {{ t = Pad(x, p)  {CONV} }}
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    assert outcome.rewrote == ["t"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize("opset", [2, 7, 10])
def test_amounts_as_attributes(opset: int) -> None:
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    {HEADER} <float[6,4,3,3] w>
    {{ t = Pad<pads=[0,0,1,0,0,0,2,1], value=0.0>(x)  {CONV} }}
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    assert outcome.rewrote == ["t"]
    if opset >= 7:  # onnxruntime starts there
        assert_same_numbers(outcome.model, model)


def test_amounts_of_opset_1() -> None:
    text = f"""<ir_version: 7, opset_import: ["" : 1]>
    pad (float[N,4,7,7] x) => (float[N,6,8,6] y) <float[6,4,3,3] w>
    {{ t = Pad<paddings=[0,0,1,0,0,0,2,1]>(x)  {CONV} }}
    """
    (node,) = apply(parse(text), FOLD).proto.graph.node
    assert {a.name: list(a.ints) for a in node.attribute} == {"pads": [1, 0, 2, 1]}


@pytest.mark.parametrize(
    ("axes", "amounts", "pads"),
    [
        ("2,3", "1,0,2,1", [1, 0, 2, 1]),
        ("-1,-2", "0,1,1,2", [1, 0, 2, 1]),
        ("3", "4,5", [0, 4, 0, 5]),
        ("1,2", "0,3,0,1", [3, 0, 1, 0]),
    ],
)
def test_axes(axes: str, amounts: str, pads: list[int]) -> None:
    count, sides = (len(text.split(",")) for text in (axes, amounts))
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    {HEADER}
    <float[6,4,3,3] w, int64[{count}] a = {{{axes}}}, int64[{sides}] p = {{{amounts}}}>
    {{ t = Pad(x, p, , a)  {CONV} }}
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    (node,) = outcome.proto.graph.node
    assert {a.name: list(a.ints) for a in node.attribute} == {"pads": pads}
    assert_same_numbers(outcome.model, model)


def test_open_sizes_and_computed_constants() -> None:
    text = """
    pad (float[N,4,H,W] x) => (float[] y) <float[6,4,3,3] w>
    {
      p = Constant<value_ints = [0, 0, 1, 0, 0, 0, 2, 1]>()
      v = Constant<value_float = 0.0>()
      q = Identity(p)
      t = Pad(x, q, v)
      y = Conv(t, w)
    }
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    assert [node.op_type for node in outcome.proto.graph.node] == ["Conv"]
    assert_same_numbers(outcome.model, model)


def test_a_weight_that_is_an_input() -> None:
    text = f"""
    pad (float[N,4,7,7] x, float[6,4,3,3] w) => (float[] y) <{SPATIAL}>
    {{ t = Pad(x, p)  y = Conv<kernel_shape=[3,3]>(t, w) }}
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    assert outcome.rewrote == ["t"]
    assert_same_numbers(outcome.model, model)


def test_what_the_judge_refuses_stays() -> None:
    outcome = apply(padded(CONV), FOLD, judge=refuse)
    assert outcome.reasons == {"t": "does not pay"}


# -- what is left alone -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_modes(mode: str) -> None:
    model = padded(CONV, attributes=f'<mode="{mode}">')
    assert_skipped(model, FOLD, f"Pad is in mode {mode}", "t")


@pytest.mark.parametrize(
    ("amounts", "reason"),
    [
        ("0,1,1,0,0,0,2,1", "Pad pads more than the spatial axes"),
        ("1,0,1,0,0,0,2,1", "Pad pads more than the spatial axes"),
        ("0,0,1,0,0,0,2,-1", "Pad crops"),
    ],
)
def test_amounts(amounts: str, reason: str) -> None:
    text = f"""
    pad (float[N,4,7,7] x) => (float[] y) <int64[8] p = {{{amounts}}}, float[6,C,3,3] w>
    {{ t = Pad(x, p)  {CONV} }}
    """
    assert_skipped(text.replace("C", "5" if amounts[2] == "1" else "4", 1), FOLD, reason, "t")


@pytest.mark.parametrize(
    ("reader", "value", "reason"),
    [
        (CONV, 1.0, "Pad fills with 1, but Conv with 0"),
        (AVERAGE, 1.0, "Pad fills with 1, but AveragePool with 0"),
        (MAXIMUM, 0.0, "Pad fills with 0, which a MaxPool could take for the maximum"),
        (MAXIMUM, -1e30, "Pad fills with -1e+30, which a MaxPool could take for the maximum"),
    ],
)
def test_fills(reader: str, value: float, reason: str) -> None:
    weight = ", float[6,4,3,3] w" if "w)" in reader else ""
    text = f"{HEADER} <{SPATIAL}, float v{weight}> {{ t = Pad(x, p, v)  {reader} }}"
    assert_skipped(parse(text, {"v": np.array(value)}), FOLD, reason, "t")


@pytest.mark.parametrize("before", ["Relu(x)", "Clip(x, least)"])
def test_a_fill_above_the_least(before: str) -> None:
    text = f"""
    {HEADER} <{SPATIAL}, float least = {{-1}}, float v = {{0.5}}>
    {{ r = {before}  t = Pad(r, p, v)  {MAXIMUM} }}
    """
    reason = "Pad fills with 0.5, which a MaxPool could take for the maximum"
    assert_skipped(text, FOLD, reason, "t")


def test_zeros_around_what_may_be_negative() -> None:
    text = f"""
    {HEADER} <{SPATIAL}, float least = {{-1}}> {{ r = Clip(x, least)  t = Pad(r, p)  {MAXIMUM} }}
    """
    reason = "Pad fills with 0, which a MaxPool could take for the maximum"
    assert_skipped(text, FOLD, reason, "t")


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("op", ["Conv", "AveragePool", "MaxPool"])
def test_layers_that_pad_by_themselves(mode: str, op: str) -> None:
    inputs = "t, w" if op == "Conv" else "t"
    model = padded(f'y = {op}<kernel_shape=[3,3], auto_pad="{mode}">({inputs})')
    assert_skipped(model, FOLD, f"the {op} pads by itself ({mode})", "t")


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (
            "y = AveragePool<kernel_shape=[3,3], pads=[0,0,0,1]>(t)",
            "the AveragePool counts Pad's zeros, but not its own",
        ),
        (
            "y = AveragePool<kernel_shape=[3,3], ceil_mode=1, strides=[2,2]>(t)",
            "the AveragePool is in ceil_mode",
        ),
        (
            "y = AveragePool<kernel_shape=[2,3]>(t)",
            "the padding would be as wide as the AveragePool's window",
        ),
        (
            "y, i = MaxPool<kernel_shape=[3,3]>(t)  z = Identity(i)",
            "MaxPool gives out indices, which count the padding",
        ),
        ("y = MaxPool<kernel_shape=[3,3], dilations=[1,2]>(t)", "the MaxPool is dilated"),
        ("y = Conv<dilations=[1,1]>(t, w)  z = Relu(t)", "Relu reads its output too"),
    ],
)
def test_readers(reader: str, reason: str) -> None:
    model = padded(reader, inputs="").proto
    if " z" in reader:
        kind = TensorProto.INT64 if "Identity" in reader else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info("z", kind, None))
    assert_skipped(checked(model), FOLD, reason, "t")


def test_an_output_in_the_middle() -> None:
    text = f"""
    pad (float[N,4,7,7] x) => (float[] y, float[] t) <{SPATIAL}, float[6,4,3,3] w>
    {{ t = Pad(x, p)  {CONV} }}
    """
    assert_skipped(text, FOLD, "its output is an output of the model", "t")


def test_a_subgraph_that_reads_the_output() -> None:
    text = f"""
    pad (float[N,4,7,7] x, bool c) => (float[] y, float[] z) <{SPATIAL}, float[6,4,3,3] w>
    {{
      t = Pad(x, p)
      {CONV}
      z = If(c) <
        then_branch = yes () => (float[] one) {{ one = Conv(t, w) }},
        else_branch = no () => (float[] two) {{ two = Relu(t) }}
      >
    }}
    """
    assert_skipped(text, FOLD, "its output is read in a subgraph", "t")


def test_an_image_that_is_a_kernel() -> None:
    text = """
    pad (float[6,4,3,3] x) => (float[] y) <int64[8] p = {0,0,1,1,0,0,1,1}, float[2,4,9,9] w>
    { t = Pad(x, p)  y = Conv(w, t) }
    """
    assert_skipped(text, FOLD, "Conv reads its output as a weight", "t")


@pytest.mark.parametrize("what", ["p", "v"])
def test_what_is_not_constant(what: str) -> None:
    declared = {"p": "int64[8] p", "v": "float v"}
    fixed = {"p": SPATIAL, "v": "float v = {0}"}
    fixed.pop(what)
    text = f"""
    pad (float[N,4,7,7] x, {declared[what]}) => (float[] y)
    <{", ".join(fixed.values())}, float[6,4,3,3] w> {{ t = Pad(x, p, v)  {CONV} }}
    """
    reason = {"p": "Pad's amounts are not constant", "v": "Pad's fill is not a constant"}[what]
    assert_skipped(text, FOLD, reason, "t")


def test_before_opset_7_average_pool_counts_no_padding() -> None:
    text = f"""<ir_version: 7, opset_import: ["" : 6]>
    {HEADER} {{ t = Pad<pads=[0,0,1,0,0,0,2,1]>(x)  {AVERAGE} }}
    """
    assert_skipped(text, FOLD, "before opset 7, AveragePool counts no padding", "t")


def test_pads_in_front_of_others_are_no_sites() -> None:
    assert apply(padded("y = Relu(t)"), FOLD).events == []


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw a Pad in front of one or two convolutions or pools."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    amount = st.sampled_from([0, 0, 1, 1, 2, 3, -1])
    pads = [0, 0, draw(amount), draw(amount), 0, 0, draw(amount), draw(amount)]
    value = draw(st.sampled_from([0.0, 0.0, 0.0, -1.0, 1.0, -np.inf]))
    mode = draw(st.sampled_from(["constant", "constant", "constant", "edge"]))
    before = draw(st.sampled_from(["Relu", "Identity", "Sigmoid"]))
    nodes = [
        helper.make_node(before, ["x"], ["r"]),
        helper.make_node("Pad", ["r", "p", "v"], ["t"], mode=mode),
    ]
    outputs = []
    for i in range(draw(st.integers(1, 2))):
        op = draw(st.sampled_from(["Conv", "AveragePool", "MaxPool", "MaxPool", "Relu"]))
        if op == "Conv" and value == -np.inf:
            op = "MaxPool"  # infinity times a weight is no number to compare
        attributes = {} if op == "Relu" else draw(windows(op))
        inputs = ["t", "w"] if op == "Conv" else ["t"]
        nodes.append(helper.make_node(op, inputs, [f"y{i}"], **attributes))
        outputs.append(f"y{i}")
    weights = {
        "p": np.array(pads),
        "v": np.float32(value),
        "w": random_weight(rng, "w", [3, 2, 3, 3]).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 7, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@st.composite
def windows(draw: st.DrawFn, op: str) -> dict[str, object]:
    """Draw the attributes of a sliding window of 3×3."""
    own = st.sampled_from([0, 0, 0, 1])
    step = st.sampled_from([1, 2])
    attributes: dict[str, object] = {
        "kernel_shape": [3, 3],
        "strides": [draw(step), draw(step)],
        "pads": [draw(own) for _ in range(4)],
    }
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER"]))
    if auto != "NOTSET":
        del attributes["pads"]
        attributes["auto_pad"] = auto
    if op != "Conv" and auto == "NOTSET":
        attributes["ceil_mode"] = draw(st.sampled_from([0, 0, 1]))
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    return attributes


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    outcome = apply(model, FOLD)
    for batch in (1, 3):
        feeds = random_feeds(model, batch=batch)
        actual, expected = run(outcome.model, feeds), run(model, feeds)
        # A window of nothing but padding gives −∞, which has no relative error.
        assert_close(*([np.maximum(v, -1e3) for v in side] for side in (actual, expected)))
    apply(model, FOLD, judge=refuse)
