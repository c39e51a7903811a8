"""A judge keeps what is right and pays; all else is taken back and said."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import assert_same_numbers, parse

from pwopt import runtime
from pwopt.editing import Edit
from pwopt.judging import Gate, SiteJudge
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Judgement, Pass

TWO = """
    net (float[N,4,8,8] x) => (float[N,4,8,8] y)
    <float[4,4,1,1] w, float[4,4,1,1] v>
    { a = Conv(x, w)  b = Relu(a)  c = Conv(b, v)  y = Relu(c) }
"""


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Scale every Conv's weight by a factor: right for 1 alone."""

    name: ClassVar[str] = "scale"
    exact: ClassVar[bool] = True
    factors: dict[str, float]
    free: bool = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        for node in list(model.graph.nodes):
            if node.op != "Conv":
                continue
            output = node.outputs[0]
            weight = node.inputs[1].values
            factor = np.asarray(self.factors[output.name], weight.dtype)
            scaled = gs.Constant(f"{output.name}.weight", weight * factor)
            new = gs.Node("Conv", "", node.attrs, [node.inputs[0], scaled], [output])
            edit = Edit(model.graph, [node], [new])
            yield context.settle(model, edit, output.name, "scaled", free=self.free)


def scale(model: Model, judge: SiteJudge, *, free: bool = True, **factors: float) -> list[Event]:
    return [*Scale(factors=factors, free=free).apply(model, Context(judge=judge))]


@pytest.mark.parametrize("gate", ["measured", "macs", "always"])
def test_a_wrong_edit_is_refused_and_the_rest_goes_on(gate: Gate) -> None:
    model = parse(TWO)
    events = scale(model, SiteJudge(gate), a=1.01, c=1)
    assert [(e.kind, e.where) for e in events] == [("skipped", "a"), ("rewrote", "c")]
    assert events[0].reason.startswith("fault of the pass, please report it: the site: output 'a'")
    assert events[0].data == {"fault": 1}
    assert [t.name for t in model.to_proto().graph.initializer] == ["w", "c.weight"]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert_same_numbers(model, parse(TWO))


def test_a_refused_edit_leaves_no_trace() -> None:
    model = parse(TWO)
    scale(model, SiteJudge("always"), a=1.01, c=-1)
    assert model.to_proto() == parse(TWO).to_proto()


def replaced(model: Model, output: str, *new: gs.Node) -> Edit:
    """Put `new` in the place of the node that writes `output`."""
    node = next(n for n in model.graph.nodes if n.outputs[0].name == output)
    return Edit(model.graph, [node], new)


def conv(model: Model, output: str, **changes: Any) -> gs.Node:
    """Make a Conv like the one that writes `output`, with other attributes."""
    node = next(n for n in model.graph.nodes if n.outputs[0].name == output)
    return gs.Node("Conv", "", {**node.attrs, **changes}, list(node.inputs), list(node.outputs))


def judge(model: Model, edit: Edit, gate: Gate = "always", **options: Any) -> Judgement:
    after = model.to_proto()
    verdict = SiteJudge(gate, **options)(model, edit, free=False)
    assert model.to_proto() == after  # still in place
    return verdict


def test_an_edit_that_onnxruntime_cannot_run_is_a_fault() -> None:
    model = parse(TWO)
    edit = replaced(model, "a", conv(model, "a", group=3))
    verdict = judge(model, edit)
    assert not verdict.accepted
    assert verdict.data == {"fault": 1}


def test_an_edit_that_changes_the_shape_is_a_fault() -> None:
    model = parse(TWO.replace("float[N,4,8,8] y", "float[N,4,H,W] y"))
    edit = replaced(model, "c", conv(model, "c", pads=[1, 1, 1, 1]))
    verdict = judge(model, edit)
    assert not verdict.accepted
    assert "float32[1, 4, 10, 10] after the rewrite, float32[1, 4, 8, 8] before" in verdict.reason


def test_the_paper_gate_counts() -> None:
    model = parse(
        TWO.replace("c = Conv(b, v)", "c = Conv<group = 2>(b, v)").replace(
            "float[4,4,1,1] v", "float[4,2,1,1] v"
        )
    )
    events = scale(model, SiteJudge("macs"), free=False, a=1, c=1)
    assert [e.reason for e in events] == [
        "not cheaper: 1,024 MACs before, 1,024 after",
        "not cheaper: 512 MACs before, 512 after",
    ]
    assert events[0].data == {"macs_before": 1024, "macs_after": 1024}


BN = """
    net (float[N,4,H,W] x) => (float[N,4,H,W] y)
    <float[4,4,1,1] w, float[4] s, float[4] b, float[4] mean, float[4] var>
    { a = Conv(x, w)  y = BatchNormalization(a, s, b, mean, var) }
"""


def folded(model: Model, error: float = 0.0) -> Edit:
    """Fold the BatchNormalization of BN, whose parameters stand behind the Conv."""
    layer, norm = model.graph.nodes
    s, b, mean, var = (t.values.astype(np.float64) for t in norm.inputs[1:])
    scale = s / np.sqrt(var + norm.attrs.get("epsilon", 1e-5)) + error
    old = layer.inputs[1].values
    weight = gs.Constant("weight", (old * scale[:, None, None, None]).astype(old.dtype))
    bias = gs.Constant("bias", (b - mean * scale).astype(old.dtype))
    new = gs.Node("Conv", "", {}, [layer.inputs[0], weight, bias], list(norm.outputs))
    return Edit(model.graph, [layer, norm], [new])


