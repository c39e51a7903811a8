"""bottleneck: the graph it makes, the numbers it makes, and where it stays away.

The result cannot equal the original, so it is compared with the original whose weights are those
that the new 1×1 and k×k weights multiply to.
"""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from helpers import (
    ASSETS,
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    needs_assets,
    parse,
    random_feeds,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pwopt.analysis import analyze, size
from pwopt.candidates import Choice
from pwopt.data import Samples
from pwopt.errors import DataError, ModelError, SpecError
from pwopt.model import Model
from pwopt.passes.bottleneck import Bottleneck
from pwopt.registry import pipeline
from pwopt.rewriting import Context
from pwopt.shapes import inputs

Array = npt.NDArray[Any]

INPUT = Bottleneck(rank=8, sides="input", min_channels=8)
OUTPUT = Bottleneck(rank=8, sides="output", min_channels=8)
BOTH = Bottleneck(rank=8, sides="both", min_channels=8)
AUTO = Bottleneck(rank=8, min_channels=8)
EVERY = pytest.mark.parametrize("step", [INPUT, OUTPUT, BOTH, AUTO], ids=lambda s: s.sides)

PLAIN = """
conv (float[N,32,H,W] x) => (float[N,32,Hy,Wy] y)
<float[32,32,3,3] w, float[32] b>
{ y = Conv<pads=[1,1,1,1]>(x, w, b) }
"""


def conv(attributes: str) -> Model:
    """Make a model of one Conv with a bias."""
    text = f"""
    conv (float[N,32,10,9] x) => (float[] y)
    <float[32,32,3,3] w, float[32] b>
    {{ y = Conv<{attributes}>(x, w, b) }}
    """
    return parse(text)


def composed(before: ModelProto, after: ModelProto, site: str) -> Array:
    """Multiply the weights of the convolutions that took the place of `site`."""
    source = next(n for n in before.graph.node if site in n.output).input[0]
    writers = {n.output[0]: n for n in after.graph.node}
    weights = values(after)
    node = writers[site]
    weight = weights[node.input[1]].astype(np.float64)
    while node.input[0] != source:
        node = writers[node.input[0]]
        assert len(node.input) == 2  # a bias would leak into the padding
        weight = np.einsum("or...,ri...->oi...", weight, weights[node.input[1]].astype(np.float64))
    return weight


def with_composed_weights(before: Model, outcome: Outcome) -> Model:
    """Return the original with the weights that the rewritten convolutions amount to."""
    proto = before.to_proto()
    after = outcome.proto
    for node in proto.graph.node:
        if node.output and node.output[0] in outcome.rewrote:
            weight = composed(before.to_proto(), after, node.output[0])
            kind = proto.graph.input[0].type.tensor_type.elem_type
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            node.input[1] = f"{node.output[0]} composed"
            proto.graph.initializer.append(
                numpy_helper.from_array(weight.astype(dtype), node.input[1])
            )
    return Model(proto)


def split(model: Model, step: Bottleneck, *, rtol: float = 1e-4, **sizes: int) -> Outcome:
    """Apply the pass; assert that every Conv was split, right to the numbers."""
    outcome = apply(model, step)
    assert outcome.rewrote == [n.output[0] for n in model.proto.graph.node if n.op_type == "Conv"]
    assert_same_numbers(outcome.model, with_composed_weights(model, outcome), rtol, **sizes)
    return outcome


# -- the graph it makes -----------------------------------------------------------------------


def test_input_side() -> None:
    after = """
    conv (float[N,32,H,W] x) => (float[N,32,Hy,Wy] y)
    <float[8,32,1,1] y.reduce.weight, float[32,8,3,3] y.core.weight, float[32] b>
    {
      y.reduce = Conv<kernel_shape=[1,1]>(x, y.reduce.weight)
      y = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(y.reduce, y.core.weight, b)
    }
    """
    outcome = assert_pass(PLAIN, INPUT, after)
    event = outcome.events[0]
    assert event.reason == "split on input at rank 8"
    assert event.data["params"] == size(outcome.model).params
    assert event.data["macs"] == size(outcome.model).macs


def test_output_side() -> None:
    after = """
    conv (float[N,32,H,W] x) => (float[N,32,Hy,Wy] y)
    <float[8,32,3,3] y.core.weight, float[32,8,1,1] y.expand.weight, float[32] b>
    {
      y.core = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, y.core.weight)
      y = Conv<kernel_shape=[1,1]>(y.core, y.expand.weight, b)
    }
    """
    assert_pass(PLAIN, OUTPUT, after)


def test_both_sides() -> None:
    after = """
    conv (float[N,32,H,W] x) => (float[N,32,Hy,Wy] y)
    <float[8,32,1,1] y.reduce.weight, float[8,8,3,3] y.core.weight,
     float[32,8,1,1] y.expand.weight, float[32] b>
    {
      y.reduce = Conv<kernel_shape=[1,1]>(x, y.reduce.weight)
      y.core = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(y.reduce, y.core.weight)
      y = Conv<kernel_shape=[1,1]>(y.core, y.expand.weight, b)
    }
    """
    assert_pass(PLAIN, BOTH, after)


def test_all_that_concerns_the_kernel_stays_with_it() -> None:
    model = conv("strides=[2,1], pads=[1,0,2,1], dilations=[1,2], group=1")
    after = split(model, BOTH, side=9).proto
    reduce, core, expand = after.graph.node
    for node in (reduce, expand):
        assert [a.name for a in node.attribute] == ["kernel_shape"]
    attributes = {a.name: helper.get_attribute_value(a) for a in core.attribute}
    assert attributes == {
        "strides": [2, 1],
        "pads": [1, 0, 2, 1],
        "dilations": [1, 2],
        "group": 1,
        "kernel_shape": [3, 3],
    }


def test_new_nodes_are_named_after_the_layer() -> None:
    model = parse(PLAIN)
    model.proto.graph.node[0].name = "features.3"
    names = [n.name for n in apply(model, BOTH).proto.graph.node]
    assert names == ["features.3.reduce", "features.3.core", "features.3.expand"]


def test_a_layer_without_a_name_lends_its_output_s() -> None:
    names = [n.name for n in apply(parse(PLAIN), INPUT).proto.graph.node]
    assert names == ["y.reduce", "y.core"]


def test_repeated_node_names_become_unique_ones() -> None:
    model = parse(TWO)
    for node in model.proto.graph.node:
        node.name = "same"
    names = [n.name for n in apply(model, INPUT).proto.graph.node]
    assert names == ["same.reduce", "same.core", "same.reduce_2", "same.core_2"]


@pytest.mark.parametrize("taken", ["y.core", "y.core.weight", "y.reduce"])
def test_names_that_are_taken_stay_with_their_owner(taken: str) -> None:
    text = f"""
    conv (float[N,32,9,9] x) => (float[N,32,9,9] y, float[N,32,9,9] {taken})
    <float[32,32,3,3] w>
    {{
      {taken} = Relu(x)
      y = Conv<pads=[1,1,1,1]>(x, w)
    }}
    """
    after = split(parse(text), BOTH).proto
    assert after.graph.output[1].name == taken
    names = [t.name for t in after.graph.initializer]
    names += [name for node in after.graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert f"{taken}_2" in names


def test_the_name_of_an_unused_initializer_is_taken_too() -> None:
    model = parse(PLAIN)
    unused = numpy_helper.from_array(np.arange(3.0), "y.core.weight")
    model.proto.graph.initializer.append(unused)
    after = apply(model, OUTPUT).proto
    assert unused in after.graph.initializer
    assert after.graph.node[0].input[1] == "y.core.weight_2"


def test_a_name_inside_a_subgraph_is_taken_too() -> None:
    text = CAPTURED.replace("inner", "y.core")
    after = apply(parse(text), OUTPUT).proto
    assert after.graph.node[0].output[0] == "y.core_2"


# -- the numbers it makes ---------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(
    "attributes",
    [
        "group=1",
        "pads=[1,1,1,1]",
        "pads=[0,2,1,0]",
        "strides=[2,2], pads=[1,1,1,1]",
        "strides=[3,1]",
        "dilations=[2,3], pads=[2,3,2,3]",
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER", strides=[2,2]',
        'auto_pad="SAME_UPPER"',
        'auto_pad="VALID"',
        'auto_pad="NOTSET", kernel_shape=[3,3]',
    ],
)
def test_attributes(attributes: str, step: Bottleneck) -> None:
    split(conv(attributes), step)


@EVERY
def test_without_a_bias(step: Bottleneck) -> None:
    text = PLAIN.replace(", float[32] b", "").replace("w, b)", "w)")
    split(parse(text), step)


def test_an_empty_bias_is_none() -> None:
    model = parse(PLAIN.replace(", float[32] b", "").replace("w, b)", "w)"))
    model.proto.graph.node[0].input.append("")
    after = split(model, OUTPUT).proto
    assert [len(node.input) for node in after.graph.node] == [2, 2]


def test_shapes_that_only_the_caller_knows() -> None:
    model = parse(PLAIN.replace("[N,32,H,W]", "[N,C,H,W]"))
    with pytest.raises(ModelError, match="leaves its channels open"):
        apply(model, INPUT)
    outcome = apply(model, INPUT, shapes={"x": (1, 32, 6, 5)})
    assert outcome.events[0].data["macs"] == 30 * 8 * (32 + 32 * 9)


@EVERY
def test_open_height_and_width(step: Bottleneck) -> None:
    outcome = apply(parse(PLAIN), step)
    wanted = with_composed_weights(parse(PLAIN), outcome)
    for side in (5, 12):
        assert_same_numbers(outcome.model, wanted, side=side)


@EVERY
@pytest.mark.parametrize(("dims", "kernel"), [("20", "5"), ("5,6,4", "3,3,3"), ("6,7", "1,3")])
def test_other_kernels(dims: str, kernel: str, step: Bottleneck) -> None:
    text = f"""
    conv (float[N,32,{dims}] x) => (float[] y)
    <float[48,32,{kernel}] w, float[48] b>
    {{ y = Conv(x, w, b) }}
    """
    split(parse(text), step)


@EVERY
def test_float16(step: Bottleneck) -> None:
    model = parse(PLAIN.replace("float[", "float16["))
    outcome = split(model, step, rtol=2e-2)
    assert {t.data_type for t in outcome.proto.graph.initializer} == {TensorProto.FLOAT16}


@EVERY
def test_float64(step: Bottleneck) -> None:
    model = parse(PLAIN.replace("float[", "double["))
    outcome = split(model, step, rtol=1e-12)
    assert {t.data_type for t in outcome.proto.graph.initializer} == {TensorProto.DOUBLE}


def low_rank(shape: tuple[int, ...], sides: str, rank: int) -> Array:
    """Draw a weight whose channels on `sides` span no more than `rank` dimensions."""
    rng = np.random.default_rng(5)
    out_channels, in_channels, *kernel = shape
    weight = random_weight(rng, "w", shape)
    if sides in ("input", "both"):
        narrow = rng.standard_normal((out_channels, rank, *kernel))
        weight = np.einsum("or...,ri->oi...", narrow, rng.standard_normal((rank, in_channels)))
    if sides in ("output", "both"):
        weight = np.einsum(
            "or,ri...->oi...", rng.standard_normal((out_channels, rank)), weight[:rank]
        )
    return weight / np.sqrt(weight.var() * prod(shape[1:]))


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_a_weight_of_low_rank_loses_nothing(sides: str) -> None:
    model = parse(PLAIN, {"w": low_rank((32, 32, 3, 3), sides, 8)})
    outcome = apply(model, Bottleneck(rank=8, sides=sides, min_channels=8))  # type: ignore[arg-type]
    assert_same_numbers(outcome.model, model)
    assert outcome.events[0].data["kept_energy"] == 1


@pytest.mark.parametrize(
    ("sides", "shape"), [("input", (64, 33, 5, 5)), ("output", (33, 64, 5, 5))]
)
def test_one_channel_less_loses_nothing_where_it_is_the_rank(
    sides: Any, shape: tuple[int, ...]
) -> None:
    dims = ",".join(map(str, shape))
    text = f"""
    conv (float[N,{shape[1]},9,9] x) => (float[N,{shape[0]},9,9] y)
    <float[{dims}] w, float[{shape[0]}] b>
    {{ y = Conv<pads=[2,2,2,2]>(x, w, b) }}
    """
    model = parse(text, {"w": low_rank(shape, sides, 32)})
    outcome = split(model, Bottleneck(rank=32, sides=sides))
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 6e4), ("float", 3e38)])
def test_weights_whose_factors_would_overflow(dtype: str, size: float) -> None:
    text = PLAIN.replace("float", dtype)
    weight = np.full((32, 32, 3, 3), size) * np.sign(low_rank((32, 32, 3, 3), "input", 8))
    model = parse(text, {"w": weight})
    kind = "float16" if dtype == "float16" else "float32"
    assert_skipped(model, INPUT, f"the split would not be finite in {kind}")


