"""What a stage of learning is asked for, and what it tells."""

from dataclasses import dataclass
from typing import Literal

Ended = Literal["done", "no longer better", "diverged", "not finite", "interrupted"]

Judged = tuple[int, float, float]
"""A step, the mean training loss since the judgement before, the held-out value."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to learn; one of `minutes` and `steps` is needed.

    Attributes:
        minutes: How long, roughly: turned into steps by the pace of the first ones.
        steps: How many, exactly.
        rate: Of Adam, at its height; None to find it by a range test.
        warm_up: The share of the steps in which the rate rises.
        judgements: How many are spread over the steps; fewer where they would take too long.
        patience: After how many judgements without a better one to stop; most, since much
            is only gained as the rate falls.
        checkpoint_seconds: How often the state is saved.
    """

    minutes: float | None = None
    steps: int | None = None
    rate: float | None = None
    warm_up: float = 0.05
    judgements: int = 30
    patience: int = 25
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Status:
    """Where learning stands after a step.

    Attributes:
        step: Steps taken or skipped.
        steps: How many there will be, if it does not stop early.
        rate: The learning rate of this step.
        loss: Of this step; NaN if it was skipped.
        held_out: The last judgement.
        best: The best one.
        skipped: Steps whose loss or gradient was not finite.
        seconds_left: At the pace so far.
        agreement: The share of held-out samples whose class is the teacher's, when it was last
            counted; None without class scores.
    """

    step: int
    steps: int
    rate: float
    loss: float
    held_out: float
    best: float
    skipped: int
    seconds_left: float
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a stage.

    Attributes:
        stage: Its name.
        steps: Steps taken or skipped.
        planned: How many there would have been.
        skipped: Steps whose loss or gradient was not finite.
        rate: The learning rate at its height, as lowered in the end.
        halvings: How often the rate was lowered.
        start: The held-out value at the start.
        best: That of the weights that were kept.
        best_step: The step they are of; 0 for the start.
        seconds: In all, over all resumptions.
        ended: Why it ended.
        history: All judgements.
    """

    stage: str
    steps: int
    planned: int
    skipped: int
    rate: float
    halvings: int
    start: float
    best: float
    best_step: int
    seconds: float
    ended: Ended
    history: tuple[Judged, ...]

    @property
    def message(self) -> str:
        """Say why it ended and what was kept, in one line."""
        kept = f"the weights of step {self.best_step}" if self.best_step else "those of the start"
        return f"{self.stage}: {self.why}; kept {kept}"

    @property
    def why(self) -> str:
        """Say why it ended."""
        match self.ended:
            case "done" | "no longer better" if not self.best_step:
                return f"no better than before in {self.steps} steps: try a lower rate"
            case "done":
                return f"{self.steps} steps done"
            case "no longer better":
                return f"no longer better after {self.steps} of {self.planned} steps"
            case "diverged":
                return f"diverged, even at a rate of {self.rate:.2g}: give a lower one"
            case "not finite":
                return (
                    "too many losses in a row were not finite: look for NaN or infinity in the data"
                )
            case "interrupted":
                return f"interrupted after {self.steps} of {self.planned} steps"
