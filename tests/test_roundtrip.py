"""What is not edited comes back as it was; what is edited changes alone."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import ASSETS, needs_assets
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from pwopt.errors import ModelError
from pwopt.model import Model

FLOAT = TensorProto.FLOAT
KINDS = {"node": 1700, "simple": 20, "pytorch-converted": 80, "pytorch-operator": 30, "real": 9}
"""The collections of onnx.backend.test, and how many models each has at least."""


# -- every model that onnx brings along -------------------------------------------------------


def backend_models(kind: str) -> Iterator[tuple[str, ModelProto]]:
    root = Path(onnx.__file__).parents[1]
    for case in load_model_tests(kind=kind):
        if case.model is not None:
            yield case.name, case.model
        elif case.model_dir is not None:
            yield case.name, onnx.load(Path(case.model_dir) / "model.onnx")
        else:
            yield case.name, onnx.load(root / case.url)


def refused(proto: ModelProto) -> bool:
    """Round trip: never imported, imported, every constant read; whether it was refused."""
    before = serialized(proto)
    try:
        model = Model(proto)
        assert serialized(model.to_proto()) == before
        graph = model.graph
        assert serialized(model.to_proto()) == before
        read_all(graph)
        assert serialized(model.to_proto()) == before
        assert serialized(model.proto) == before
    except ModelError:
        return True
    return False


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # onnx computes expected outputs with NaN
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_model_comes_back(kind: str) -> None:
    models = list(backend_models(kind))
    assert len(models) >= KINDS[kind]
    assert {name for name, proto in models if refused(proto)} == set()
    print(f"{kind}: {len(models)} models, none refused")


@needs_assets
@pytest.mark.parametrize("file", ["vgg16_cifar10", "resnet56_cifar10", "smallvgg_cifar10"])
def test_every_pretrained_model_comes_back(file: str) -> None:
    assert not refused(Model.load(ASSETS / "models" / f"{file}.onnx").proto)


def serialized(proto: ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def read_all(graph: gs.Graph) -> None:
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.attrs.values()):
            if isinstance(tensor, gs.Constant):
                assert tensor.values.shape == tuple(tensor.shape)
        for subgraph in node.subgraphs():
            read_all(subgraph)


def assert_comes_back(proto: ModelProto) -> None:
    assert not refused(proto)


# -- what GraphSurgeon would lose -------------------------------------------------------------


def value(name: str, shape: list[int | str | None] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, ["N", 4] if shape is None else shape)


def make(
    nodes: list[onnx.NodeProto],
    constants: list[TensorProto] | None = None,
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    opset: int = 17,
    ir: int = 8,
) -> ModelProto:
    graph = helper.make_graph(
        nodes, "g", inputs or [value("x")], outputs or [value("y")], constants or []
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def weight(name: str, values: object = (1, 2, 3, 4)) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float32), name)


@pytest.fixture
def chain() -> ModelProto:
    """x → Add w → a → Relu → b → Add w2 → y, with everything that can be said about it."""
    proto = make(
        [
            helper.make_node("Add", ["x", "w"], ["a"], "first", doc_string="adds"),
            helper.make_node("Relu", ["a"], ["b"], "second"),
            helper.make_node("Add", ["b", "w2"], ["y"], "third"),
        ],
        [weight("w"), weight("unused"), weight("w2"), weight("scale", 0.5)],
    )
    proto.domain, proto.model_version, proto.doc_string = "org.example", 7, "model"
    proto.producer_name, proto.producer_version = "tests", "1"
    graph = proto.graph
    graph.doc_string = "graph"
    graph.value_info.extend([value("b"), value("a"), value("w", [4])])
    for number, holder in enumerate(
        (proto, graph, graph.node[0], graph.input[0], graph.output[0], graph.value_info[0])
    ):
        holder.metadata_props.add(key="number", value=str(number))
    graph.initializer[0].doc_string = "weight"
    graph.initializer[0].metadata_props.add(key="from", value="training")
    graph.input[0].doc_string = "input"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    for name in ("a", "b", "w"):
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_everything_said_about_a_model_comes_back(chain: ModelProto) -> None:
    assert_comes_back(chain)


def test_training_info_comes_back(chain: ModelProto) -> None:
    training = chain.training_info.add()
    training.initialization.name = "init"
    training.update_binding.add(key="w", value="a")
    assert_comes_back(chain)


def test_local_functions_with_overloads_and_reference_attributes_come_back() -> None:
    leaky = helper.make_node("LeakyRelu", ["p"], ["q"])
    leaky.attribute.add(name="alpha", ref_attr_name="slope", type=AttributeProto.FLOAT)
    function = helper.make_function(
        "my", "Soft", ["p"], ["q"], [leaky], [helper.make_opsetid("", 17)], ["slope"]
    )
    function.overload = "steep"
    node = helper.make_node("Soft", ["x"], ["y"], domain="my", overload="steep", slope=0.1)
    proto = make([node], ir=10)
    proto.opset_import.add(domain="my", version=1)
    proto.functions.append(function)
    assert_comes_back(proto)
    model = Model(proto)
    assert model.graph.nodes[0].op == "Soft"
    assert model.to_proto().graph.node[0].overload == "steep"


def test_initializers_that_ir_3_lists_as_inputs_come_back() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    inputs = [value("w", [4]), value("x"), value("unused", [4])]
    proto = make(nodes, [weight("unused"), weight("w")], inputs=inputs, ir=3)
    onnx.checker.check_model(proto)
    assert_comes_back(proto)
    model = Model(proto)
    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Constant)


def test_defaults_that_a_caller_may_override_stay_inputs() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    proto = make(nodes, [weight("w")], inputs=[value("x"), value("w", [4])])
    assert_comes_back(proto)
    model = Model(proto)
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Variable)
    model.graph.inputs[1].name = "renamed"
    graph = model.to_proto().graph
    assert [info.name for info in graph.input] == ["x", "renamed"]
    assert [tensor.name for tensor in graph.initializer] == ["renamed"]


def test_sparse_tensors_come_back() -> None:
    values = weight("w", [1, 2])
    indices = numpy_helper.from_array(np.array([0, 3], np.int64), "i")
    sparse = helper.make_sparse_tensor(values, indices, [4])
    unnamed = onnx.SparseTensorProto()
    unnamed.CopyFrom(sparse)
    unnamed.values.ClearField("name")
    proto = make(
        [
            helper.make_node("Constant", [], ["c"], sparse_value=unnamed),
            helper.make_node("Add", ["x", "c"], ["a"]),
            helper.make_node("Add", ["a", "w"], ["y"]),
        ]
    )
    proto.graph.sparse_initializer.append(sparse)
    assert_comes_back(proto)


def test_optional_sequence_and_type_attributes_come_back() -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, [4])
    optional = helper.make_optional_type_proto(tensor)
    sequence = helper.make_sequence_type_proto(tensor)
    nodes = [
        helper.make_node("OptionalHasElement", ["o"], ["has"]),
        helper.make_node("SequenceAt", ["s", "zero"], ["y"]),
        helper.make_node("Optional", [], ["none"], type=tensor),
    ]
    proto = make(
        nodes,
        [numpy_helper.from_array(np.array(0), "zero")],
        inputs=[helper.make_value_info("o", optional), helper.make_value_info("s", sequence)],
        outputs=[
            helper.make_tensor_value_info("has", TensorProto.BOOL, []),
            value("y", [4]),
            helper.make_value_info("none", optional),
        ],
        opset=18,
    )
    onnx.checker.check_model(proto)
    assert_comes_back(proto)


def test_odd_attributes_come_back() -> None:
    node = helper.make_node("Odd", ["x"], ["y"], domain="my", nan=float("nan"), empty="")
    node.attribute[0].doc_string = "not a number"
    node.attribute.add(name="bytes", type=AttributeProto.STRING, s=b"\xff\xfe")
    node.attribute.add(name="list", type=AttributeProto.STRINGS, strings=[b"a", b"\xff"])
    node.attribute.add(name="nans", type=AttributeProto.FLOATS, floats=[float("nan"), 1])
    node.attribute.add(name="nothing", type=AttributeProto.INTS)
    node.attribute.add(name="w", type=AttributeProto.TENSORS, tensors=[weight("a"), weight("b")])
    inner = make([helper.make_node("Relu", ["x"], ["z"])], outputs=[value("z")]).graph
    del inner.input[:]
    node.attribute.add(name="graphs", type=AttributeProto.GRAPHS, graphs=[inner, inner])
    proto = make([node])
    proto.opset_import.add(domain="my", version=1)
    onnx.checker.check_model(proto)
    assert_comes_back(proto)


LOW_PRECISION = [
    "BFLOAT16",
    "FLOAT8E4M3FN",
    "FLOAT8E4M3FNUZ",
    "FLOAT8E5M2",
    "FLOAT8E5M2FNUZ",
    "FLOAT4E2M1",
    "INT4",
    "UINT4",
]


def low_precision(kind: str, *, raw: bool) -> TensorProto:
    """Every bit pattern the type has (odd count for 4 bits, NaN included)."""
    number = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    if kind == "BFLOAT16":
        bits = np.arange(0, 65536, 7).astype(np.uint16).view(ml_dtypes.bfloat16)
    elif kind.startswith("FLOAT8"):
        bits = np.arange(256, dtype=np.uint8).view(dtype)
    else:
        bits = (np.arange(15) - (7 if kind == "INT4" else 0)).astype(dtype)
    tensor = numpy_helper.from_array(bits, "w")
    if raw:
        return tensor
    # Typed: int32_data holds one 16-bit or 8-bit pattern, or one byte of two 4-bit ones, each.
    width = np.uint16 if kind == "BFLOAT16" else np.uint8
    typed = TensorProto(name="w", data_type=number, dims=tensor.dims)
    typed.int32_data.extend(np.frombuffer(tensor.raw_data, width).tolist())
    return typed


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_low_precision_tensors_survive_to_the_bit(kind: str, raw: bool) -> None:
    tensor = low_precision(kind, raw=raw)
    proto = make([helper.make_node("Cast", ["w"], ["y"], to=FLOAT)], [tensor], opset=23, ir=11)
    assert_comes_back(proto)

    moved = Model(proto)
    node = moved.graph.nodes[0]
    node.inputs[0] = gs.Constant("moved", node.inputs[0].values)
    written = moved.to_proto().graph.initializer[0]
    assert written.name == "moved"
    assert written.data_type == tensor.data_type
    assert written.raw_data == low_precision(kind, raw=True).raw_data


@pytest.mark.parametrize(
    "tensor",
    [
        weight("w", 3.0),
        weight("w", np.zeros((0, 4))),
        helper.make_tensor("w", FLOAT, [2], [float("nan"), -0.0]),
        helper.make_tensor("w", TensorProto.STRING, [2], ["ä", b""]),
        helper.make_tensor("w", TensorProto.BOOL, [2], [True, False]),
        helper.make_tensor("w", TensorProto.COMPLEX64, [1], [1 + 2j]),
        helper.make_tensor("w", TensorProto.FLOAT16, [2], [0.1, float("inf")]),
        TensorProto(
            name="w", data_type=FLOAT, dims=[1], raw_data=b"\x01\x00\xc0\x7f", doc_string="d"
        ),
    ],
    ids=["0-d", "empty", "typed", "strings", "bool", "complex", "half", "NaN with payload"],
)
def test_tensors_of_every_make_come_back(tensor: TensorProto) -> None:
    outputs = [helper.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))]
    constant = TensorProto()
    constant.CopyFrom(tensor)
    constant.name = ""
    nodes = [
        helper.make_node("Identity", ["w"], ["y"]),
        helper.make_node("Constant", [], ["unread"], value=constant),
    ]
    assert_comes_back(make(nodes, [tensor], outputs=outputs))


def test_initializers_as_outputs_and_repeated_outputs_come_back() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    outputs = [value("y"), value("w", [4]), value("y")]
    assert_comes_back(make(nodes, [weight("w")], outputs=outputs))


def test_value_info_of_tensors_that_are_not_there_comes_back(chain: ModelProto) -> None:
    chain.graph.value_info.append(value("nowhere"))
    chain.graph.quantization_annotation.add(tensor_name="nowhere")
    assert_comes_back(chain)


# -- subgraphs --------------------------------------------------------------------------------

BRANCHES = ("then_branch", "else_branch")


@pytest.fixture
def branches() -> ModelProto:
    """y = If(c): x + own  else: x + w; `w` belongs to the outer graph, `own` to the branch."""

    def make_branch(name: str, right: str, constants: list[TensorProto]) -> GraphProto:
        node = helper.make_node("Add", ["x", right], [name])
        graph = helper.make_graph([node], name, [], [value(name)], constants, doc_string="inner")
        graph.value_info.append(value(right, [4]))
        return graph

    node = helper.make_node(
        "If",
        ["c"],
        ["y"],
        then_branch=make_branch("then", "own", [weight("own"), weight("idle")]),
        else_branch=make_branch("else", "w", []),
    )
    node.attribute[0].doc_string = "a branch"
    proto = make(
        [node],
        [weight("w"), weight("idle_outside")],
        inputs=[helper.make_tensor_value_info("c", TensorProto.BOOL, []), value("x")],
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def branch(graph: GraphProto, name: str) -> GraphProto:
    node = next(node for node in graph.node if node.op_type == "If")
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def names(graph: GraphProto) -> list[str]:
    return [tensor.name for tensor in graph.initializer]


def test_subgraphs_that_read_outer_tensors_come_back(branches: ModelProto) -> None:
    assert_comes_back(branches)
    model = Model(branches)
    branch = model.graph.nodes[0].attrs["else_branch"]
    assert branch.nodes[0].inputs[0] is model.graph.inputs[1]


def test_new_constants_land_in_the_graph_that_reads_them(branches: ModelProto) -> None:
    model = Model(branches)
    then_branch, else_branch = (model.graph.nodes[0].attrs[name] for name in BRANCHES)
    then_branch.nodes[0].inputs[1] = gs.Constant("new", np.ones(4, np.float32))
    else_branch.nodes[0].inputs[1] = gs.Constant("other", np.ones(4, np.float32))
    model.check()
    outer = model.to_proto().graph
    assert names(outer) == ["idle_outside"]
    assert [names(branch(outer, name)) for name in BRANCHES] == [["idle", "new"], ["other"]]
    assert [branch(outer, name).doc_string for name in BRANCHES] == ["inner", "inner"]
    assert outer.node[0].attribute[0].doc_string == "a branch"


def test_a_new_constant_read_outside_and_inside_is_defined_once(branches: ModelProto) -> None:
    model = Model(branches)
    new = gs.Constant("new", np.ones(4, np.float32))
    node = model.graph.nodes[0]
    node.attrs["else_branch"].nodes[0].inputs[1] = new
    before = gs.Variable("before", np.float32)
    model.graph.nodes.insert(0, gs.Node("Add", inputs=[new, new], outputs=[before]))
    model.graph.outputs.append(before)
    before.shape = [4]
    model.check()
    outer = model.to_proto().graph
    assert "new" in names(outer)
    assert names(branch(outer, "else_branch")) == []


def test_an_inner_constant_read_outside_moves_there(branches: ModelProto) -> None:
    model = Model(branches)
    own = model.graph.nodes[0].attrs["then_branch"].nodes[0].inputs[1]
    out = gs.Variable("out", np.float32, [4])
    model.graph.nodes.insert(0, gs.Node("Relu", inputs=[own], outputs=[out]))
    model.graph.outputs.append(out)
    model.check()
    outer = model.to_proto().graph
    assert names(outer) == ["w", "idle_outside", "own"]
    assert names(branch(outer, "then_branch")) == ["idle"]


# -- edits ------------------------------------------------------------------------------------


def expect(proto: ModelProto) -> ModelProto:
    expected = ModelProto()
    expected.CopyFrom(proto)
    return expected


def test_replacing_a_node_changes_nothing_else(chain: ModelProto) -> None:
    model = Model(chain)
    old = model.graph.nodes[1]
    new = gs.Node("Sigmoid", "new", inputs=list(old.inputs), outputs=list(old.outputs))
    old.outputs.clear()
    old.inputs.clear()
    model.graph.nodes[1] = new
    expected = expect(chain)
    expected.graph.node[1].CopyFrom(helper.make_node("Sigmoid", ["a"], ["b"], "new"))
    assert model.to_proto() == expected


def test_changing_an_attribute_keeps_its_documentation() -> None:
    proto = make([helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.1)])
    proto.graph.node[0].attribute[0].doc_string = "slope"
    model = Model(proto)
    model.graph.nodes[0].attrs["alpha"] = 0.5
    expected = expect(proto)
    expected.graph.node[0].attribute[0].f = 0.5
    assert model.to_proto() == expected


def test_changing_a_list_attribute_in_place_is_noticed() -> None:
    proto = make([helper.make_node("Transpose", ["x"], ["y"], perm=[0, 1])])
    model = Model(proto)
    model.graph.nodes[0].attrs["perm"].reverse()
    assert list(model.to_proto().graph.node[0].attribute[0].ints) == [1, 0]
    assert model.proto == proto


def test_changing_a_weight_in_place_changes_its_values_only(chain: ModelProto) -> None:
    model = Model(chain)
    model.graph.nodes[0].inputs[1].values[0] = 9
    expected = expect(chain)
    expected.graph.initializer[0].raw_data = np.array([9, 2, 3, 4], np.float32).tobytes()
    assert model.to_proto() == expected


def test_renaming_a_tensor_renames_all_that_is_said_about_it(chain: ModelProto) -> None:
    model = Model(chain)
    first = model.graph.nodes[0]
    first.inputs[1].name = "weight"
    first.outputs[0].name = "sum"
    model.graph.outputs[0].name = "result"
    expected = expect(chain)
    graph = expected.graph
    graph.node[0].input[1] = graph.initializer[0].name = graph.value_info[2].name = "weight"
    graph.node[0].output[0] = graph.node[1].input[0] = graph.value_info[1].name = "sum"
    graph.node[2].output[0] = graph.output[0].name = "result"
    graph.quantization_annotation[0].tensor_name = "sum"
    graph.quantization_annotation[2].tensor_name = "weight"
    assert model.to_proto() == expected


@pytest.mark.parametrize("in_place", [True, False])
def test_changing_an_input_shape_keeps_its_documentation(chain: ModelProto, in_place: bool) -> None:
    model = Model(chain)
    if in_place:
        model.graph.inputs[0].shape[0] = 8
    else:
        model.graph.inputs[0].shape = [8, 4]
    info = model.to_proto().graph.input[0]
    expected = expect(chain).graph.input[0]
    expected.type.tensor_type.shape.dim[0].dim_value = 8
    assert info == expected


def test_order_of_outputs_is_the_edited_one() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    model = Model(make(nodes, outputs=[value("y"), value("z")]))
    model.graph.outputs.reverse()
    assert [info.name for info in model.to_proto().graph.output] == ["z", "y"]


def test_removed_tensors_take_their_weights_and_annotations_along(chain: ModelProto) -> None:
    model = Model(chain)
    first, second, _ = model.graph.nodes
    second.inputs[0] = model.graph.inputs[0]
    first.inputs.clear()
    first.outputs.clear()
    model.graph.nodes.remove(first)
    graph = model.to_proto().graph
    model.check()
    assert names(graph) == ["unused", "w2", "scale"]  # what was unused from the start stays
    assert [a.tensor_name for a in graph.quantization_annotation] == ["b"]
    assert [info.name for info in graph.value_info] == ["b"]


def conv(stride: int = 1) -> ModelProto:
    """x → Conv → a → Custom → c → Relu → d → y; only a's shape can be inferred."""
    image = functools.partial(value, shape=["N", 4, 8, 8])
    proto = make(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], strides=[stride, stride], pads=[1] * 4),
            helper.make_node("Blur", ["a"], ["c"], domain="my"),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("Abs", ["x"], ["e"]),
            helper.make_node("Add", ["d", "e"], ["y"]),
        ],
        [weight("w", np.ones((4, 4, 3, 3)))],
        inputs=[image("x")],
        outputs=[image("y")],
    )
    proto.opset_import.add(domain="my", version=1)
    proto.graph.value_info.extend(image(name) for name in "acde")
    return proto