def test_auto_takes_the_side_that_loses_nothing() -> None:
    for sides in ("input", "output"):
        model = parse(PLAIN, {"w": low_rank((32, 32, 3, 3), sides, 8)})
        assert apply(model, AUTO).events[0].data["sides"] == sides


def test_auto_chooses_for_each_layer() -> None:
    weights = {f"w{i}": low_rank((64, 64, 3, 3), s, 8) for i, s in ((1, "input"), (2, "output"))}
    events = apply(parse(TWO.replace("32", "64"), weights), AUTO).events
    assert [e.data["sides"] for e in events] == ["input", "output"]


TWO = """
two (float[N,32,9,9] x) => (float[N,32,9,9] z)
<float[32,32,3,3] w1, float[32,32,3,3] w2, float[32] b>
{
  y = Conv<pads=[1,1,1,1]>(x, w1, b)
  z = Conv<pads=[1,1,1,1]>(y, w2, b)
}
"""


# -- weights in all places --------------------------------------------------------------------


@EVERY
def test_layers_that_follow_each_other(step: Bottleneck) -> None:
    outcome = split(parse(TWO), step)
    assert len(outcome.rewrote) == 2
    assert [t.name for t in outcome.proto.graph.initializer].count("b") == 1


SHARED = """
shared (float[N,32,9,9] x) => (float[] z)
<float[32,32,3,3] w, float[32] b>
{
  y = Conv<pads=[1,1,1,1]>(x, w, b)
  z = Conv<pads=[2,2,2,2], dilations=[2,2]>(y, w, b)
}
"""