def header(opset: int) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]>'


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 17])
@pytest.mark.parametrize("error", [0.0, 0.01])
def test_operator_versions_that_the_reference_computes_otherwise(opset: int, error: float) -> None:
    model = parse(header(opset) + BN)
    assert judge(model, folded(model, error)).accepted == (error == 0)


@pytest.mark.parametrize("dtype", ["float16", "float", "double"])
@pytest.mark.parametrize("error", [0.0, 0.2])
def test_types(dtype: str, error: float) -> None:
    """onnxruntime has no Conv of doubles; half precision rounds the folded weights."""
    model = parse(BN.replace("float[", f"{dtype}["))
    assert judge(model, folded(model, error)).accepted == (error == 0)


def test_doubles_are_held_to_doubles() -> None:
    model = parse(BN.replace("float[", "double["))
    assert not judge(model, folded(model, 1e-6)).accepted


def test_what_cannot_be_run_cannot_be_measured() -> None:
    model = parse(BN.replace("float[", "double["))
    verdict = judge(model, folded(model), "measured")
    assert not verdict.accepted
    assert verdict.reason.startswith("cannot be measured: ")


def test_a_site_of_unknown_shape_is_not_checked() -> None:
    model = parse(TWO)
    relu = next(n for n in model.graph.nodes if n.outputs[0].name == "b")
    relu.op, relu.domain = "Thing", "elsewhere"
    model.proto.opset_import.add(domain="elsewhere", version=1)
    model = model.copy()
    events = scale(model, SiteJudge("always"), a=1, c=1)
    assert [e.kind for e in events] == ["rewrote", "skipped"]
    assert events[1].reason.startswith("cannot be checked: ")
    assert "c.weight" not in {t.name for t in model.to_proto().graph.initializer}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what is timed, and claim that what comes second is twice as fast."""
    found: list[dict[str, Any]] = []

    def interleave(sessions: Any, feeds: Any, **options: Any) -> runtime.Timing:
        threads = [s.get_session_options().intra_op_num_threads for s in sessions]
        shapes = {name: values.shape for name, values in feeds.items()}
        for session in sessions:
            session.run(None, feeds)
        found.append({"threads": threads, "shapes": shapes})
        return runtime.Timing(np.tile([2.0, 1.0], (9, 1)))

    monkeypatch.setattr(runtime, "interleave", interleave)
    return found


def test_threads_and_batch_reach_the_clock(calls: list[dict[str, Any]]) -> None:
    model = parse(TWO)
    verdict = judge(model, replaced(model, "a", conv(model, "a")), "measured", threads=2, batch=5)
    assert calls == [{"threads": [2, 2], "shapes": {"x": (5, 4, 8, 8)}}]
    assert verdict.accepted
    assert verdict.reason == "measured 2.00× [2.00, 2.00]"
    assert verdict.data == {"speedup": 2.0, "low": 2.0, "high": 2.0}


def test_shapes_reach_the_clock(calls: list[dict[str, Any]]) -> None:
    model = parse(BN)
    judge(model, folded(model), "measured", shapes={"x": (2, 4, 6, 7)})
    assert calls[0]["shapes"] == {"x": (2, 4, 6, 7)}


def test_free_edits_are_not_timed(calls: list[dict[str, Any]]) -> None:
    events = scale(parse(TWO), SiteJudge("measured"), a=1, c=1)
    assert [e.kind for e in events] == ["rewrote", "rewrote"]
    assert calls == []


def test_ties_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tie = runtime.Timing(np.ones((9, 2)))
    monkeypatch.setattr(runtime, "interleave", lambda *_, **__: tie)
    model = parse(TWO)
    before = model.to_proto()
    events = scale(model, SiteJudge("measured"), free=False, a=1, c=1)
    assert {e.reason for e in events} == {"not faster: measured 1.00× [1.00, 1.00]"}
    assert events[0].data == {"speedup": 1.0, "low": 1.0, "high": 1.0}
    assert model.to_proto() == before


def test_both_forms_run_on_the_inputs_of_either(calls: list[dict[str, Any]]) -> None:
    """One that no longer reads an input has it all the same."""
    model = parse(
        """
        net (float[N,4] x, float[N,4] z) => (float[N,4] y)
        { a = Sub(z, z)  b = Add(x, a)  y = Relu(b) }
        """
    )
    sub, add, _ = model.graph.nodes
    new = gs.Node("Identity", "", {}, [add.inputs[0]], list(add.outputs))
    verdict = judge(model, Edit(model.graph, [sub, add], [new]), "measured")
    assert verdict.accepted
    assert calls[0]["shapes"] == {"x": (1, 4), "z": (1, 4)}


def test_integers_must_be_equal() -> None:
    model = parse(
        "net (int64[N] x) => (int64[N] y) <int64[1] big = {100000000}> { y = Add(x, big) }"
    )
    add = model.graph.nodes[0]
    off = gs.Constant("off", np.array([100_000_001]))
    new = gs.Node("Add", "", {}, [add.inputs[0], off], list(add.outputs))
    assert not judge(model, Edit(model.graph, [add], [new])).accepted
