import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import torch

from pwopt.errors import LearnError, PwoptError
from pwopt.learn.checkpoint import Checkpoint, fingerprint
from pwopt.learn.stage import Options, Report
from pwopt.learn.training import train

STEPS = 60
OPTIONS = Options(steps=STEPS, judgements=12, checkpoint_seconds=0)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


class Stopped(BaseException):
    pass


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Stopped


def learn(
    path: Path, *, end_at: int | None = None, end=stop, say=print
) -> tuple[torch.nn.Module, Report]:
    student, teacher = network(), torch.nn.Linear(5, 3)
    inputs = torch.randn(32, 5)

    def batches(first: int) -> Iterator[torch.Tensor]:
        for step in count(first):
            yield torch.randn(8, 5, generator=torch.Generator().manual_seed(step))

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (student(batch) - teacher(batch)).square().mean()

    def watch(status) -> None:
        if status.step == end_at:
            end()

    report = train(
        dict(student.named_parameters()),
        loss,
        batches,
        lambda: loss(inputs).item(),
        OPTIONS,
        checkpoint=Checkpoint.resume(path, "key"),
        watch=watch,
        say=say,
    )
    return student, report


def check_resumed(folder: Path, ended_at: int) -> None:
    said: list[str] = []
    resumed, report = learn(folder / "state", say=said.append)
    # The step that was taken last was not saved any more.
    assert said == [f"learning: going on from step {ended_at - 1} of {STEPS}"]
    unbroken, expected = learn(folder / "other")
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight)
    assert replace(report, seconds=0) == replace(expected, seconds=0)


def test_a_run_that_was_killed_ends_in_the_same_weights_as_an_unbroken_one(tmp_path: Path):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from pwopt.learn import descent
from test_checkpoint import kill, learn
descent.has_bfloat16 = lambda device: False  # as in conftest.py
learn(Path({str(tmp_path / "state")!r}), end_at=37, end=kill)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    check_resumed(tmp_path, 37)


@pytest.mark.parametrize("step", [1, 5, 6, STEPS])
def test_it_may_end_at_any_step(tmp_path: Path, step: int):
    with pytest.raises(Stopped):
        learn(tmp_path / "state", end_at=step)
    check_resumed(tmp_path, step)


def test_stages_are_kept_side_by_side(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "state", "key")
    checkpoint.save("blocks", {"best": {"w": torch.arange(3.0)}, "history": [(1, 0.5, 0.25)]})
    checkpoint.save("outputs", {"step": 3})
    stages = Checkpoint.resume(tmp_path / "state", "key").stages
    assert list(stages) == ["blocks", "outputs"]
    assert torch.equal(stages["blocks"]["best"]["w"], torch.arange(3.0))
    assert stages["blocks"]["history"] == [(1, 0.5, 0.25)]


def test_no_file_is_a_new_beginning(tmp_path: Path):
    assert not Checkpoint.resume(tmp_path / "state", "key").stages


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path):
    Checkpoint(tmp_path / "state", "key").save("blocks", {})
    with pytest.raises(LearnError, match=r"state: is of another run .*delete it to begin anew"):
        Checkpoint.resume(tmp_path / "state", "other key")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error_in_one_line(tmp_path: Path, share: float):
    path = tmp_path / "state"
    Checkpoint(path, "key").save("blocks", {"w": torch.zeros(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LearnError, match=r"is broken.*delete it to begin anew") as error:
        Checkpoint.resume(path, "key")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{"key": "key"}, [1, 2], {"key": "key", "format": 99, "stages": {}}, Path("x")]
)
def test_another_file_is_an_error_in_one_line(tmp_path: Path, content):
    torch.save(content, tmp_path / "state")
    with pytest.raises(LearnError, match=r"is broken.*delete it"):
        Checkpoint.resume(tmp_path / "state", "key")


def test_a_folder_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(LearnError, match=r"cannot be read \(Is a directory\)"):
        Checkpoint.resume(tmp_path, "key")


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("limit", [0, 1000, 40_000])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, limit: int):
    path = tmp_path / "state"
    checkpoint = Checkpoint(path, "key")
    checkpoint.save("blocks", {"w": torch.zeros(10)})
    whole = path.read_bytes()
    with full_disk(limit), pytest.raises(PwoptError, match="cannot be written") as error:
        checkpoint.save("blocks", {"w": torch.zeros(100_000)})
    assert "\n" not in str(error.value)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_learning_goes_on_on_a_full_disk_and_says_so_once(tmp_path: Path):
    expected, _ = learn(tmp_path / "expected")
    said: list[str] = []
    with full_disk(100):
        student, report = learn(tmp_path / "state", say=said.append)
    assert report.ended == "done"
    assert torch.equal(student[0].weight, expected[0].weight)
    assert [line for line in said if "cannot be written" in line] == [said[1]]
    assert said[1].endswith("learning goes on without a checkpoint")


def test_learning_goes_on_where_the_folder_is_missing(tmp_path: Path):
    said: list[str] = []
    _, report = learn(tmp_path / "missing" / "state", say=said.append)
    assert report.ended == "done"
    assert "cannot be written (No such file or directory)" in said[1]


def test_the_key_tells_runs_apart():
    weights = {"w": torch.arange(4.0)}
    keys = [
        fingerprint(weights, "options"),
        fingerprint(weights, "other options"),
        fingerprint({"w": torch.arange(4.0) + 1e-6}, "options"),
        fingerprint({"v": torch.arange(4.0)}, "options"),
        fingerprint({"w": torch.arange(4.0).view(2, 2)}, "options"),
        fingerprint(weights, "opt", "ions"),
        fingerprint(weights, b"graph", "options"),
    ]
    assert len(set(keys)) == len(keys)
    assert fingerprint({"w": torch.arange(4.0)}, "options") == keys[0]