def test_a_weight_that_two_layers_share_stays_shared() -> None:
    after = split(parse(SHARED), INPUT).proto
    assert set(values(after)) == {"b", "y.reduce.weight", "y.core.weight"}
    readers = [list(node.input[1:]) for node in after.graph.node]
    assert readers == [["y.reduce.weight"], ["y.core.weight", "b"]] * 2


def test_a_shared_weight_is_split_anew_where_another_side_is_better() -> None:
    # At this stride a 1×1 in front, at full resolution, would cost more than it saves.
    model = parse(
        SHARED.replace("32", "64").replace("dilations=[2,2]", "strides=[12,12]"),
        {"w": low_rank((64, 64, 3, 3), "input", 8)},
    )
    outcome = apply(model, AUTO)
    first, second = (event.data["sides"] for event in outcome.events)
    assert (first, second) == ("input", "output")
    weights = [node.input[1] for node in outcome.proto.graph.node]
    assert weights == ["y.reduce.weight", "y.core.weight", "z.core.weight", "z.expand.weight"]
    assert_same_numbers(outcome.model, with_composed_weights(model, outcome))


def test_a_shared_weight_stays_for_the_reader_that_is_left_alone() -> None:
    text = """
    two (float[N,32,9,9] x, float[N,64,9,9] v) => (float[N,64,9,9] y, float[N,32,9,9] z)
    <float[64,32,3,3] w>
    {
      y = Conv<pads=[1,1,1,1]>(x, w)
      z = ConvTranspose<pads=[1,1,1,1]>(v, w)
    }
    """
    model = parse(text)
    outcome = apply(model, INPUT)
    assert outcome.rewrote == ["y"]
    assert np.array_equal(values(outcome.proto)["w"], values(model.proto)["w"])
    assert_same_numbers(outcome.model, with_composed_weights(model, outcome))


