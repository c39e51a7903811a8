"""One stage of learning: from some weights to the best that held-out samples have seen.

Warm-up and cosine run over a number of steps that is known from the start. Where minutes are
given, they are turned into steps once, by the pace of the first steps, and the checkpoint keeps
that number: so a run that was killed and taken up again does exactly what an unbroken one does.
"""

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import ceil, inf, isfinite, nan
from statistics import fmean, median
from time import monotonic
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pwopt.errors import LearnError, PwoptError
from pwopt.learn.checkpoint import Checkpoint, State
from pwopt.learn.descent import Descent, Parameters
from pwopt.learn.distributed import ALONE, Processes
from pwopt.learn.rate import ladder, pick, schedule
from pwopt.learn.stage import Ended, Judged, Options, Report, Status

B = TypeVar("B")

SKIPPED_IN_A_ROW = 20
"""Steps after which no better luck is to be hoped for."""

RESCUES = 5
"""How often the best weights are restored and the rate halved."""

HOPELESS = 0.5
"""The share of the steps after which learning that never did better than the start has too high a
rate: on few samples, or in few steps, there is no way back from the harm that it does at first."""

TAMED = 4
"""How many times lower the rate is then."""

WRECKED = 10.0
"""Held-out values so many times the start's are no detour."""

TIMED = 5
"""Steps whose pace is taken where the rate is given."""

POINTS = range(12, 41)
"""Rates of a range test: as many as its share of the time allows."""

SHARE_OF_LOSSES_BEFORE = 0.03
"""How much of the minutes the losses before any step may take, about a quarter of the test."""

SHARE_OF_JUDGING = 0.2
"""How much of the minutes judgements may take."""


