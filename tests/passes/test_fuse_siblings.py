"""fuse-siblings: what is fused, to the bit, and what is left alone for which reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    RANDOM_GRAPHS,
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    checked,
    parse,
    random_feeds,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.passes.fuse_siblings import FuseSiblings
from pwopt.rewriting import Judgement

Array = npt.NDArray[Any]

FUSE = FuseSiblings()

HEADER = "g (float[N,4,7,7] x) => (float[] y, float[] z)"
WEIGHTS = "<float[6,4,1,1] w, float[2,4,1,1] v, float[6] b, float[2] c>"

ALONE = "no sibling has the same strides and pads"


def opset(version: int) -> str:
    return f'<ir_version: 8, opset_import: ["" : {version}]>'


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay")


def fused(text: str | Model, where: list[str] | None = None) -> Outcome:
    """Apply the pass; assert where it fused and that the numbers stay."""
    model = parse(text) if isinstance(text, str) else text
    outcome = apply(model, FUSE)
    assert outcome.rewrote == (where or ["y"])
    assert_same_numbers(outcome.model, model)
    return outcome


def ops(outcome: Outcome) -> list[str]:
    return [node.op_type for node in outcome.proto.graph.node]


# -- what is fused ----------------------------------------------------------------------------

AFTER = f"""
{HEADER}
<float[8,4,1,1] y.siblings.weight, float[8] y.siblings.bias, int64[2] y.split = {{6, 2}}>
{{
  y.siblings = Conv<kernel_shape=[1,1], strides=[1,1], pads=[0,0,0,0]>(
    x, y.siblings.weight, y.siblings.bias)
  y, z = Split<axis=1>(y.siblings, y.split)
}}
"""


def test_two_siblings() -> None:
    outcome = assert_pass(
        f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}", FUSE, AFTER
    )
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("y", "2 siblings fused into one Conv", {"siblings": 2})
    ]


def test_weights_and_biases_stay_as_they_are() -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}")
    before, after = values(model.proto), values(fused(model).proto)
    weight, bias = after["y.siblings.weight"], after["y.siblings.bias"]
    assert np.array_equal(weight, np.concatenate([before["w"], before["v"]]))
    assert np.array_equal(bias, np.concatenate([before["b"], before["c"]]))
    assert after["y.split"].tolist() == [6, 2]


@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_bias_is_zero(empty: bool) -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v, c) }}")
    if empty:
        model.proto.graph.node[0].input.append("")
    bias = values(fused(model).proto)["y.siblings.bias"]
    assert bias.tolist() == [0] * 6 + values(model.proto)["c"].tolist()


def test_no_bias_at_all() -> None:
    outcome = fused(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v) }}")
    assert outcome.proto.graph.node[0].input == ["x", "y.siblings.weight"]


@pytest.mark.parametrize("version", [7, 11, 12])
def test_split_has_an_attribute_before_opset_13(version: int) -> None:
    before = f"{opset(version)} {HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}"
    after = f"""{opset(version)}
    {HEADER}
    <float[8,4,1,1] y.siblings.weight, float[8] y.siblings.bias>
    {{
      y.siblings = Conv<kernel_shape=[1,1], strides=[1,1], pads=[0,0,0,0]>(
        x, y.siblings.weight, y.siblings.bias)
      y, z = Split<axis=1, split=[6,2]>(y.siblings)
    }}
    """
    assert_pass(before, FUSE, after)


@pytest.mark.parametrize("version", [13, 18, 21])
def test_split_has_an_input_from_opset_13_on(version: int) -> None:
    before = f"{opset(version)} {HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}"
    assert_pass(before, FUSE, f"{opset(version)} {AFTER}")


def test_many_siblings_with_something_between_them() -> None:
    text = """
    g (float[N,4,7,7] x) => (float[] y, float[] p, float[] q)
    <float[6,4,1,1] w, float[2,4,1,1] v, float[1,4,1,1] u, float[3,6,1,1] r, float[2] c>
    {
      e = Relu(x)
      y = Conv(e, w)
      s = Relu(y)
      p = Conv(s, r)
      z = Conv(e, v, c)
      a = Conv(e, u)
      q = Concat<axis=1>(a, z, s)
    }
    """
    outcome = fused(text)
    assert ops(outcome) == ["Relu", "Conv", "Split", "Relu", "Conv", "Concat"]


def test_the_conv_stands_behind_what_writes_its_input() -> None:
    text = """
    g (float[N,4,7,7] x) => (float[] z, float[] y)
    { w = Constant<value = float[1,4,1,1] {1, 2, 3, 4}>()
      e = Relu(x)
      y = Conv(e, w)
      v = Constant<value = float[1,4,1,1] {5, 6, 7, 8}>()
      b = Constant<value = float[1] {9}>()
      z = Conv(e, v, b) }
    """
    outcome = fused(text)
    assert ops(outcome) == ["Relu", "Conv", "Split"]
    assert values(outcome.proto)["y.siblings.weight"].ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("spatial", ["7", "7,6", "4,5,3"])
@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (2, 0), (3, 1)])
def test_any_number_of_axes(spatial: str, stride: int, pad: int) -> None:
    rank = spatial.count(",") + 1
    ones = ",1" * rank
    geometry = f"<strides={[stride] * rank}, pads={[0] * rank + [pad] * rank}>"
    fused(f"""
    g (float[N,4,{spatial}] x) => (float[] y, float[] z)
    <float[6,4{ones}] w, float[2,4{ones}] v, float[2] c>
    {{ y = Conv{geometry}(x, w)  z = Conv{geometry}(x, v, c) }}
    """)


def test_a_map_of_any_size() -> None:
    text = f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}"
    model = parse(text.replace("7,7", "H,W"))
    outcome = apply(model, FUSE)
    assert outcome.rewrote == ["y"]
    for side in (1, 6):
        assert_same_numbers(outcome.model, model, side=side)


@pytest.mark.parametrize("kind", ["float16", "float", "double"])
def test_types(kind: str) -> None:
    text = f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v, c) }}"
    fused(text.replace("float[", f"{kind}["))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dilations=[2,3]", "dilations=[1,1]"),
        ("dilations=[2,3]", "kernel_shape=[1,1]"),
        ('auto_pad="SAME_UPPER"', 'auto_pad="VALID"'),
        ('auto_pad="SAME_LOWER", strides=[2,1]', "strides=[2,1]"),
        ('auto_pad="NOTSET", pads=[0,1,2,0]', "pads=[0,1,2,0]"),
        ("group=1", "strides=[1,1]"),
    ],
)
def test_the_same_written_otherwise(one: str, other: str) -> None:
    fused(f"{HEADER} {WEIGHTS} {{ y = Conv<{one}>(x, w, b)  z = Conv<{other}>(x, v, c) }}")


def test_unlike_siblings_make_groups_of_like_ones() -> None:
    text = """
    g (float[N,4,7,7] x) => (float[] a, float[] b, float[] c, float[] d, float[] e)
    <float[1,4,1,1] u, float[2,4,1,1] v, float[3,4,1,1] w>
    {
      a = Conv(x, u)
      b = Conv<strides=[2,2]>(x, v)
      c = Conv<pads=[1,1,1,1]>(x, w)
      d = Conv<strides=[2,2]>(x, w)
      e = Conv(x, w)
    }
    """
    outcome = fused(text, ["a", "b"])
    assert outcome.reasons == {"c": ALONE}


# -- who reads what ---------------------------------------------------------------------------


def test_outputs_that_others_read_and_that_are_given_out() -> None:
    """A neighbour's rewrite leaves a model that cannot be loaded."""
    text = f"""
    g (float[N,4,7,7] x) => (float[] y, float[] p, float[] q, float[] s) {WEIGHTS}
    {{
      y = Conv(x, w, b)
      z = Conv(x, v, c)
      p = Relu(z)
      q = Sigmoid(z)
      s = Concat<axis=1>(y, z)
    }}
    """
    outcome = fused(text)
    assert ops(outcome) == ["Conv", "Split", "Relu", "Sigmoid", "Concat"]