def test_a_weight_that_the_caller_sees_stays() -> None:
    text = PLAIN.replace("y)\n", "y, float[32,32,3,3] w)\n")
    outcome = split(parse(text), BOTH)
    assert "w" in values(outcome.proto)


def test_weights_of_constant_nodes_become_initializers() -> None:
    model = constant_weights(parse(PLAIN))
    assert [n.op_type for n in model.proto.graph.node] == ["Constant", "Constant", "Conv"]
    after = split(model, OUTPUT).proto
    assert [n.op_type for n in after.graph.node] == ["Conv", "Conv"]
    assert set(values(after)) == {"y.core.weight", "y.expand.weight", "y.bias"}


def test_a_constant_node_stays_for_its_other_readers() -> None:
    text = """
    conv (float[N,32,9,9] x) => (float[N,32,7,7] y, float[32,32,3,3] v)
    <float[32,32,3,3] w>
    { y = Conv(x, w)  v = Relu(w) }
    """
    outcome = split(constant_weights(parse(text)), INPUT)
    assert [n.op_type for n in outcome.proto.graph.node] == ["Constant", "Conv", "Conv", "Relu"]


def constant_weights(model: Model) -> Model:
    """Move all initialisers into Constant nodes."""
    proto = ModelProto.FromString(model.proto.SerializeToString())
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in proto.graph.initializer
    ] + list(proto.graph.node)
    del proto.graph.initializer[:]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return Model(proto)


