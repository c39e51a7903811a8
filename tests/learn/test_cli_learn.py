"""``pwopt learn`` and ``pwopt rewrite --init learned`` from the outside."""

import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import tiny
import torch
from helpers import parse, run, values
from made_up import images, network, time_by_macs

from pwopt import models, runtime
from pwopt.calibration import augment
from pwopt.calibration.samples import Calibration, calibration_samples
from pwopt.cli import demo, main
from pwopt.data import Samples
from pwopt.learn import learning
from pwopt.learn.stage import Options
from pwopt.model import Model
from pwopt.passes import bottleneck

BRIEF = ["--blocks", "--steps", "20", "--batch-size", "16", "--rate", "0.01", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with student.onnx, teacher.onnx and data.npz."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pwopt(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def line(text: str) -> Result:
    return pwopt(*text.split())


def learn(*arguments: object) -> Result:
    given = list(map(str, arguments))
    teacher = [] if "--teacher" in given else ["--teacher", "teacher.onnx"]
    data = [] if "--data" in given else ["--data", "data.npz"]
    return pwopt("learn", "student.onnx", *teacher, *data, *given)


def failed(result: Result, code: int, message: str) -> None:
    """Assert one line on stderr, without a traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert message in result.stderr, result.stderr
    if code != 2:
        assert result.stderr.startswith("pwopt: ")
        assert result.stderr.count("\n") == 1


def weights(path: Path) -> dict[str, Any]:
    return values(onnx.load(path))


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all((ours[name] == theirs[name]).all() for name in ours)


def test_it_learns(folder: Path) -> None:
    inputs = {file: file.read_bytes() for file in folder.iterdir()}
    result = learn(*BRIEF)
    assert result.exit_code == 0, result.output
    for words in ("blocks", "outputs", "16 steps done", "0.01", "agreement", "loss", "→"):
        assert words in result.stdout
    assert "40 samples held out" in result.stdout
    assert "learned from 120 samples on cpu" in result.stdout
    assert "Wrote student.learned.onnx\nNext: pwopt check teacher.onnx" in result.stderr
    assert {file: file.read_bytes() for file in inputs} == inputs
    written = Model.load("student.learned.onnx")
    assert written.metadata()["pwopt.pipeline"] == "learned{steps=20}"
    assert len({*folder.iterdir()}) == 4
    assert not same_weights(folder / "student.onnx", folder / "student.learned.onnx")


def test_json(folder: Path) -> None:
    result = learn(*BRIEF, "--json", "-o", "out.onnx")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["schema"], found["output"], found["device"]) == (1, "out.onnx", "cpu")
    assert (found["samples"], found["held_out"]) == (120, 40)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert 0 <= found["after"]["agreement"] <= 1
    assert [stage["stage"] for stage in found["stages"]] == ["blocks", "outputs"]
    assert found["stages"][1]["history"][-1]["step"] == 16
    assert (found["interrupted"], found["failure"]) == (False, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "0 is not in the range x>=1"),
        ("--minutes 0", "minutes: 0.0 makes no sense; give a number above 0"),
        ("--minutes 1 --steps 5", "--minutes or --steps, not both"),
        ("--resume", "--resume goes with --checkpoint"),
        ("-o student.onnx", "files of their own"),
        ("-o teacher.onnx", "files of their own"),
        ("-o ./data.npz", "files of their own"),
        ("--checkpoint data.npz", "files of their own"),
        ("--checkpoint student.learned.onnx", "files of their own"),
        ("-o nowhere/out.onnx", "There is no folder nowhere"),
        ("--seed -1", "-1 is not in the range x>=0"),
        ("--checkpoint nowhere/c.pt", "There is no folder nowhere"),
        ("--rate 0", "rate: 0.0 makes no sense"),
        ("--rate inf", "rate: inf makes no sense"),
        ("--temperature -1", "temperature: -1.0 makes no sense"),
        ("--batch-size 0", "0 is not in the range"),
        ("--label-weight nan", "label weight: nan makes no sense"),
        ("--output-weight y", "'y' is not of the form NAME=W"),
        ("--output-weight y=-1", "weight of 'y': -1.0 makes no sense"),
        ("--output-weight y=nan", "weight of 'y': nan makes no sense"),
        ("--device gpu", "'gpu' is not one of"),
    ],
)
def test_wrong_usage(folder: Path, options: str, message: str) -> None:
    before = sorted(folder.iterdir())
    failed(learn(*shlex.split(options)), 2, message)
    assert sorted(folder.iterdir()) == before


def test_it_asks_for_data(folder: Path) -> None:
    failed(pwopt("learn", "student.onnx", "--teacher", "teacher.onnx"), 2, "--data")
    failed(pwopt("learn", "student.onnx", "--data", "data.npz"), 2, "--teacher")


def test_what_cannot_be_done_is_said_in_one_line(folder: Path) -> None:
    (folder / "empty").mkdir()
    np.savez("nan.npz", x=np.full((64, 3, 8, 8), np.nan, np.float32))
    np.savez("few.npz", x=tiny.images(5))
    other = tiny.TEACHER.replace("] y)", "] scores)").replace("y = Gemm", "scores = Gemm")
    tiny.teacher(other).save("other.onnx")
    tiny.student(tiny.STUDENT.replace("Relu(b)", "Hardmax(b)")).save("odd.onnx")
    (folder / "broken.pt").write_bytes(b"no checkpoint")
    for options, message in (
        ("--data empty --preprocess unit", "empty: "),
        ("--data nan.npz", "nan.npz: 'x' holds NaN or infinity"),
        ("--data few.npz", "5 samples are too few to learn from"),
        ("--data nothing.npz", "no such file or folder"),
        ("--teacher other.onnx", "its outputs are y, those of other.onnx scores"),
        ("--teacher nothing.onnx", "no such file"),
        ("--teacher odd.onnx", "odd.onnx: cannot be learned, for learning does not know Hardmax"),
        ("--output-weight z=2", "there is no output z"),
        ("--checkpoint broken.pt --resume", "broken.pt: is broken"),
    ):
        failed(learn(*BRIEF, *options.split()), 1, message)
    if not torch.cuda.is_available():
        failed(learn("--device", "cuda"), 1, "choose --device cpu")
    assert not (folder / "student.learned.onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "learn student.onnx --teacher teacher.onnx --data data.npz",
        "rewrite teacher.onnx --bottleneck 4 --init learned --data data.npz",
        "demo --learn",
    ],
)
def test_without_torch_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    before = sorted(folder.iterdir())
    failed(line(arguments), 1, "learning needs torch: pip install 'pwopt[learn]'")
    assert sorted(folder.iterdir()) == before


def test_a_folder_cannot_be_written(folder: Path) -> None:
    failed(learn(*BRIEF, "-o", folder), 1, "is a folder; name a file to write")


def test_a_rate_that_is_far_too_high(folder: Path) -> None:
    result = learn("--steps", 400, "--rate", 10000, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "diverged, even at a rate of" in " ".join(result.stdout.split())
    assert (folder / "student.learned.onnx").exists()


def test_a_checkpoint_is_deleted_when_all_is_done(folder: Path) -> None:
    result = learn(*BRIEF, "--checkpoint", "run.pt")
    assert result.exit_code == 0, result.output
    assert not (folder / "run.pt").exists()


def test_an_unfinished_run_is_not_begun_anew_by_mistake(folder: Path) -> None:
    (folder / "run.pt").write_bytes(b"of a run that was killed")
    failed(learn(*BRIEF, "--checkpoint", "run.pt"), 2, "run.pt is there already: add --resume")
    assert (folder / "run.pt").read_bytes() == b"of a run that was killed"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write to")
def test_a_checkpoint_that_cannot_be_written(folder: Path) -> None:
    result = learn(*BRIEF, "--checkpoint", "/proc/pwopt.pt")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("/proc/pwopt.pt") == 2  # once in each stage
    assert "learning goes on without a checkpoint" in result.stderr
    assert (folder / "student.learned.onnx").exists()


def test_a_checkpoint_of_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        assert learn(*BRIEF, "--checkpoint", "run.pt").exit_code == 0
    assert (folder / "run.pt").exists()
    (folder / "student.learned.onnx").unlink()
    again = learn(*BRIEF, "--seed", 1, "--checkpoint", "run.pt", "--resume")
    failed(again, 1, "run.pt: is of another run")


# -- processes ------------------------------------------------------------------------------------

COMMAND = ["student.onnx", "--teacher", "teacher.onnx", "--data", "data.npz", "--device", "cpu"]


def process(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, "learn", *COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell is born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


OFTEN = """
import os, signal
from functools import partial
from pwopt.cli import main
from pwopt.learn import learning
from pwopt.learn.checkpoint import Checkpoint
from pwopt.learn.stage import Options

learning.Options = partial(Options, checkpoint_seconds=0)
save, left = Checkpoint.save, [int(os.environ.get("SAVES", 1000))]

def last(*what):
    save(*what)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save = last
main()
"""


@pytest.mark.parametrize("saves", [4, 25])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    steps = ["--steps", "40", "--batch-size", "16"]
    whole = process(OFTEN, *steps, "-o", "whole.onnx")
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    interrupted = [*steps, "--checkpoint", "run.pt", "-o", "resumed.onnx"]
    monkeypatch.setenv("SAVES", str(saves))
    killed = process(OFTEN, *interrupted)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "run.pt").exists()
    assert not (folder / "resumed.onnx").exists()
    monkeypatch.delenv("SAVES")
    resumed = process(OFTEN, *interrupted, "--resume")
    _, said = resumed.communicate()
    assert resumed.returncode == 0, said
    assert "going on from step" in said
    assert same_weights(folder / "whole.onnx", folder / "resumed.onnx")
    assert not same_weights(folder / "student.onnx", folder / "resumed.onnx")
    assert not [*folder.glob(".pwopt*"), *folder.glob("*.pt")]


def test_ctrl_c_keeps_the_best(folder: Path) -> None:
    running = process(
        "from pwopt.cli import main; main()",
        *("--steps", "100000", "--rate", "0.003", "--checkpoint", "run.pt"),
    )
    assert running.stderr is not None
    for said in running.stderr:
        if "100000 steps" in said:
            break
    while not (folder / "run.pt").exists():
        sleep(0.01)
    sleep(2)
    running.send_signal(signal.SIGINT)
    table, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert "Interrupted: the best weights so far are kept" in said
    assert "--resume goes on" in said
    assert "interrupted after" in " ".join(table.split())
    assert (folder / "student.learned.onnx").exists()
    assert (folder / "run.pt").exists()


def test_ctrl_c_before_anything_was_gained_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pwopt.learn.descent.Descent.step", interrupted)
    (folder / "student.learned.onnx").write_bytes(b"learned before")
    result = line(f"learn {' '.join(COMMAND)} --steps 20 --rate 0.01")
    assert (result.exit_code, result.stdout) == (1, "")
    said = "pwopt: student.onnx: interrupted before anything was gained; nothing is written"
    assert result.stderr.splitlines()[-1] == said
    assert (folder / "student.learned.onnx").read_bytes() == b"learned before"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_learn_as_one(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "pwopt", "learn", *COMMAND, *BRIEF, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # of the first process alone
    assert found["after"]["loss"] < found["before"]["loss"]
    assert done.stderr.count("Wrote student.learned.onnx") == 1
    assert done.stderr.count("outputs: 16 steps done") == 1
    assert not same_weights(folder / "student.onnx", folder / "student.learned.onnx")


# -- pwopt rewrite --init learned ---------------------------------------------------------------


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with net.onnx and calib.npz; times follow from MACs."""
    time_by_macs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning._Lesson, "options", lambda *_: Options(steps=60, rate=2e-4))
    network().save("net.onnx")
    x, classes = images(300, seed=3)
    np.savez("calib.npz", x=x, labels=classes)
    return tmp_path