def test_an_output_that_nobody_reads() -> None:
    fused(f"g (float[N,4,7,7] x) => (float[] y) {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v) }}")


@pytest.mark.parametrize("condition", [True, False])
def test_a_subgraph_may_read_input_and_outputs(condition: bool) -> None:
    text = f"""
    g (float[N,4,7,7] x, bool d) => (float[] y, float[N,2,7,7] r) {WEIGHTS}
    {{
      y = Conv(x, w, b)
      z = Conv(x, v, c)
      r = If(d) <
        then_branch = yes () => (float[N,2,7,7] one) {{ one = Relu(z) }},
        else_branch = no () => (float[N,2,7,7] two) {{ two = Conv(x, v) }}
      >
    }}
    """
    model = parse(text)
    outcome = apply(model, FUSE)
    assert outcome.rewrote == ["y"]
    assert outcome.proto.graph.node[-1] == model.proto.graph.node[-1]
    feeds = random_feeds(model) | {"d": np.array(condition)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_siblings_that_share_a_weight() -> None:
    weight = values(fused(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, w) }}").proto)
    first, second = np.split(weight["y.siblings.weight"], 2)
    assert np.array_equal(first, second)


def test_one_conv_twice() -> None:
    fused(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, w, b) }}")


def test_weights_shared_between_sites_stay_shared() -> None:
    text = f"""
    g (float[N,4,7,7] x, float[N,4,7,7] e) => (float[] p, float[] q, float[] r, float[] s) {WEIGHTS}
    {{ p = Conv(x, w)  q = Conv(x, v, c)  r = Conv(e, w)  s = Conv(e, v, c) }}
    """
    outcome = fused(text, ["p", "r"])
    first, _, second, _ = outcome.proto.graph.node
    assert first.input[1:] == second.input[1:] == ["p.siblings.weight", "p.siblings.bias"]
    names = {tensor.name for tensor in outcome.proto.graph.initializer}
    assert names == {"b", "p.siblings.weight", "p.siblings.bias", "p.split", "r.split"}