def test_ir_3_lists_initializers_as_inputs() -> None:
    model = parse(PLAIN)
    model.proto.ir_version = 3
    for tensor in model.proto.graph.initializer:
        model.proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    outcome = split(model, BOTH)
    graph = outcome.proto.graph
    assert {i.name for i in graph.input} == {"x"} | {t.name for t in graph.initializer}
    assert "w" not in values(outcome.proto)


def test_a_bias_that_is_computed_goes_to_the_last_convolution() -> None:
    text = PLAIN.replace("{ y", "{ c = Abs(b)\n y").replace("w, b)", "w, c)")
    after = split(parse(text), BOTH).proto
    assert [list(n.input[2:]) for n in after.graph.node if n.op_type == "Conv"] == [[], [], ["c"]]


def test_a_bias_that_the_caller_may_override_stays_so() -> None:
    model = parse(PLAIN)
    model.proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [32]))
    outcome = split(model, OUTPUT)
    feeds = random_feeds(model) | {"b": np.full(32, 7, np.float32)}
    wanted = with_composed_weights(model, outcome)
    assert_close(run(outcome.model, feeds), run(wanted, feeds))


# -- readers, outputs, subgraphs --------------------------------------------------------------


@EVERY
def test_several_readers_and_an_output(step: Bottleneck) -> None:
    text = """
    conv (float[N,32,9,9] x) => (float[N,32,9,9] y, float[N,32,9,9] p, float[N,32,9,9] q)
    <float[32,32,3,3] w, float[32] b>
    {
      y = Conv<pads=[1,1,1,1]>(x, w, b)
      p = Relu(y)
      q = Add(y, x)
    }
    """
    split(parse(text), step)


CAPTURED = """
captured (float[N,32,9,9] x, bool c) => (float[N,32,9,9] z)
<float[32,32,3,3] w, float[32,32,3,3] v>
{
  y = Conv<pads=[1,1,1,1]>(x, w)
  z = If(c) <
    then_branch = yes () => (float[N,32,9,9] one) { one = Relu(y) },
    else_branch = no () => (float[N,32,9,9] two) {
      inner = Conv<pads=[1,1,1,1]>(y, v)
      two = Add(inner, x)
    }
  >
}
"""


@pytest.mark.parametrize("condition", [True, False])
def test_convolutions_in_subgraphs_stay_and_their_captures_hold(condition: bool) -> None:
    model = parse(CAPTURED)
    outcome = apply(model, BOTH)
    assert outcome.rewrote == ["y"]
    before, after = model.proto.graph.node[-1], outcome.proto.graph.node[-1]
    assert before == after
    feeds = random_feeds(model) | {"c": np.array(condition)}
    wanted = with_composed_weights(model, outcome)
    assert_close(run(outcome.model, feeds), run(wanted, feeds))


def test_a_weight_that_a_subgraph_reads_stays() -> None:
    text = CAPTURED.replace("(y, v)", "(y, w)").replace(", float[32,32,3,3] v", "")
    outcome = apply(parse(text), INPUT)
    assert outcome.rewrote == ["y"]
    assert "w" in values(outcome.proto)


def test_what_is_not_concerned_keeps_names_and_notes() -> None:
    text = """
    conv (float[N,32,9,9] x) => (float[N,32,9,9] y)
    <float[32,32,3,3] w, float[N,32,9,9] before>
    {
      before = Relu(x)
      after = Conv<pads=[1,1,1,1]>(before, w)
      y = Relu(after)
    }
    """
    model = parse(text)
    proto = model.proto
    proto.doc_string = proto.graph.doc_string = "a note"
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.node[0].name = "first"
    proto.graph.node[0].doc_string = "why"
    proto.graph.node[2].metadata_props.add(key="scope", value="net.2")
    proto.graph.value_info[0].doc_string = "rectified"
    after = split(model, BOTH).proto
    assert after.doc_string == "a note"
    assert after.graph.node[0] == proto.graph.node[0]
    assert after.graph.node[-1] == proto.graph.node[-1]
    assert after.graph.value_info == proto.graph.value_info
    assert after.opset_import == proto.opset_import


