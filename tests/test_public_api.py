"""``import pwopt``: the names it promises, and the pass that CONTRIBUTING.md shows."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import onnx
import pytest
from helpers import REPOSITORY, apply, parse

import pwopt

PROMISED = {
    "Analysis", "Context", "Event", "Model", "Observer", "Pass", "PassReport", "Pipeline",
    "PwoptError", "Rewritten", "Verdict", "analyze", "check", "pipeline", "rewrite",
}  # fmt: skip


def test_the_promised_names_are_there() -> None:
    assert set(pwopt.__all__) >= PROMISED
    assert set(dir(pwopt)) >= set(pwopt.__all__)


@pytest.mark.parametrize("name", pwopt.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(pwopt, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for member, function in inspect.getmembers(value, inspect.isfunction):
            if not member.startswith("_"):
                assert inspect.getdoc(function), f"{name}.{member}"


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from pwopt import *", names)
    assert set(pwopt.__all__) <= names.keys()


def test_functions_stay_callable_after_every_module_was_imported() -> None:
    modules = [module.name for module in pkgutil.walk_packages(pwopt.__path__, "pwopt.")]
    assert len(modules) > 20
    without_torch = importlib.util.find_spec("torch") is None
    for module in modules:
        if without_torch and module.startswith("pwopt.learn."):
            continue
        if module not in ("pwopt.__main__", "pwopt.models.demo.train"):
            importlib.import_module(module)
    for name in pwopt.__all__:
        assert callable(getattr(pwopt, name)), name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'pwopt' has no attribute 'optimise'"):
        _ = pwopt.optimise  # type: ignore[attr-defined]


def test_the_pass_of_contributing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "drop_identity.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        step = importlib.import_module("drop_identity").DropIdentity()
    finally:
        sys.modules.pop("drop_identity", None)

    model = parse("""
        within (float[N,4] x) => (float[N,4] y, float[N,4] z)
        { a = Identity(x)  b = Add(a, a)  c = Identity(b)  y = Relu(c)  z = Identity(c) }
    """)
    outcome = apply(model, step)
    assert outcome.rewrote == ["a", "c"]
    assert outcome.reasons == {"z": "writes an output of the graph"}
    assert [(n.op_type, list(n.input)) for n in outcome.proto.graph.node] == [
        ("Add", ["x", "x"]),
        ("Relu", ["b"]),
        ("Identity", ["b"]),
    ]

    result = pwopt.rewrite(model, pipeline=pwopt.Pipeline((step,)))
    assert result.changed
    assert str(result.pipeline) == "drop-identity"
    assert result.model.to_proto().graph == outcome.proto.graph
    onnx.checker.check_model(result.model.to_proto(), full_check=True)
