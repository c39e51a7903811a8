"""``pwopt rewrite --exact`` from the outside."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from helpers import assert_same_numbers, parse

from pwopt import rewriting, runtime, workflow
from pwopt.cli import main
from pwopt.model import Model

NET = """
    net (float[N,32,16,16] x) => (float[N,16,1,1] y)
    <float[64,32,3,3] w, float[64] s, float[64] b, float[64] mean, float[64] var,
     float[16,64,1,1] v>
    {
        a = Conv<pads = [1,1,1,1]>(x, w)
        n = BatchNormalization(a, s, b, mean, var)
        r = Relu(n)
        c = Conv(r, v)
        y = GlobalAveragePool(c)
    }
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rewrite", *map(str, arguments)])


def rewrite(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    parse(NET).save(path)
    return path


def rewrote(found: Any) -> list[tuple[str, str]]:
    return [(e["pass"], e["where"]) for e in found["events"] if e["kind"] == "rewrote"]


def test_exact_rewrites_that_save_macs(net: Path) -> None:
    found = rewrite(net, "--exact", "--gate", "macs")
    assert rewrote(found) == [("fold-affine", "n"), ("pool-before-pointwise", "y")]
    assert found["after"]["macs"] < found["before"]["macs"]
    counted = found["events"][-1]["data"]
    assert (counted["macs_before"], counted["macs_after"]) == (64 * 16 * 256, 64 * 16)
    written = Model.load(found["output"])
    onnx.checker.check_model(written.proto, full_check=True)
    assert_same_numbers(written, parse(NET))
    assert written.metadata()["pwopt.pipeline"] == workflow.EXACT["macs"]


def test_json_and_table_hold_what_was_measured(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = runtime.Timing(np.tile([2.0, 1.0], (9, 1)))
    monkeypatch.setattr(runtime, "interleave", lambda *_, **__: twice)
    found = rewrite(net, "--exact")
    event = next(e for e in found["events"] if e["pass"] == "pool-before-pointwise")
    assert event["data"] == {"op": "GlobalAveragePool", "speedup": 2, "low": 2, "high": 2}


def test_what_does_not_pay_is_said(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = runtime.Timing(np.tile([1.0, 2.0], (9, 1)))
    monkeypatch.setattr(runtime, "interleave", lambda *_, **__: slower)
    result = run(net, "--exact", "--gate", "measured")
    assert result.exit_code == 0
    assert "not faster: measured 0.50× [0.50, 0.50]" in " ".join(result.stdout.split())


@pytest.mark.parametrize("gate", ["macs", "always"])
def test_nothing_pays(tmp_path: Path, gate: str) -> None:
    path = tmp_path / "relu.onnx"
    parse("net (float[N,4] x) => (float[N,4] y) { a = Relu(x)  y = Tanh(a) }").save(path)
    result = run(path, "--exact", "--gate", gate)
    assert result.exit_code == 0
    assert "Nothing was rewritten; the model is written as it came." in result.stdout
    assert onnx.load(tmp_path / "relu.pwopt.onnx") == onnx.load(path)


@pytest.mark.parametrize("gate", ["macs", "always"])
def test_a_second_run_changes_nothing(net: Path, gate: str) -> None:
    first = Path(rewrite(net, "--exact", "--gate", gate)["output"])
    found = rewrite(first, "--exact", "--gate", gate)
    assert rewrote(found) == []
    assert onnx.load(found["output"]) == onnx.load(first)


def test_exact_first_then_bottlenecks(net: Path) -> None:
    found = rewrite(net, "--exact", "--gate", "macs", "--bottleneck", 4, "--sides", "output")
    assert rewrote(found) == [
        ("fold-affine", "n"),
        ("pool-before-pointwise", "y"),
        ("bottleneck", "n"),
    ]
    assert found["pipeline"] == (
        f"{workflow.EXACT['macs']},fold-affine,bottleneck{{rank=4,sides=output}}"
    )
    exact = rewrite(net, "--exact", "--gate", "macs")["after"]
    assert found["after"]["macs"] < exact["macs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --bottleneck R or --exact or both"),
        (["--exact", "--pipeline", "fold-affine"], "or else --pipeline SPEC"),
        (["--gate", "macs", "--bottleneck", 8], "--gate goes with --exact"),
        (["--gate", "macs", "--pipeline", "fold-affine"], "--gate goes with --exact"),
        (["--batch", 8, "--bottleneck", 8], "--batch goes with --exact"),
        (["--threads", 1, "--pipeline", "fold-affine"], "--threads goes with --exact"),
        (["--exact", "--gate", "guess"], "'guess' is not one of"),
        (["--exact", "--sides", "both"], "--sides goes with --bottleneck"),
        (["--exact", "--batch", 0], "0 is not in the range"),
        (["--exact", "--threads", 0], "0 is not in the range"),
    ],
)
def test_usage_errors(net: Path, arguments: list[object], message: str) -> None:
    result = run(net, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert [file.name for file in net.parent.iterdir()] == ["net.onnx"]


@dataclass(frozen=True, kw_only=True)
class Wrong(rewriting.Pass):
    """Doubles the first weight, and does not ask the judge."""

    name: ClassVar[str] = "wrong"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: rewriting.Context) -> Iterator[rewriting.Event]:
        weight = model.graph.nodes[0].inputs[1]
        weight.values = weight.values * 2
        yield rewriting.Event("rewrote", model.graph.nodes[0].outputs[0].name, "doubled")


def test_a_wrong_model_is_not_written(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = rewriting.Pipeline((Wrong(),))
    monkeypatch.setattr(workflow, "parse", lambda text: wrong)
    result = run(net, "--exact", "--gate", "always")
    assert result.exit_code == 1
    assert "net.onnx: output 'y' differs by" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [file.name for file in net.parent.iterdir()] == ["net.onnx"]


def test_doubles_cannot_be_proven(tmp_path: Path) -> None:
    path = tmp_path / "double.onnx"
    parse(NET.replace("float[", "double[")).save(path)
    result = run(path, "--exact", "--gate", "macs")
    assert result.exit_code == 1
    assert result.stderr.startswith("pwopt: double.onnx: cannot be proven unchanged")
    assert len(result.stderr.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["double.onnx"]