def test_a_weight_that_others_read_too_stays() -> None:
    text = f"""
    g (float[N,4,7,7] x) => (float[] y, float[] z, float[] p) {WEIGHTS}
    {{ y = Conv(x, w)  z = Conv(x, v)  s = Relu(x)  p = Conv(s, v) }}
    """
    model = parse(text)
    assert np.array_equal(values(fused(model).proto)["v"], values(model.proto)["v"])


def test_names_that_are_taken_stay_with_their_owner() -> None:
    text = """
    g (float[N,4,7,7] x) => (float[] y, float[] y.siblings, float[] y.split)
    <float[6,4,1,1] y.siblings.weight, float[2,4,1,1] v>
    { y = Conv(x, y.siblings.weight)  y.siblings = Conv(x, v)  y.split = Relu(x) }
    """
    conv, split, _ = fused(text).proto.graph.node
    assert conv.input == ["x", "y.siblings.weight_2"]
    assert split.input == ["y.siblings_2", "y.split_2"]
    assert split.output == ["y", "y.siblings"]


@pytest.mark.parametrize("name", ["", "same"])
def test_empty_and_repeated_names(name: str) -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v) }}")
    for node in model.proto.graph.node:
        node.name = name
    assert apply(model, FUSE).rewrote == ["y"]


# -- what is left alone -----------------------------------------------------------------------


