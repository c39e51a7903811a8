"""``pwopt demo``: the whole job on the network that comes with pwopt."""

import shlex
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from pwopt import models, runtime
from pwopt.cli import main


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Judge by 200 images, and measure the latency for a moment only."""
    samples = tmp_path_factory.mktemp("samples") / "eval.npz"
    with np.load(models.DEMO_EVALUATION) as whole:
        np.savez(samples, **{name: array[:200] for name, array in whole.items()})
    monkeypatch.setattr(models, "DEMO_EVALUATION", samples)
    monkeypatch.setattr(runtime, "interleave", partial(runtime.interleave, seconds=0.1))


def test_it_shows_three_commands_and_their_results(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "démo dir"
    for _ in range(2):  # the second run finds the files of the first
        result = CliRunner().invoke(main, ["demo", str(folder)])
        assert result.exit_code == 0, result.output
        commands = [line for line in result.stdout.splitlines() if line.startswith("$ pwopt ")]
        assert [line.split()[2] for line in commands] == ["analyze", "rewrite", "check"]
        for words in ("inception2.branch5x5", "keeps", "parameters", "top-1", "latency", "points"):
            assert words in result.stdout
        assert {file.name for file in folder.iterdir()} == {
            "naive_inception.onnx",
            "naive_inception.pwopt.onnx",
            "eval.npz",
        }
    onnx.checker.check_model(folder / "naive_inception.pwopt.onnx", full_check=True)


def test_its_commands_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo", "my demo"])
    assert result.exit_code == 0, result.output
    lines = [line.removeprefix("$ ") for line in result.stdout.splitlines() if line[:2] == "$ "]
    assert len(lines) == 3
    for line in lines:
        again = CliRunner().invoke(main, shlex.split(line)[1:])
        assert again.exit_code == 0, again.output
        assert again.stdout.splitlines()[0] in result.stdout


def test_without_a_folder_it_makes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["demo"]).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["pwopt-demo"]