# -- where it stays away ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "step", "reason"),
    [
        (
            "g (float[N,32,9,9] x) => (float[] y) <float[32,8,3,3] w> { y = Conv<group=4>(x, w) }",
            INPUT,
            "grouped: 4 groups",
        ),
        (
            "g (float[N,32,9,9] x) => (float[] y) <float[32,1,3,3] w> { y = Conv<group=32>(x, w) }",
            INPUT,
            "depthwise: 32 groups",
        ),
        (
            "g (float[N,32,9,9] x) => (float[] y) <float[16,32,1,1] w> { y = Conv(x, w) }",
            INPUT,
            "1×1 already",
        ),
        (
            "g (float[N,31,9,9] x) => (float[] y) <float[64,31,3,3] w> { y = Conv(x, w) }",
            Bottleneck(rank=8),
            "only 31 input channels (fewer than 32)",
        ),
        (
            "g (float[N,32,9,9] x) => (float[] y) <float[64,32,3,3] w> { y = Conv(x, w) }",
            Bottleneck(rank=32, sides="input"),
            "rank 32 is not below its 32 input channels",
        ),
        (
            "g (float[N,32,9,9] x, float[32,32,3,3] w) => (float[] y) { y = Conv(x, w) }",
            INPUT,
            "weight is not a constant",
        ),
        (
            """g (float[N,32,9,9] x) => (float[] y) <int8[32,32,3,3] q, float s>
            { w = DequantizeLinear(q, s)  y = Conv(x, w) }""",
            INPUT,
            "weight is not a constant",
        ),
        (
            """g (float[N,32,9,9] x) => (float[] y) <float[8,32,1,1] r, float[32,8,3,3] w>
            { n = Conv(x, r)  y = Conv(n, w) }""",
            Bottleneck(rank=4, min_channels=8),
            "has a 1×1 bottleneck already",
        ),
        (
            """g (float[N,32,9,9] x) => (float[] z) <float[8,32,3,3] w, float[32,8,1,1] e>
            { y = Conv(x, w)  z = Conv(y, e) }""",
            Bottleneck(rank=4, min_channels=8),
            "has a 1×1 bottleneck already",
        ),
    ],
)
def test_skips(text: str, step: Bottleneck, reason: str) -> None:
    outcome = apply(parse(text), step)
    assert not outcome.rewrote
    assert outcome.reasons["y"] == reason


def test_a_split_that_would_not_pay_is_left_out() -> None:
    outcome = apply(parse(PLAIN), Bottleneck(rank=31, sides="input"))
    assert outcome.reasons["y"].startswith("a split at rank 31 would not be cheaper: ")


def test_a_weight_that_the_caller_may_override_is_not_split() -> None:
    model = parse(PLAIN)
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 32, 3, 3])
    model.proto.graph.input.append(info)
    assert_skipped(model, INPUT, "weight is not a constant")


def test_a_convolution_of_another_domain_is_none() -> None:
    model = parse(PLAIN)
    model.proto.graph.node[0].domain = "com.example"
    model.proto.opset_import.add(domain="com.example", version=1)
    assert list(INPUT.apply(model, Context())) == []


def test_a_model_without_convolutions_has_no_sites() -> None:
    outcome = apply(parse("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"), INPUT)
    assert outcome.events == []


def test_a_weight_with_nan_is_an_error_that_names_the_layer() -> None:
    weight = np.zeros((32, 32, 3, 3))
    weight[3, 1] = np.nan
    with pytest.raises(ModelError, match="layer 'y': the weight holds NaN or infinite values"):
        apply(parse(PLAIN, {"w": weight}), INPUT)


def test_a_weight_of_zeros_is_split_like_any_other() -> None:
    outcome = split(parse(PLAIN, {"w": np.zeros((32, 32, 3, 3))}), AUTO)
    assert outcome.events[0].data["kept_energy"] == 1


def test_a_rank_no_layer_has_is_an_error() -> None:
    with pytest.raises(SpecError, match="rank 33 is larger than the channels of every conv"):
        apply(parse(PLAIN), Bottleneck(rank=33))


