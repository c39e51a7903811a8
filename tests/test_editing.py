"""An edit that is taken back leaves no trace, and one that is kept no orphans."""

import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import parse

from pwopt.editing import Edit
from pwopt.model import Model

CHAIN = """
    net (float[N,4,8,8] x) => (float[N,4,8,8] y)
    <float[4,4,1,1] w, float[4,4,1,1] v>
    { a = Conv(x, w)  b = Relu(a)  k = Constant<value = float[1] {2}>()  c = Mul(b, k)
      y = Conv(c, v) }
"""


def data(model: Model) -> bytes:
    return model.to_proto().SerializeToString(deterministic=True)


def writer(model: Model, name: str) -> gs.Node:
    return next(n for n in model.graph.nodes if any(t.name == name for t in n.outputs))


def joined(model: Model, first: str, last: str) -> Edit:
    """Replace the nodes that write `first` and `last` by one Abs."""
    old = [writer(model, first), writer(model, last)]
    new = gs.Node("Abs", "", {}, [old[0].inputs[0]], [old[1].outputs[0]])
    return Edit(model.graph, old, [new])


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def wiring(model: Model) -> list[tuple[str, list[str], list[str], int]]:
    return [
        (n.op, [t.name for t in n.inputs], [t.name for t in n.outputs], len(n.outputs[0].outputs))
        for n in model.graph.nodes
    ]


def test_undo_and_redo_give_back_the_very_bytes() -> None:
    model = parse(CHAIN)
    before, wires = data(model), wiring(model)
    edit = joined(model, "b", "c")
    after, new_wires = data(model), wiring(model)
    assert after != before
    for _ in range(2):
        edit.undo()
        assert (data(model), wiring(model)) == (before, wires)
        edit.redo()
        assert (data(model), wiring(model)) == (after, new_wires)


def test_only_settling_removes_orphaned_constants() -> None:
    model = parse(CHAIN)
    edit = joined(model, "b", "c")
    assert ops(model) == ["Conv", "Abs", "Constant", "Conv"]
    edit.settle()
    assert ops(model) == ["Conv", "Abs", "Conv"]
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_a_constant_that_others_read_stays() -> None:
    model = parse(CHAIN.replace("y = Conv(c, v)", "d = Conv(c, v)  y = Add(d, k)"))
    joined(model, "b", "c").settle()
    assert ops(model) == ["Conv", "Abs", "Constant", "Conv", "Add"]


def test_orphaned_initializers_vanish_and_shared_ones_stay() -> None:
    model = parse(CHAIN.replace("y = Conv(c, v)", "d = Conv(c, v)  y = Conv(d, v)"))
    joined(model, "a", "b").settle()
    assert [t.name for t in model.to_proto().graph.initializer] == ["v"]
    joined(model, "c", "d").settle()
    assert [t.name for t in model.to_proto().graph.initializer] == ["v"]


def test_a_new_node_stands_behind_all_that_it_reads() -> None:
    model = parse(
        """
        net (float[N,4] x) => (float[N,4] y, float[N,4] z)
        { a = Relu(x)  b = Neg(x)  z = Abs(b)  y = Add(a, a) }
        """
    )
    add, relu = writer(model, "y"), writer(model, "a")
    late = writer(model, "z").outputs[0]
    inner = gs.Variable("inner", "float32")
    new = [
        gs.Node("Mul", "", {}, [relu.inputs[0], late], [inner]),
        gs.Node("Neg", "", {}, [inner], [add.outputs[0]]),
    ]
    edit = Edit(model.graph, [relu, add], new)
    assert ops(model) == ["Neg", "Abs", "Mul", "Neg"]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    edit.undo()
    assert ops(model) == ["Relu", "Neg", "Abs", "Add"]


def test_nodes_of_the_same_name_are_not_mistaken() -> None:
    model = parse(CHAIN)
    for node in model.graph.nodes:
        node.name = "same"
    before = data(model)
    edit = joined(model, "b", "c")
    edit.new[0].name = "same"
    assert ops(model) == ["Conv", "Abs", "Constant", "Conv"]
    edit.undo()
    assert data(model) == before


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_subgraph_captures(keep: bool) -> None:
    model = parse(
        """
        net (float[4] x, bool cond) => (float[4] y)
        <float[4] w>
        {
            a = Neg(x)  b = Abs(a)
            y = If(cond) <
                then_branch = yes () => (float[4] t) { t = Add(b, w) },
                else_branch = no () => (float[4] e) { e = Mul(b, w) }
            >
        }
        """
    )
    before = data(model)
    edit = joined(model, "a", "b")
    onnx.checker.check_model(model.to_proto(), full_check=True)
    if keep:
        edit.settle()
        assert ops(model) == ["Abs", "If"]
        assert [t.name for t in model.to_proto().graph.initializer] == ["w"]
    else:
        edit.undo()
        assert data(model) == before