def test_value_info_that_an_edit_made_untrue_is_dropped() -> None:
    model = Model(conv())
    model.graph.nodes[0].attrs["strides"] = [2, 2]
    # a is halved; c and d lie behind an operator that nobody knows, and may be too
    assert [info.name for info in model.to_proto().graph.value_info] == ["e"]


def test_value_info_that_stays_true_is_kept() -> None:
    model = Model(conv())
    model.graph.nodes[0].attrs["pads"] = [0, 0, 2, 2]
    assert model.to_proto().graph.value_info == conv().graph.value_info


def test_value_info_follows_an_edited_input_or_weight() -> None:
    by_input, by_weight = Model(conv()), Model(conv())
    by_input.graph.inputs[0].shape = ["N", 4, 16, 16]
    by_weight.graph.nodes[0].inputs[1].values = np.ones((6, 4, 3, 3), np.float32)
    assert not by_input.to_proto().graph.value_info
    assert [info.name for info in by_weight.to_proto().graph.value_info] == ["e"]


def test_two_tensors_of_one_name_are_found_by_the_check(chain: ModelProto) -> None:
    model = Model(chain)
    model.graph.nodes[0].inputs[1] = gs.Constant("w2", np.zeros(4, np.float32))
    with pytest.raises(ModelError, match="w2 initializer name is not unique"):
        model.check()


def test_turning_a_tensor_into_a_constant(chain: ModelProto) -> None:
    model = Model(chain)
    first = model.graph.nodes[0]
    first.outputs[0].to_constant(np.ones((1, 4), np.float32))
    model.graph.nodes.remove(first)
    first.inputs.clear()
    first.outputs.clear()
    model.check()
    assert names(model.to_proto().graph) == ["unused", "w2", "scale", "a"]


def test_a_damaged_weight_is_named_when_read() -> None:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1000], raw_data=b"1234")
    model = Model(make([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]), path=Path("m.onnx"))
    with pytest.raises(ModelError, match=re.escape("m.onnx: weight 'w' is damaged")):
        _ = model.graph.nodes[0].inputs[1].values


def test_an_unknown_element_type_is_refused() -> None:
    tensor = TensorProto(name="w", data_type=999, dims=[1], raw_data=b"1234")
    model = Model(make([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]), path=Path("m.onnx"))
    with pytest.raises(ModelError, match=r"m\.onnx: .* no element type 999"):
        _ = model.graph