def train(
    parameters: Parameters,
    loss: Callable[[B], Tensor],
    batches: Callable[[int], Generator[B, None, None]],
    judge: Callable[[], float],
    options: Options,
    *,
    stage: str = "learning",
    checkpoint: Checkpoint | None = None,
    processes: Processes = ALONE,
    watch: Callable[[Status], None] = lambda status: None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Change parameters in place, to the best that `judge` has seen; never worse than they were.

    What is judged is their running average, over as many steps as lie between two of all the
    judgements asked for.
    Steps whose loss or gradient is not finite are skipped. After many in a row, or where held-out
    samples do ten times as badly as at the start, the best weights are restored and the rate is
    halved, a few times at most; after half of the steps without a gain, it is quartered. Ctrl-C
    ends learning early, and the report says so. A stage that the checkpoint holds is taken up where
    it was; one that had ended is not gone through again.

    Args:
        parameters: What is learned, by name.
        loss: Of a batch, a scalar. With several processes, of this one's batch.
        batches: Yields the endless batches from a step on, see `Batches.from_step`.
        judge: How bad the parameters as they are now do on held-out samples. Called in the first
            process only, without gradients.
        options: How to learn.
        stage: The name of this stage, unique in a checkpoint.
        checkpoint: Where the state is saved every few minutes. If it cannot be, a line is said,
            and learning goes on.
        processes: Those that learn together.
        watch: Called after each step, in the first process only.
        say: Called with lines to be read, in the first process only.

    Raises:
        LearnError: nothing to learn, or no finite loss even before learning. Whatever is raised,
            the best weights so far are in place.
    """
    if not parameters:
        raise LearnError("nothing to learn: no layer has weights that may change")
    if options.minutes is None and options.steps is None:
        raise LearnError("say how long to learn: minutes or steps")
    training = _Training(
        parameters, loss, batches, judge, options, stage, checkpoint, processes, watch, say
    )
    saved = processes.share(checkpoint.stages.get(stage) if checkpoint else None)
    if saved and "report" in saved:
        restore(parameters, saved["best"])
        return Report(**saved["report"])
    return training.run(saved)


def snapshot(parameters: Parameters) -> dict[str, Tensor]:
    """Copy the values of parameters, to the CPU's memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def restore(parameters: Parameters, values: dict[str, Tensor]) -> None:
    """Give parameters the values of a snapshot."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def plan(options: Options, spent: float, pace: float, judging: float) -> tuple[int, int]:
    """Return how many steps to take, and after how many to judge each time.

    Args:
        options: How to learn.
        spent: Seconds that are gone already.
        pace: Seconds that a step takes.
        judging: Seconds that a judgement takes.
    """
    judgements, steps = options.judgements, options.steps
    if steps is None:
        left = max(60 * (options.minutes or 0) - spent, 0)
        judgements = min(judgements, max(int(SHARE_OF_JUDGING * left / judging), 1))
        steps = max(int((left - judgements * judging) / pace), 1)
    return steps, max(ceil(steps / judgements), 1)


@dataclass(slots=True)
class _Course:
    """How far a stage is, in numbers."""

    start: float
    best: float
    steps: int = 0
    every: int = 1
    rate: float = nan
    step: int = 0
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    halvings: int = 0
    moved: bool = False
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[Judged] = field(default_factory=list)


@dataclass
class _Training(Generic[B]):
    parameters: Parameters
    loss: Callable[[B], Tensor]
    batches: Callable[[int], Generator[B, None, None]]
    judge: Callable[[], float]
    options: Options
    stage: str
    checkpoint: Checkpoint | None
    processes: Processes
    watch: Callable[[Status], None]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.descent = Descent(self.parameters, self.loss, self.processes)
        self.unsaved_is_known = False
        if not self.processes.first:
            self.watch = lambda status: None
            self.say = lambda line: None

    def run(self, saved: State | None) -> Report:
        self.begun = self.saved_at = monotonic()
        if saved:
            self._resume(saved)
        else:
            self._begin()
        try:
            ended = self._learn(planned=saved is not None)
        except KeyboardInterrupt:
            # The others may be anywhere: nothing is asked of them from here on. The last
            # checkpoint stays, and may be taken up.
            if self.processes.count == 1:
                self._keep_if_better()
            return self._report("interrupted")
        finally:
            restore(self.parameters, self.best)
        report = self._report(ended)
        self._save({"report": asdict(report), "best": self.best})
        return report

    # --- before the first step

    def _begin(self) -> None:
        self.processes.spread(list(self.parameters.values()))
        self.descent.forget()
        self.best = snapshot(self.parameters)
        start = self._judged()
        self.judging = monotonic() - self.begun
        if not isfinite(start):
            raise LearnError(
                "the loss on held-out samples is not finite, before any learning: look for NaN or "
                "infinity in the data and in the two models' outputs"
            )
        self.course = _Course(start=start, best=start)

    def _resume(self, saved: State) -> None:
        restore(self.parameters, saved["parameters"])
        self.descent.load(saved["descent"])
        self.best = saved["best"]
        self.course = _Course(**saved["course"])
        self.begun -= self.course.seconds
        self.say(f"{self.stage}: going on from step {self.course.step} of {self.course.steps}")

    def _plan(self) -> None:
        course, options = self.course, self.options
        rate, pace = options.rate, nan
        if rate is None:
            before = self._losses_before()
            rates = ladder(len(before))
            losses, pace = self._tried(rates, before)
            rate = pick(rates, losses, before)
        elif options.steps is None:
            _, pace = self._tried([0.0] * TIMED, [nan] * TIMED)
        course.rate = rate
        spent = monotonic() - self.begun
        if options.steps is None and options.minutes is not None and spent > 60 * options.minutes:
            self.say(
                f"{self.stage}: finding a rate alone took {spent / 60:.1f} minutes of "
                f"{options.minutes:g}: give --minutes more of them"
            )
        course.steps, course.every = self.processes.share(plan(options, spent, pace, self.judging))
        self.say(f"{self.stage}: {course.steps} steps, learning rate {rate:.2g}")
        self._save(self._state())

    def _tried(self, rates: list[float], before: list[float]) -> tuple[list[float], float]:
        """Return the losses of steps at these rates, and their pace in seconds; undo the steps."""
        losses: list[float] = []
        seconds: list[float] = []
        try:
            with closing(self.batches(0)) as batches:
                for rate, at_start in zip(rates, before, strict=True):
                    begun = monotonic()
                    losses.append(self.descent.step(next(batches), rate))
                    seconds.append(monotonic() - begun)
                    if isfinite(at_start) and not losses[-1] <= WRECKED * at_start:
                        break
        finally:
            restore(self.parameters, self.best)
            self.descent.forget()
        return losses, median(seconds[len(seconds) // 2 :])

    def _losses_before(self) -> list[float]:
        """Return the losses of the first batches: as many as there is time for."""
        losses: list[float] = []
        minutes = inf if self.options.minutes is None else self.options.minutes
        with closing(self.batches(0)) as batches:
            begun = monotonic()
            for batch in islice(batches, POINTS[-1]):
                losses.append(self.descent.loss(batch))
                late = monotonic() - begun > SHARE_OF_LOSSES_BEFORE * 60 * minutes
                if self.processes.share(late and len(losses) >= POINTS[0]):
                    break
        return losses

    # --- steps

    def _learn(self, *, planned: bool) -> Ended:
        if not planned:
            self._plan()
        course, options = self.course, self.options
        self.first_step, self.steps_begun = course.step, monotonic()
        horizon = ceil(course.steps / options.judgements)  # although fewer may have time
        with closing(self.batches(course.step)) as batches:
            while course.step < course.steps:
                rate = course.rate * schedule(course.step, course.steps, options.warm_up)
                loss = self.descent.step(next(batches), rate, horizon)
                ended = self._after(loss)
                self.watch(self._status(rate, loss))
                if ended:
                    return ended
                if monotonic() - self.saved_at >= options.checkpoint_seconds:
                    self._save(self._state())
        return "done"

    def _after(self, loss: float) -> Ended | None:
        """Count a step, judge where it is time to, and tell whether to stop."""
        course = self.course
        course.step += 1
        if isfinite(loss):
            course.losses.append(loss)
            course.skipped_in_a_row = 0
            course.moved = True
        else:
            course.skipped += 1
            course.skipped_in_a_row += 1
            if course.skipped_in_a_row == SKIPPED_IN_A_ROW:
                # Weights that no step has changed are not to blame.
                return self._rescue("diverged", 2) if course.moved else "not finite"
        if course.step % course.every and course.step < course.steps:
            return None
        return self._judge()

    def _judge(self) -> Ended | None:
        course = self.course
        value = self._judged()
        mean = fmean(course.losses) if course.losses else nan
        course.history.append((course.step, mean, value))
        course.losses.clear()
        if value < course.best:
            self._keep(value)
            return None
        course.stale += 1
        if not isfinite(value) or 0 < WRECKED * course.start < value:
            return self._rescue("diverged", 2)
        hopeless = HOPELESS * course.steps <= course.step < course.steps
        if hopeless and not (course.best_step or course.halvings):
            return self._rescue("no better than at the start", TAMED)
        return "no longer better" if course.stale >= self.options.patience else None

    def _keep_if_better(self) -> None:
        """Judge once more, so that what was learned since is not lost."""
        with suppress(KeyboardInterrupt):  # for those who cannot wait
            value = self._judged()
            if value < self.course.best:
                self._keep(value)

    def _keep(self, value: float) -> None:
        """Take the weights that were just judged for the best."""
        course = self.course
        with self.descent.averaged():
            self.best = snapshot(self.parameters)
        course.best, course.best_step, course.stale = value, course.step, 0

    def _rescue(self, why: str, slower: int) -> Ended | None:
        """Go back to the best weights, and on more slowly."""
        course = self.course
        if course.halvings == RESCUES:
            return "diverged"
        restore(self.parameters, self.best)
        self.descent.forget()
        course.rate /= slower
        course.halvings += 1
        course.stale = 0
        course.moved = False
        course.skipped_in_a_row = 0
        self.say(f"{self.stage}: {why}; back to the best weights, at a rate of {course.rate:.2g}")
        return None

    def _judged(self) -> float:
        with torch.no_grad(), self.descent.averaged():
            return self.processes.share(self.judge() if self.processes.first else nan)

    # --- what is told and kept

    def _status(self, rate: float, loss: float) -> Status:
        course = self.course
        pace = (monotonic() - self.steps_begun) / (course.step - self.first_step)
        return Status(
            step=course.step,
            steps=course.steps,
            rate=rate,
            loss=loss,
            held_out=course.history[-1][2] if course.history else course.start,
            best=course.best,
            skipped=course.skipped,
            seconds_left=pace * (course.steps - course.step),
        )

    def _report(self, ended: Ended) -> Report:
        course = self.course
        return Report(
            stage=self.stage,
            steps=course.step,
            planned=course.steps,
            skipped=course.skipped,
            rate=course.rate,
            halvings=course.halvings,
            start=course.start,
            best=course.best,
            best_step=course.best_step,
            seconds=monotonic() - self.begun,
            ended=ended,
            history=tuple(course.history),
        )

    def _state(self) -> State:
        self.course.seconds = monotonic() - self.begun
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "descent": self.descent.state(),
            "best": self.best,
            "course": asdict(self.course),
        }

    def _save(self, state: State) -> None:
        self.saved_at = monotonic()
        if self.checkpoint is None or not self.processes.first:
            return
        try:
            self.checkpoint.save(self.stage, state)
        except PwoptError as error:
            if not self.unsaved_is_known:
                self.say(f"{error}; learning goes on without a checkpoint")
            self.unsaved_is_known = True