@pytest.mark.parametrize("option", ["rank", "min_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_below_one_are_an_error(option: str, value: int) -> None:
    with pytest.raises(SpecError, match=f"{option} must be at least 1, not {value}"):
        Bottleneck(**{"rank": 8, option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["input", "output", "both", "auto"])
@pytest.mark.parametrize("second", ["input", "output", "both", "auto"])
def test_what_was_split_is_not_split_again(first: Any, second: Any) -> None:
    outcome = apply(parse(TWO), Bottleneck(rank=16, sides=first, min_channels=8))
    again = apply(outcome.model, Bottleneck(rank=4, sides=second, min_channels=8))
    assert again.rewrote == []


# -- pretrained networks ----------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(("name", "sites"), [("resnet56_cifar10", 35), ("smallvgg_cifar10", 5)])
def test_pretrained_networks(name: str, sites: int) -> None:
    model = Model.load(ASSETS / "models" / f"{name}.onnx")
    outcome = apply(model, Bottleneck(rank=16))
    assert len(outcome.rewrote) == sites
    assert_same_numbers(outcome.model, with_composed_weights(model, outcome))


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> Model:
    """Draw a chain of convolutions with all that may stand around them."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    dims = draw(st.integers(1, 2))
    shape = (16, draw(st.sampled_from([16, 32])), *[3] * dims)
    tensor, channels = "x", shape[1]
    weights: dict[str, Array] = {}
    nodes, outputs = [], []
    for i in range(draw(st.integers(1, 3))):
        fitting = [name for name, w in weights.items() if w.ndim > 1 and w.shape[1] == channels]
        name = draw(st.sampled_from([*fitting, f"w{i}"]))
        if name not in weights:
            kernel = [draw(st.sampled_from([3, 2, 1])) for _ in range(dims)]
            shape = (draw(st.sampled_from([8, 16, 32])), channels, *kernel)
            weights[name] = random_weight(rng, name, shape)
        inputs = [tensor, name]
        channels, tensor = weights[name].shape[0], f"t{i}"
        if draw(st.booleans()):
            weights[f"b{i}"] = rng.standard_normal(channels)
            inputs.append(f"b{i}")
        nodes.append(helper.make_node("Conv", inputs, [tensor], **draw(conv_attributes(dims))))
        if draw(st.booleans()):
            outputs.append(tensor)
        if draw(st.booleans()):
            nodes.append(helper.make_node("Relu", [tensor], [f"{tensor}.relu"]))
            tensor = f"{tensor}.relu"
    graph = helper.make_graph(
        nodes,
        "random",
        [_value("x", ["N", weights["w0"].shape[1], *[20] * dims])],
        [_value(name, None) for name in {*outputs, tensor}],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@st.composite
def conv_attributes(draw: st.DrawFn, dims: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {"strides": [draw(st.integers(1, 2)) for _ in range(dims)]}
    if draw(st.booleans()):
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
    else:
        attributes["pads"] = [draw(st.integers(1, 2)) for _ in range(2 * dims)]
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    return attributes


def _value(name: str, shape: list[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@settings(max_examples=60)
@given(
    model=networks(),
    rank=st.sampled_from([2, 4, 8]),
    sides=st.sampled_from(["auto", "input", "output", "both"]),
)
def test_random_networks(model: Model, rank: int, sides: Any) -> None:
    before = {layer.output: layer.macs for layer in analyze(model).layers}
    outcome = apply(model, Bottleneck(rank=rank, sides=sides, min_channels=8))
    after = {layer.output: layer.macs for layer in analyze(outcome.model).layers}
    for event in outcome.events:
        if event.kind == "rewrote":
            parts = [macs for name, macs in after.items() if name.split(".")[0] == event.where]
            assert len(parts) == (3 if event.data["sides"] == "both" else 2)
            assert sum(parts) == event.data["macs"] < before[event.where]
        else:
            assert after[event.where] == before[event.where]
    wanted = with_composed_weights(model, outcome)
    assert_same_numbers(outcome.model, wanted)
    outputs = [output.shape for output in run(model, random_feeds(model))]
    assert [output.shape for output in run(outcome.model, random_feeds(model))] == outputs


# -- fitted to samples ------------------------------------------------------------------------

CHAIN = """
net (float[N,16,8,8] x) => (float[N,32,8,8] y)
<float[32,16,3,3] w1, float[32] b1, float[32,32,3,3] w2, float[32] b2, float[32,32,3,3] w3>
{
    c = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, w2, b2)
    s = Relu(d)
    y = Conv<pads=[1,1,1,1]>(s, w3)
}
"""
CALIBRATED = Bottleneck(rank=8, min_channels=16, init="calibrated")


def maps(count: int, *, seed: int) -> Array:
    """Draw inputs (count, 16, 8, 8) whose channels go together, as those of networks do."""
    mix = np.random.default_rng(0).standard_normal((16, 6))
    sources = np.random.default_rng(seed).standard_normal((count, 6, 8, 8))
    return np.einsum("cs,nshw->nchw", mix, sources).astype(np.float32)


def calibration(model: Model, x: Array | None = None) -> Samples:
    """Offer 64 inputs in one batch."""
    given = maps(64, seed=1) if x is None else x
    return Samples("made up", inputs(model), lambda: iter([({"x": given}, None)]), len(given))


def error(model: Model, other: Model) -> float:
    """Return the relative error on inputs like those of the samples, but others."""
    (expected,), (given,) = (run(m, {"x": maps(32, seed=2)}) for m in (model, other))
    return float(((expected - given) ** 2).sum() / (expected**2).sum())


@pytest.mark.parametrize("sides", ["input", "output", "both", "auto"])
def test_fitted_to_samples_the_outputs_are_closer(sides: Choice) -> None:
    model = parse(CHAIN)
    by_weight = Bottleneck(rank=8, min_channels=16, sides=sides)
    fitted = Bottleneck(rank=8, min_channels=16, sides=sides, init="calibrated")
    plain = apply(model, by_weight)
    calibrated = apply(model, fitted, samples=calibration(model))
    assert calibrated.rewrote == plain.rewrote
    assert {*plain.rewrote} >= {"d", "y"}
    assert [e.data for e in calibrated.events] == [e.data for e in plain.events]
    shapes = [{tensor.shape for tensor in values(o.proto).values()} for o in (calibrated, plain)]
    assert shapes[0] == shapes[1] | {(32,)}  # a bias where there was none
    assert error(model, calibrated.model) < 0.6 * error(model, plain.model)


def test_what_is_not_split_is_untouched() -> None:
    model = parse(CHAIN)
    step = Bottleneck(rank=8, min_channels=32, init="calibrated")
    outcome = apply(model, step, samples=calibration(model))
    assert outcome.rewrote == ["d", "y"]
    assert "only 16 input channels" in outcome.reasons["c"]
    np.testing.assert_array_equal(values(outcome.proto)["w1"], values(model.proto)["w1"])


def test_shared_weights_are_fitted_each_to_its_own_inputs() -> None:
    text = CHAIN.replace(", float[32,32,3,3] w3", "").replace("(s, w3)", "(s, w2)")
    model = parse(text)
    plain = apply(model, Bottleneck(rank=8, min_channels=16))
    calibrated = apply(model, CALIBRATED, samples=calibration(model))
    assert plain.rewrote == calibrated.rewrote == ["c", "d", "y"]
    assert len(values(plain.proto)) < len(values(calibrated.proto))
    assert error(model, calibrated.model) < 0.6 * error(model, plain.model)


def test_grouped_convolutions_are_left_alone_when_fitted() -> None:
    text = CHAIN.replace("[32,32,3,3] w2", "[32,16,3,3] w2").replace(
        "d = Conv<", "d = Conv<group = 2, "
    )
    model = parse(text)
    outcome = apply(model, CALIBRATED, samples=calibration(model))
    assert outcome.rewrote == ["c", "y"]
    assert "group" in outcome.reasons["d"]


def test_the_same_samples_give_the_same_weights() -> None:
    model = parse(CHAIN)
    one, two = (apply(model, CALIBRATED, samples=calibration(model), seed=4) for _ in range(2))
    assert one.proto == two.proto
    other = apply(model, CALIBRATED, samples=calibration(model, maps(64, seed=9)))
    assert one.proto != other.proto


def test_no_more_samples_than_allowed_are_used() -> None:
    model = parse(CHAIN)
    x = maps(64, seed=1)
    few = apply(model, CALIBRATED, samples=calibration(model), most_samples=16)
    assert few.proto != apply(model, CALIBRATED, samples=calibration(model)).proto
    with pytest.raises(DataError, match="7 samples are too few"):
        apply(model, CALIBRATED, samples=calibration(model, x[:7]))


def test_fitting_needs_samples() -> None:
    with pytest.raises(SpecError, match="init=calibrated needs samples; add --data"):
        apply(parse(CHAIN), CALIBRATED)


@pytest.mark.parametrize("text", ["bottleneck{rank=8,init=calibrated}", "bottleneck{rank=8}"])
def test_init_is_written_only_where_it_is_chosen(text: str) -> None:
    assert str(pipeline(text)) == text
    with pytest.raises(SpecError, match="init"):
        pipeline("bottleneck{rank=8,init=magic}")
