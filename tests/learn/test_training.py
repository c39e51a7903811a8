from collections.abc import Callable, Iterator
from itertools import count
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import torch

from pwopt.errors import LearnError
from pwopt.learn import training
from pwopt.learn.checkpoint import Checkpoint
from pwopt.learn.rate import HIGHEST, LOWEST, MARGIN, ladder, pick, schedule
from pwopt.learn.stage import Options, Status
from pwopt.learn.training import RESCUES, SKIPPED_IN_A_ROW, TAMED, plan, train

Batch = tuple[torch.Tensor, torch.Tensor]


class Line:
    """A student y = w·x + b of a teacher of the same form."""

    def __init__(self, *, spoil: Callable[[int], bool] = lambda step: False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.teacher = torch.randn(3, 4, generator=generator)
        self.weights = {
            "w": torch.nn.Parameter(torch.zeros(3, 4)),
            "b": torch.nn.Parameter(torch.ones(3)),
            "unused": torch.nn.Parameter(torch.ones(2)),
        }
        self.held_out = torch.randn(64, 4, generator=generator)
        self.spoil = spoil
        self.seen: list[int] = []

    def batches(self, first: int) -> Iterator[Batch]:
        for step in count(first):
            self.seen.append(step)
            inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            yield inputs * nan if self.spoil(step) else inputs

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ self.weights["w"].T + self.weights["b"]
        return torch.nn.functional.mse_loss(outputs, inputs @ self.teacher.T)

    def judge(self) -> float:
        return self.loss(self.held_out).item()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def train(self, options: Options, **more):
        return train(self.weights, self.loss, self.batches, self.judge, options, **more)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_the_best_weights_in_place():
    line = Line()
    report = line.train(Options(steps=300, rate=0.03))
    assert (report.ended, report.steps, report.skipped) == ("done", 300, 0)
    assert report.best < 0.01 * report.start
    assert line.judge() == report.best == min(value for _, _, value in report.history)
    assert [step for step, _, _ in report.history] == list(range(10, 301, 10))
    assert (
        report.message == f"learning: 300 steps done; kept the weights of step {report.best_step}"
    )


def test_the_running_average_is_what_is_judged_and_kept():
    line, passed, judged = Line(), [], []

    def watch(status: Status) -> None:
        passed.append(line.values()["w"])

    def judge() -> float:
        judged.append(line.values()["w"])
        return -float(len(judged))  # better each time

    average = line.values()["w"]
    options = Options(steps=60, rate=0.01, judgements=15)
    train(line.weights, line.loss, line.batches, judge, options, watch=watch)
    for step, weight in enumerate(passed, 1):
        average = 3 / 4 * average + 1 / 4 * weight  # over the steps from one judgement to the next
        if step % 4 == 0:
            torch.testing.assert_close(judged[step // 4], average)
    assert torch.equal(line.values()["w"], judged[-1])
    assert not torch.equal(passed[-1], judged[-1])


def test_the_average_is_no_longer_where_few_judgements_have_time(monkeypatch):
    monkeypatch.setattr(training, "plan", lambda *_: (300, 300))
    line = Line()
    report = line.train(Options(minutes=1, rate=0.03))
    assert len(report.history) == 1
    assert report.best < 0.01 * report.start


def test_a_rate_is_found_and_the_range_test_leaves_no_trace():
    line, steps = Line(), []
    start = line.values()

    def watch(status: Status) -> None:
        steps.append(status.step)

    said: list[str] = []
    report = line.train(Options(steps=1), watch=watch, say=said.append)
    assert LOWEST <= report.rate <= HIGHEST
    assert steps == [1]
    assert said == [f"learning: 1 steps, learning rate {report.rate:.2g}"]
    largest = max((p - start[name]).abs().max() for name, p in line.values().items())
    assert largest <= report.rate


def test_minutes_become_a_number_of_steps():
    line = Line()
    report = line.train(Options(minutes=0.01, rate=0.01, patience=1000))
    assert report.ended == "done"
    assert report.steps == report.planned >= 1


def test_too_few_minutes_to_find_a_rate_are_told_of():
    said: list[str] = []
    report = Line().train(Options(minutes=1e-6), say=said.append)
    assert "finding a rate alone took 0.0 minutes of 1e-06: give --minutes more" in said[0]
    assert report.steps == 1


def test_what_is_left_of_the_minutes_is_shared_between_steps_and_judging():
    options = Options(minutes=1, judgements=30)
    assert plan(options, spent=10, pace=0.1, judging=0.1) == (470, 16)
    # Judging takes a fifth of the time at most; the budget may be gone already.
    assert plan(options, spent=10, pace=0.1, judging=5) == (400, 200)
    assert plan(options, spent=70, pace=0.1, judging=5) == (1, 1)
    assert plan(Options(steps=100, judgements=30), spent=70, pace=9, judging=9) == (100, 4)


def test_the_rate_rises_and_then_falls_to_almost_nothing():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    peak = int(np.argmax(rates))
    assert 9 <= peak <= 10
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert max(rates) == pytest.approx(1, abs=0.1)
    assert 0 < rates[-1] < 0.001
    assert 0 < schedule(0, 1, 0.05) <= 1


def test_a_rate_below_the_edge_is_picked():
    rates = ladder(40)
    before = [2.0] * 40
    falling = [2.0 * np.exp(-0.05 * k) for k in range(25)]
    picked = MARGIN * pick(rates, [*falling, 3.0, 9.0, inf], before)
    assert rates[18] <= picked <= rates[24]
    # Where nothing gets better the largest rate is picked that does no harm.
    picked = MARGIN * pick(rates, [2.0] * 20 + [2.5, 4.0, 20.0], before)
    assert rates[15] <= picked <= rates[19]


def test_batches_that_are_not_finite_before_learning_say_nothing_about_rates():
    rates, clean = ladder(40), [1.0] * 40
    spoilt = [nan if k % 3 == 0 else 1.0 for k in range(40)]
    assert pick(rates, spoilt, spoilt) == pytest.approx(pick(rates, clean, clean), rel=0.3)
    with pytest.raises(LearnError, match="not finite on any batch"):
        pick(rates, clean, [nan] * 40)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    line = Line(spoil=lambda step: step % 5 == 2)
    report = line.train(Options(steps=100, rate=0.03))
    assert (report.ended, report.skipped) == ("done", 20)
    assert report.best < report.start


def test_nothing_but_nan_ends_at_once_with_the_start():
    line = Line(spoil=lambda step: True)
    start = line.values()
    report = line.train(Options(steps=1000, rate=0.03))
    assert (report.ended, report.steps) == ("not finite", SKIPPED_IN_A_ROW)
    assert "look for NaN or infinity in the data; kept those of the start" in report.message
    assert same(line.values(), start)
    with pytest.raises(LearnError, match="not finite on any batch"):
        line.train(Options(steps=1000))


def test_nan_from_some_step_on_keeps_the_best_so_far():
    line = Line(spoil=lambda step: step >= 50)
    report = line.train(Options(steps=1000, rate=0.03, judgements=100))
    assert report.ended == "not finite"
    assert report.best < report.start
    assert line.judge() == report.best


def test_held_out_samples_that_are_not_finite_are_refused():
    line = Line()
    line.held_out[0] = nan
    with pytest.raises(LearnError, match="held-out samples is not finite"):
        line.train(Options(steps=10, rate=0.01))


@pytest.mark.parametrize("rate", [1e8, 1e30])
def test_a_rate_that_diverges_ends_with_the_start_and_says_so(rate):
    line = Line()
    start, said = line.values(), []
    report = line.train(Options(steps=400, rate=rate), say=said.append)
    assert (report.ended, report.halvings, report.best_step) == ("diverged", RESCUES, 0)
    assert report.rate == rate / 2**RESCUES
    assert "give a lower one; kept those of the start" in report.message
    assert said[1].startswith("learning: diverged; back to the best weights")
    assert same(line.values(), start)


def test_half_of_the_steps_without_a_gain_call_for_a_lower_rate():
    line, said = Line(), []
    judged = []

    def judge() -> float:
        judged.append(2.0 if judged and not said[1:] else 1.0 - 0.001 * len(judged))
        return judged[-1]

    options = Options(steps=60, rate=0.02)
    report = train(line.weights, line.loss, line.batches, judge, options, say=said.append)
    assert "no better than at the start; back to the best weights" in said[1]
    assert (report.ended, report.halvings, report.rate) == ("done", 1, 0.02 / TAMED)
    assert judged[:31] == [1.0] + [2.0] * 15 + judged[16:31]
    assert (report.best_step, report.best) == (60, judged[-1])


def test_a_rate_that_is_a_little_too_high_is_halved_until_it_helps():
    report = Line().train(Options(steps=400, rate=200.0, warm_up=0.0))
    assert report.halvings > 0
    assert report.best < report.start


def test_it_stops_once_held_out_values_get_no_better():
    line = Line()
    values = iter([5.0, 4.0, *[4.5] * 100])
    report = train(
        line.weights,
        line.loss,
        line.batches,
        lambda: next(values),
        Options(steps=1000, rate=0.01, judgements=100, patience=3),
    )
    assert (report.ended, report.steps, report.best_step) == ("no longer better", 40, 10)


def test_the_start_counts_among_the_best():
    line = Line()
    with torch.no_grad():
        line.weights["w"].copy_(line.teacher)
        line.weights["b"].zero_()
    start = line.values()
    report = line.train(Options(steps=50, rate=0.01))
    assert (report.best, report.best_step) == (report.start, 0)
    assert "no better than before in" in report.message
    assert same(line.values(), start)


@pytest.mark.parametrize("steps", [0, 25])
def test_an_interrupt_gives_the_best_so_far(steps):
    line = Line()
    taken = 0

    def watch(status: Status) -> None:
        nonlocal taken
        taken = status.step
        if status.step == steps:
            raise KeyboardInterrupt

    def say(text: str) -> None:
        if steps == 0:
            raise KeyboardInterrupt

    report = line.train(Options(steps=100, rate=0.03, judgements=10), watch=watch, say=say)
    assert (report.ended, taken) == ("interrupted", steps)
    assert report.best_step == steps  # what was learned since the last judgement counts
    assert line.judge() == report.best
    assert report.message.startswith(f"learning: interrupted after {steps} of 100 steps")


def test_any_other_fault_leaves_the_best_in_place():
    line = Line()

    def watch(status: Status) -> None:
        if status.step == 25:
            raise OSError("gone")

    start = line.judge()
    with pytest.raises(OSError, match="gone"):
        line.train(Options(steps=100, rate=0.03, judgements=10), watch=watch)
    assert line.judge() < start


def test_one_seed_gives_one_result():
    results = []
    for _ in range(2):
        line = Line()
        line.train(Options(steps=30))
        results.append(line.values())
    assert same(*results)


def test_nothing_to_learn_is_an_error():
    line = Line()
    with pytest.raises(LearnError, match="nothing to learn"):
        train({}, line.loss, line.batches, line.judge, Options(steps=1))
    with pytest.raises(LearnError, match="minutes or steps"):
        line.train(Options())
    with pytest.raises(LearnError, match="depends on nothing"):
        train(
            line.weights,
            lambda batch: torch.zeros(()),
            line.batches,
            line.judge,
            Options(steps=1, rate=0.01),
        )


def test_batches_are_closed():
    line = Line()
    ended = []

    def batches(first: int) -> Iterator[torch.Tensor]:
        try:
            yield from line.batches(first)
        finally:
            ended.append(first)

    train(line.weights, line.loss, batches, line.judge, Options(steps=5))
    assert ended == [0, 0, 0]


def test_progress_tells_how_far_it_is():
    line, seen = Line(), []
    line.train(Options(steps=20, rate=0.01, judgements=2), watch=seen.append)
    assert [status.step for status in seen] == list(range(1, 21))
    assert all(status.steps == 20 and status.seconds_left >= 0 for status in seen)
    assert seen[-1].seconds_left == 0
    assert seen[-1].best <= seen[-1].held_out


def test_a_stage_that_ended_is_not_gone_through_again(tmp_path: Path):
    first, path = Line(), tmp_path / "state"
    report = first.train(Options(steps=20, rate=0.03), checkpoint=Checkpoint(path, "key"))
    second = Line()
    again = second.train(Options(steps=20, rate=0.03), checkpoint=Checkpoint.resume(path, "key"))
    assert again == report
    assert not second.seen
    assert same(first.values(), second.values())
