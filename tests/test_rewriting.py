"""Pipelines, what they report, and those who watch."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from helpers import parse

from pwopt.errors import ModelError, PwoptError, SpecError
from pwopt.model import Model
from pwopt.observers import Dump, Timing, Verify
from pwopt.rewriting import (
    Context,
    Event,
    Observer,
    Pass,
    PassReport,
    Pipeline,
)

NET = "net (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Relu(a) }"


@dataclass(frozen=True, kw_only=True)
class Rename(Pass):
    """Turns one kind of operator into another."""

    name: ClassVar[str] = "rename"
    exact: ClassVar[bool] = False

    old: str = "Relu"
    new: str = "Abs"

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        for node in model.graph.nodes:
            where = node.outputs[0].name
            if node.op != self.old:
                yield Event("skipped", where, f"is {node.op}")
                continue
            node.op = self.new
            yield Event("rewrote", where, f"was {self.old}", {"length": len(self.new)})


@dataclass(frozen=True, kw_only=True)
class Fails(Pass):
    """Raises in the middle."""

    name: ClassVar[str] = "fails"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        yield Event("skipped", "a", "soon")
        raise ZeroDivisionError("by zero")


@dataclass(frozen=True, kw_only=True)
class Refuses(Pass):
    """Finds that its options do not fit the model."""

    name: ClassVar[str] = "refuses"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        raise SpecError(f"{model.name}: does not fit {context.shapes}")
        yield


class Diary(Observer):
    def __init__(self, name: str, pages: list[str]) -> None:
        self.name, self.pages = name, pages

    def before(self, step: Pass, model: Model) -> None:
        self.pages.append(f"{self.name} before {step}: {[n.op for n in model.graph.nodes]}")

    def after(self, step: Pass, model: Model, report: PassReport) -> None:
        self.pages.append(f"{self.name} after {step}: {report.rewrote} {report.skipped}")


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


def test_reports_hold_all_events_in_order() -> None:
    model = parse(NET)
    model.graph.nodes[0].op = "Neg"
    first, second = Pipeline((Rename(), Rename(old="Neg", new="Exp"))).run(model)
    assert first == PassReport(
        "rename",
        (Event("skipped", "a", "is Neg"), Event("rewrote", "y", "was Relu", {"length": 3})),
    )
    assert (first.rewrote, first.skipped) == (1, 1)
    assert [event.kind for event in second.events] == ["rewrote", "skipped"]
    assert ops(model) == ["Exp", "Abs"]


def test_observers_are_called_in_order_around_each_pass() -> None:
    pages: list[str] = []
    steps = Pipeline((Rename(), Rename(old="Abs", new="Neg")))
    steps.run(parse(NET), observers=[Diary("A", pages), Diary("B", pages)])
    assert pages == [
        "A before rename: ['Relu', 'Relu']",
        "B before rename: ['Relu', 'Relu']",
        "A after rename: 2 0",
        "B after rename: 2 0",
        "A before rename{old=Abs,new=Neg}: ['Abs', 'Abs']",
        "B before rename{old=Abs,new=Neg}: ['Abs', 'Abs']",
        "A after rename{old=Abs,new=Neg}: 2 0",
        "B after rename{old=Abs,new=Neg}: 2 0",
    ]


def test_what_was_done_is_noted_in_the_metadata() -> None:
    model = parse(NET)
    model.annotate("author", "somebody")
    Pipeline((Rename(), Rename())).run(model)
    assert model.metadata() == {
        "author": "somebody",
        "pwopt.version": version("pwopt"),
        "pwopt.pipeline": "rename,rename",
    }
    Pipeline((Rename(old="Abs", new="Neg"),)).run(model)
    assert model.metadata()["pwopt.pipeline"] == "rename,rename,rename{old=Abs,new=Neg}"


def test_nothing_is_noted_if_nothing_was_rewritten() -> None:
    model = parse(NET)
    (report,) = Pipeline((Rename(old="Conv"),)).run(model)
    assert (report.rewrote, report.skipped) == (0, 2)
    assert model.metadata() == {}
    Pipeline((Rename(),)).run(model)
    done = model.to_proto()
    Pipeline((Rename(),)).run(model)
    assert model.to_proto() == done


def test_a_pass_that_fails_is_named_with_those_before_it() -> None:
    with pytest.raises(PwoptError) as caught:
        Pipeline((Rename(), Rename(old="Abs"), Fails())).run(parse(NET))
    assert str(caught.value) == (
        "net: pass 'fails' failed after rename, rename: ZeroDivisionError: by zero; "
        "this is a fault of the pass, please report it"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PwoptError, match="net: pass 'fails' failed: ZeroDivisionError"):
        Pipeline((Fails(),)).run(parse(NET))


def test_what_a_pass_tells_the_user_goes_through() -> None:
    with pytest.raises(SpecError, match=r"^net: does not fit \{'x': \[1, 4\]\}$"):
        Pipeline((Refuses(),)).run(parse(NET), Context(shapes={"x": [1, 4]}))


def test_an_empty_pipeline_changes_nothing() -> None:
    model = parse(NET)
    assert Pipeline(()).run(model) == ()
    assert model.to_proto() == parse(NET).proto


def test_timing_has_one_entry_per_pass() -> None:
    timing = Timing()
    Pipeline((Rename(), Rename(old="Abs"))).run(parse(NET), observers=[timing])
    assert [name for name, _ in timing.seconds] == ["rename", "rename"]
    assert all(seconds >= 0 for _, seconds in timing.seconds)


def test_dump_saves_the_model_after_each_pass(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    steps = Pipeline((Rename(), Rename(old="Abs", new="Neg")))
    steps.run(parse(NET), observers=[Dump(folder)])
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["01-rename.onnx", "02-rename.onnx"]
    assert [ops(Model.load(file)) for file in files] == [["Abs", "Abs"], ["Neg", "Neg"]]


def test_verify_names_the_pass_that_broke_the_model() -> None:
    steps = Pipeline((Rename(), Rename(old="Abs", new="Nonsense"), Rename(old="Nonsense")))
    with pytest.raises(ModelError, match=r"^net after pass 'rename': .*Nonsense"):
        steps.run(parse(NET), observers=[Verify()])
    steps.run(model := parse(NET))
    assert ops(model) == ["Abs", "Abs"]


def test_passes_and_events_are_values() -> None:
    assert Rename() == Rename(new="Abs")
    assert Rename() != Rename(new="Neg")
    assert len({Rename(), Rename(new="Abs")}) == 1
    with pytest.raises(AttributeError):
        Rename().new = "Neg"  # type: ignore[misc]
    assert Event("skipped", "a", "b").data == {}
    assert np.isscalar(Event("rewrote", "a", "b", {"n": 1}).data["n"])
