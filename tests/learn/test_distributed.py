import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import torch

from pwopt.errors import LearnError
from pwopt.learn.checkpoint import Checkpoint
from pwopt.learn.distributed import ALONE, Processes, choose_device, together
from pwopt.learn.stage import Options
from pwopt.learn.training import train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)

LARGE_BATCH = 16
SOME = Options(steps=40, checkpoint_seconds=0)


class Network(torch.nn.Module):
    """Called with keyword arguments; one parameter is never used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)
        self.unused = torch.nn.Parameter(torch.ones(4))

    def forward(self, *, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": self.last(torch.relu(self.first(feeds["x"])))}


class StopError(Exception):
    pass


def learn(
    processes: Processes,
    folder: Path,
    options: Options,
    *,
    spoilt: int | None = None,
    stop: int | None = None,
) -> None:
    """Learn from this process's share of each large batch; the last one meets a NaN in one step."""
    folder.mkdir(exist_ok=True)
    # Whatever the others begin with, the first one's weights count.
    student, teacher = Network(seed=processes.rank), Network(seed=7)
    held_out = torch.randn(32, 5)

    def batches(first: int) -> Iterator[torch.Tensor]:
        for step in count(first):
            inputs = torch.randn(LARGE_BATCH, 5, generator=torch.Generator().manual_seed(step))
            if step == stop:
                raise StopError
            if step == spoilt:
                inputs[-1] = torch.nan
            yield inputs.chunk(processes.count)[processes.rank]

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        feeds = {"x": inputs}
        with torch.no_grad():
            expected = teacher(feeds=feeds)["y"]
        return (student(feeds=feeds)["y"] - expected).square().mean()

    said: list[str] = []
    report = train(
        dict(student.named_parameters()),
        loss,
        batches,
        lambda: loss(held_out).item(),
        options,
        checkpoint=Checkpoint.resume(folder / f"checkpoint{processes.rank}", "key"),
        processes=processes,
        say=said.append,
    )
    torch.save(
        {
            "weights": student.state_dict(),
            "history": report.history,
            "numbers": (report.steps, report.planned, report.skipped, report.rate, report.best),
            "ended": report.ended,
            "said": len(said),
        },
        folder / f"result{processes.rank}",
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run some learning in two processes, as a user would start them: a folder of results."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(
        f"""
import contextlib
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from pwopt.learn import descent
from pwopt.learn.distributed import together
from pwopt.learn.stage import Options
from test_distributed import SOME, StopError, learn
descent.has_bfloat16 = lambda device: False  # as in conftest.py
torch.set_num_threads(1)
folder = Path({str(folder)!r})
with together(torch.device("cpu")) as processes:
    learn(processes, folder / "some", SOME, spoilt=21)
    with contextlib.suppress(StopError):
        learn(processes, folder / "resumed", SOME, spoilt=21, stop=25)
    learn(processes, folder / "resumed", SOME, spoilt=21)
    minutes = Options(minutes=0.02, rate=1e3, judgements=100, patience=3)
    learn(processes, folder / "minutes", minutes)
"""
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path, count: int = 2) -> list[dict]:
    return [torch.load(folder / f"result{rank}") for rank in range(count)]


def check_equal(a: dict, b: dict) -> None:
    assert a["numbers"] == b["numbers"]
    assert a["history"] == b["history"]
    assert a["ended"] == b["ended"]
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name])


def test_two_processes_learn_what_one_does(two: Path, tmp_path: Path):
    first, second = results(two / "some")
    check_equal(first, second)
    learn(ALONE, tmp_path / "one", SOME, spoilt=21)
    (one,) = results(tmp_path / "one", 1)
    # Steps, planned, skipped: the NaN that one process met counts in both.
    assert first["numbers"][:3] == one["numbers"][:3] == (40, 40, 1)
    assert first["numbers"][3] == pytest.approx(one["numbers"][3])
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=1e-3, atol=1e-4)


def test_only_the_first_process_writes_and_narrates(two: Path):
    assert [result["said"] for result in results(two / "some")] == [1, 0]
    assert (two / "some" / "checkpoint0").exists()
    assert not (two / "some" / "checkpoint1").exists()


def test_two_processes_go_on_where_they_were(two: Path):
    first, second = results(two / "resumed")
    check_equal(first, second)
    check_equal(first, results(two / "some")[0])


def test_processes_agree_on_minutes_and_on_stopping(two: Path):
    first, second = results(two / "minutes")
    check_equal(first, second)
    assert first["ended"] != "done"


def test_alone_nothing_is_exchanged():
    tensor = torch.ones(3)
    ALONE.average([tensor])
    ALONE.spread([tensor])
    assert ALONE.share("value") == "value"
    assert ALONE.first
    assert torch.equal(tensor, torch.ones(3))
    with together(torch.device("cpu")) as processes:
        assert processes == ALONE


def test_processes_that_cannot_be_joined_are_an_error_in_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(LearnError, match="cannot be joined") as error,
        together(torch.device("cpu")),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(LearnError, match="choose --device cpu"):
        choose_device("cuda")
