"""Passes of other packages: a real plug-in, and plug-ins that do not work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from helpers import parse

from pwopt.errors import PwoptError, SpecError
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.fold_affine import FoldAffine
from pwopt.registry import passes, pipeline

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "source"  # setuptools builds in place
    shutil.copytree(PLUGIN, source)
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", "--target", site, source], check=True)
    return site


def pwopt(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pwopt", *arguments],
        env=os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_pass_is_listed(installed: Path) -> None:
    result = pwopt(installed, "passes")
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names == ["pass", *passes(), "drop-identity"]
    assert "Remove Identity operators." in lines[-1]
    assert "keep=STR | NONE" in lines[-1]


def test_an_installed_pass_is_explained(installed: Path) -> None:
    result = pwopt(installed, "passes", "drop-identity")
    assert result.stdout.startswith("drop-identity (exact)\n\nRemove Identity operators.")
    assert "let the readers of an Identity read what it copies" in result.stdout
    described = json.loads(pwopt(installed, "passes", "drop-identity", "--json").stdout)
    assert described == {
        "schema": 1,
        "passes": [
            {
                "name": "drop-identity",
                "exact": True,
                "help": described["passes"][0]["help"],
                "options": [
                    {"name": "keep", "type": "str | None", "required": False, "default": None}
                ],
            }
        ],
    }


def test_an_installed_pass_rewrites(installed: Path, tmp_path: Path) -> None:
    model, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    text = "n (float[1,4] x) => (float[1,4] y) { a = Identity(x) b = Identity(a) y = Relu(b) }"
    parse(text).save(model)
    spec = "drop-identity{keep=a}"
    result = pwopt(installed, "rewrite", model, "--pipeline", spec, "-o", target)
    assert result.returncode == 0, result.stderr
    proto = onnx.load(target)
    assert [node.op_type for node in proto.graph.node] == ["Identity", "Relu"]
    assert {entry.key: entry.value for entry in proto.metadata_props}["pwopt.pipeline"] == spec


def fake(site: Path, package: str, code: str, target: str) -> None:
    """Put a package with one entry point there, as an installer leaves it."""
    (site / f"{package}.py").write_text(code)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pwopt.passes]\nmine = {package}:{target}\n")


CLASH = """
from dataclasses import dataclass
from pwopt.passes.fold_affine import FoldAffine

@dataclass(frozen=True, kw_only=True)
class Mine(FoldAffine):
    name = "bottleneck"
"""

NAMELESS = """
from dataclasses import dataclass
from pwopt import Pass

@dataclass(frozen=True, kw_only=True)
class Mine(Pass):
    exact = True
    def apply(self, model, context):
        yield from ()
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_thing", "cannot be loaded (ModuleNotFoundError: No module named"),
        ("def", "cannot be loaded (SyntaxError: "),
        ("raise RuntimeError('two\\nlines')", "cannot be loaded (RuntimeError: two lines)"),
        ("", "cannot be loaded (AttributeError: "),
        ("Mine = 3", "is not a Pass"),
        (NAMELESS, "is not a Pass"),
        (CLASH, "there is already a pass 'bottleneck'; rename it"),
    ],
)
def test_a_broken_plugin_is_named_in_one_line(tmp_path: Path, code: str, reason: str) -> None:
    fake(tmp_path, "broken", code, "Mine")
    result = pwopt(tmp_path, "passes")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("pwopt: pass 'mine' of broken: ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_plugins_of_one_name_do_not_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = CLASH.replace("bottleneck", "mine")
    for package in ("plugin_one", "plugin_two"):
        fake(tmp_path, package, good, "Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PwoptError, match="there is already a pass 'mine'"):
        passes()


def test_built_in_passes_come_first() -> None:
    known = list(passes())
    assert (known[0], known[-1]) == ("fold-affine", "relu-bottlenecks")
    assert {"hoist-stride", "gemm-to-conv"} < set(known)


def test_a_pipeline_is_made_from_text() -> None:
    made = pipeline("fold-affine,bottleneck{rank=8}")
    assert made.passes == (FoldAffine(), Bottleneck(rank=8))
    with pytest.raises(SpecError, match="unknown pass 'nonsense'; there are bottleneck, conv-to"):
        pipeline("nonsense")


def test_an_unknown_pass_has_no_help(tmp_path: Path) -> None:
    result = pwopt(tmp_path, "passes", "nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pwopt: unknown pass 'nonsense'; there are {', '.join(passes())}\n"