def test_larger_kernels_with_other_dilations_are_no_sites() -> None:
    """A neighbour's rewrite fuses these and is wrong by 0.59."""
    text = f"{HEADER} <float[6,4,3,3] w, float[2,4,3,3] v>"
    body = "y = Conv<pads=[1,1,1,1]>(x, w)  z = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, v)"
    assert apply(parse(f"{text} {{ {body} }}"), FUSE).events == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("strides=[2,2]", "strides=[1,1]"),
        ("strides=[2,1]", "strides=[1,2]"),
        ("pads=[1,1,1,1]", "pads=[0,0,0,0]"),
        ("pads=[1,0,0,0]", "pads=[0,0,1,0]"),
        ("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"'),
    ],
)
def test_other_strides_and_pads(one: str, other: str) -> None:
    text = f"{HEADER} {WEIGHTS} {{ y = Conv<{one}>(x, w, b)  z = Conv<{other}>(x, v, c) }}"
    assert apply(parse(text), FUSE).reasons == {"y": ALONE, "z": ALONE}


def test_auto_pad_and_pads_contradict_each_other() -> None:
    attributes = 'auto_pad="VALID", pads=[1,1,1,1]'
    text = f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv<{attributes}>(x, v) }}"
    reason = "the Conv has both auto_pad and pads"
    assert apply(parse(text), FUSE).reasons == {"y": ALONE, "z": reason}


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [3, 4, 5])
def test_onnxruntime_may_crop_for_a_large_stride(pad: str, stride: int) -> None:
    strides = f"strides=[1,{stride}]"
    text = f'{HEADER} {WEIGHTS} {{ y = Conv<auto_pad="{pad}", {strides}>(x, w, b)'
    text += f"  z = Conv<{strides}>(x, v, c) }}"
    reason = f"auto_pad={pad} with such strides crops"
    assert apply(parse(text), FUSE).reasons == {"y": reason, "z": ALONE}


def test_groups() -> None:
    text = f"{HEADER} <float[6,4,1,1] w, float[6,2,1,1] v>"
    outcome = apply(parse(f"{text} {{ y = Conv(x, w)  z = Conv<group=2>(x, v) }}"), FUSE)
    assert outcome.reasons == {"y": ALONE, "z": "the Conv has 2 groups"}


@pytest.mark.parametrize(
    ("name", "dims", "reason"),
    [
        ("v", [2, 4, 1, 1], "the Conv's weight is not a constant"),
        ("c", [2], "the Conv's bias is not a constant"),
    ],
)
def test_constants_that_the_caller_may_override(name: str, dims: list[int], reason: str) -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ y = Conv(x, w, b)  z = Conv(x, v, c) }}")
    model.proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    assert apply(model, FUSE).reasons == {"y": ALONE, "z": reason}


def test_a_quantized_weight() -> None:
    text = f"{HEADER} <int8[6,4,1,1] q, float s, float[2,4,1,1] v>"
    body = "w = DequantizeLinear(q, s)  y = Conv<kernel_shape=[1,1]>(x, w)  z = Conv(x, v)"
    outcome = apply(parse(f"{text} {{ {body} }}"), FUSE)
    assert outcome.reasons == {"y": "the Conv's weight is not a constant", "z": ALONE}


def test_bfloat16() -> None:
    text = f"{HEADER} {WEIGHTS} {{ y = Conv(x, w)  z = Conv(x, v) }}".replace("float[", "bfloat16[")
    outcome = apply(parse(f'<ir_version: 10, opset_import: ["" : 22]> {text}'), FUSE)
    reason = "the Conv's weight is bfloat16"
    assert outcome.reasons == {"y": reason, "z": reason}


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv(x, w)  z = Relu(x)",
        "y = Conv(x, w)  e = Relu(x)  z = Conv(e, v)",
        "y = Conv(x, w)  z = Conv(y, r)",
        "y = Conv(x, w)  z = Conv(x, k)",
        "y = Conv(x, w)  z = ConvTranspose(x, t)",
    ],
)
def test_no_sites(body: str) -> None:
    weights = f"{WEIGHTS[:-1]}, float[2,6,1,1] r, float[2,4,1,2] k, float[4,2,1,1] t>"
    assert apply(parse(f"{HEADER} {weights} {{ {body} }}"), FUSE).events == []