def rewrite(*arguments: object) -> Any:
    options = ["--data", "calib.npz", "--init", "learned", "--json", "-o", "out.onnx"]
    result = pwopt("rewrite", "net.onnx", *options, "--gate", "macs", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(name: str) -> float:
    x = {"x": images(256, seed=4)[0]}
    right, found = (run(Model.load(file), x)[0] for file in ("net.onnx", name))
    return float(((found - right) ** 2).mean())


def test_bottlenecks_of_a_rank_are_learned(net: Path) -> None:
    found = rewrite("--bottleneck", 8, "--minutes", 0.5)
    assert [stage["stage"] for stage in found["learned"]["stages"]] == ["outputs"]
    assert found["learned"]["after"]["loss"] < found["learned"]["before"]["loss"]
    assert found["pipeline"].endswith("init=calibrated},learned{minutes=0.5}")
    assert Model.load("out.onnx").metadata()["pwopt.pipeline"] == found["pipeline"]
    assert line("rewrite net.onnx --bottleneck 8 --data calib.npz -o plain.onnx").exit_code == 0
    nodes, plain = (
        [(node.op_type, *node.output) for node in onnx.load(file).graph.node]
        for file in ("out.onnx", "plain.onnx")
    )
    assert nodes == plain
    assert error("out.onnx") < error("plain.onnx")


@pytest.mark.parametrize("rank", ["8", "auto"])
def test_what_learning_is_judged_by_is_new_to_its_start(
    net: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    judged: set[float] = set()
    lesson = learning._Lesson.__init__

    def begin(self: learning._Lesson, *arguments: Any) -> None:
        lesson(self, *arguments)
        as_they_are = self.held_out[: len(self.held_out) // 2]
        judged.update(float(x.sum()) for batch in as_they_are for x in batch.feeds["x"])

    calibrated: set[float] = set()

    def chosen(source: Samples, *rest: Any) -> Calibration:
        found = calibration_samples(source, *rest)
        batches = [*found.fit, *found.held_out]
        calibrated.update(float(x.sum()) for batch in batches for x in batch.feeds["x"])
        return found

    monkeypatch.setattr(learning._Lesson, "__init__", begin)
    monkeypatch.setattr(augment, "calibration_samples", chosen)
    monkeypatch.setattr(bottleneck, "calibration_samples", chosen)
    rewrite("--bottleneck", rank, *(["--speedup", 6, "--cost", "macs"] if rank == "auto" else []))
    assert len(judged) == 64
    assert len(calibrated) == 300 - 64
    assert judged.isdisjoint(calibrated)


def test_a_default_output_that_is_a_folder_is_refused_before_learning(net: Path) -> None:
    (net / "net.pwopt.onnx").mkdir()
    arguments = "rewrite net.onnx --bottleneck 8 --init learned --data calib.npz"
    result = line(arguments)
    failed(result, 1, "net.pwopt.onnx: is a folder; name a file to write")
    assert "steps" not in result.stderr


def test_a_checkpoint_stays_where_nothing_was_learned(net: Path) -> None:
    parse("g (float[N,3,16,16] x) => (float[] y) { y = Relu(x) }").save("net.onnx")
    Path("run.pt").write_bytes(b"of another run")
    assert "learned" not in rewrite("--bottleneck", 8, "--checkpoint", "run.pt", "--resume")
    assert Path("run.pt").read_bytes() == b"of another run"


def test_bottlenecks_of_chosen_ranks_are_learned(net: Path) -> None:
    found = rewrite("--bottleneck", "auto", "--speedup", 6, "--cost", "macs")
    assert found["before"]["macs"] >= 6 * found["after"]["macs"]
    assert found["calibrated"]["chosen"]["macs"] == found["after"]["macs"]
    assert [stage["stage"] for stage in found["learned"]["stages"]] == ["outputs"]
    # The splits that were fitted to these samples leave next to nothing to learn from them.
    assert found["learned"]["after"]["loss"] <= found["learned"]["before"]["loss"]
    assert "learned{minutes=10}" in found["pipeline"]


def test_relu_bottlenecks_are_learned(net: Path) -> None:
    linear = rewrite("--bottleneck", 8)
    relu = rewrite("--bottleneck", 8, "--activation", "relu")
    assert relu["after"]["nodes"] == linear["after"]["nodes"] + 2
    assert "relu-bottlenecks,learned{" in relu["pipeline"]
    assert relu["learned"]["after"]["loss"] < relu["learned"]["before"]["loss"]
    onnx.checker.check_model("out.onnx", full_check=True)


def test_the_table_tells_of_learning(net: Path) -> None:
    result = line(
        "rewrite net.onnx --bottleneck 8 --init learned --data calib.npz --checkpoint c.pt"
    )
    assert result.exit_code == 0, result.output
    for words in ("bottleneck: 2 rewritten", "parameters", "outputs", "samples held out"):
        assert words in result.stdout
    assert {file.name for file in net.iterdir()} == {"net.onnx", "net.pwopt.onnx", "calib.npz"}


def test_what_is_not_split_is_not_learned(net: Path) -> None:
    tiny.teacher().save("net.onnx")
    np.savez("calib.npz", x=tiny.images())
    result = line("rewrite net.onnx --bottleneck 4 --init learned --data calib.npz")
    assert result.exit_code == 0, result.output
    assert "no layer was split: there is nothing to learn" in result.stderr
    assert same_weights(net / "net.onnx", net / "net.pwopt.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--exact --init learned --data calib.npz", "give --bottleneck R or auto"),
        ("--bottleneck 8 --init learned", "add --data"),
        ("--bottleneck auto --init learned --data calib.npz", "give --speedup"),
        ("--bottleneck auto --max-drop 1 --init learned --data calib.npz", "give --speedup"),
        (
            "--bottleneck auto --max-drop 1 --speedup 2 --init learned --data calib.npz",
            "--max-drop",
        ),
        ("--bottleneck 8 --data calib.npz --minutes 3", "--minutes goes with --init learned"),
        ("--bottleneck 8 --data calib.npz --device cpu", "--device goes with --init learned"),
        ("--bottleneck 8 --activation relu", "--activation goes with --init learned"),
        ("--bottleneck 8 --checkpoint c.pt", "--checkpoint goes with --init learned"),
        ("--bottleneck 8 --init learned --data calib.npz --resume", "--resume goes with --checkp"),
        ("--bottleneck 8 --init learned --data calib.npz --checkpoint net.onnx", "of their own"),
    ],
)
def test_wrong_usage_of_rewrite(net: Path, options: str, message: str) -> None:
    before = sorted(net.iterdir())
    failed(pwopt("rewrite", "net.onnx", *options.split()), 2, message)
    assert sorted(net.iterdir()) == before


def test_rewriting_by_several_processes_is_refused(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = "rewrite net.onnx --bottleneck 8 --init learned --data calib.npz"
    failed(line(arguments), 1, "start pwopt learn by torchrun")


def test_the_demo_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_by_macs(monkeypatch)
    monkeypatch.setattr(demo, "MINUTES", 0.05)
    monkeypatch.setattr(runtime, "interleave", partial(runtime.interleave, seconds=0.1))
    for name in ("DEMO_CALIBRATION", "DEMO_EVALUATION"):
        with np.load(getattr(models, name)) as whole:
            np.savez(tmp_path / f"{name}.npz", **{key: a[:64] for key, a in whole.items()})
        monkeypatch.setattr(models, name, tmp_path / f"{name}.npz")
    result = pwopt("demo", "--learn", tmp_path / "d")
    assert result.exit_code == 0, result.output
    commands = [line for line in result.stdout.splitlines() if line.startswith("$ pwopt ")]
    wanted = ["analyze", "rewrite", "check", "rewrite", "check"]
    assert [line.split()[2] for line in commands] == wanted
    assert "held out" in result.stdout
    assert (tmp_path / "d" / "naive_inception.learned.onnx").exists()