def test_what_the_judge_refuses_stays_and_the_rest_goes_on() -> None:
    text = f"""
    g (float[N,4,7,7] x, float[N,4,7,7] e) => (float[] p, float[] q, float[] r, float[] s) {WEIGHTS}
    {{ p = Conv(x, w)  q = Conv(x, v, c)  r = Conv(e, w)  s = Conv(e, v, c) }}
    """
    model = parse(text)
    outcome = apply(model, FUSE, judge=refuse)
    assert outcome.reasons == {"p": "does not pay", "r": "does not pay"}

    def judge(model: Model, edit: Edit, *, free: bool) -> Judgement:
        return Judgement(edit.new[0].name == "r.siblings", "no")

    outcome = apply(model, FUSE, judge=judge)
    assert (outcome.rewrote, outcome.reasons) == (["r"], {"p": "no"})
    assert_same_numbers(outcome.model, model)


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw a tensor with several Convs that read it, alike and not, and readers of theirs."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    version = draw(st.sampled_from([11, 17, 18]))
    axes = draw(st.sampled_from([1, 2]))
    size = draw(st.integers(3, 6))
    nodes: list[NodeProto] = []
    outputs: list[str] = []
    weights: dict[str, Array] = {}
    sources = ["x"]
    if draw(st.booleans()):
        nodes.append(helper.make_node("Relu", ["x"], ["e"]))
        sources.append("e")
    for i in range(draw(st.integers(2, 4))):
        group, kernel = draw(st.sampled_from([(1, 1)] * 8 + [(2, 1), (1, 2)]))
        weight = draw(st.sampled_from([f"w{i}", f"w{i}", "w0"]))
        if weight not in weights or weights[weight].shape[1:] != (2 // group, *[kernel] * axes):
            weight, wide = f"w{i}", draw(st.sampled_from([2, 4]))
            weights[weight] = random_weight(rng, "w", [wide, 2 // group, *[kernel] * axes])
        read = [draw(st.sampled_from(sources)), weight]
        if draw(st.booleans()):
            weights[f"b{i}"] = rng.standard_normal(len(weights[weight]))
            read.append(f"b{i}")
        attributes = draw(geometries(axes))
        nodes.append(helper.make_node("Conv", read, [f"t{i}"], group=group, **attributes))
        reader = draw(st.sampled_from(["output", "Relu", "both", "output"]))
        if reader != "output":
            nodes.append(helper.make_node("Relu", [f"t{i}"], [f"r{i}"]))
            outputs.append(f"r{i}")
        if reader != "Relu":
            outputs.append(f"t{i}")
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, *[size] * axes])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", version)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@st.composite
def geometries(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    """Draw the attributes of a Conv, most often the same ones, such as onnxruntime takes."""
    attributes: dict[str, Any] = {}
    strides = draw(st.sampled_from([None, None, 1, 2, 3, 4, 5]))
    if strides:
        attributes["strides"] = [strides] * axes
    auto_pad = draw(st.sampled_from([None] * 6 + ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto_pad:
        attributes["auto_pad"] = auto_pad
    if auto_pad in (None, "NOTSET"):
        attributes["pads"] = draw(st.sampled_from([[0, 0], [0, 0], [1, 1], [0, 1]])) * axes
        attributes["dilations"] = [draw(st.sampled_from([1, 1, 2]))] * axes
    return attributes


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    expected = run(model, random_feeds(model))
    outcome = apply(model, FUSE)
    assert_close(run(outcome.model, random_feeds(model)), expected)
    apply(model, FUSE, judge=refuse)
