"""What learning is asked for, and what it tells; torch is not needed to say so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Literal

from pwopt.errors import LearnError, PwoptError, SpecError
from pwopt.learn.stage import Report, Status
from pwopt.model import Model

Device = Literal["auto", "cpu", "cuda"]

Watch = Callable[[str, Status], None]
"""Called after each step, with the stage's name and where it stands."""

Say = Callable[[str], None]
"""Called with lines to be read."""

TEMPERATURE = 2.0
"""Such as is customary for a saturated teacher; see docs/measured.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How to learn.

    Attributes:
        minutes: How long, roughly, in all; of no account where `steps` are given.
        steps: How many steps, exactly.
        blocks: Let every block learn by itself first: for bad starts, as by SVD. A calibrated one
            has been fitted to what blocks really get, and loses that.
        rate: The highest learning rate; None to find it by a range test.
        batch: Samples in a step, unless the model fixes it; together, of several processes.
        temperature: What class scores are divided by before they are compared.
        output_weights: How much each output counts, 1 where it is not named.
        label_weight: What the cross entropy with labels counts beside the teacher.
        device: Where to compute.
        seed: Of the samples' order and augmentation.
        checkpoint: Where the state is saved every few minutes, to be resumed after a kill.
        resume: Go on from that file, if it is there.

    Raises:
        SpecError: a number that is negative, infinite or NaN, or 0 where that makes no sense.
    """

    minutes: float | None = 10.0
    steps: int | None = None
    blocks: bool = False
    rate: float | None = None
    batch: int = 64
    temperature: float = TEMPERATURE
    output_weights: Mapping[str, float] = field(default_factory=dict)
    label_weight: float = 0.0
    device: Device = "auto"
    seed: int = 0
    checkpoint: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        above_0 = {
            "minutes": self.minutes,
            "steps": self.steps,
            "rate": self.rate,
            "batch size": self.batch,
            "temperature": self.temperature,
        }
        from_0 = {"label weight": self.label_weight}
        from_0 |= {f"weight of '{name}'": weight for name, weight in self.output_weights.items()}
        for what, value in above_0.items():
            if value is not None and not 0 < value < inf:  # nor NaN
                raise SpecError(f"{what}: {value} makes no sense; give a number above 0")
        for what, weight in from_0.items():
            if not 0 <= weight < inf:
                raise SpecError(f"{what}: {weight} makes no sense; give a number from 0")

    def __str__(self) -> str:
        """Write what the metadata of a model is to say of them."""
        length = f"steps={self.steps}" if self.steps is not None else f"minutes={self.minutes:g}"
        return f"learned{{{length}}}"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How a student does on samples that it does not learn from, and on mixtures of them.

    Attributes:
        loss: Of the outputs, see `pwopt.learn.objective.Distillation`.
        agreement: The share of samples whose class is the teacher's; None without class scores.
    """

    loss: float
    agreement: float | None


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of learning.

    Attributes:
        model: The student with its new weights; everything else is as it was.
        stages: What each stage did.
        before: How the student did on held-out samples.
        after: How it does now.
        samples: How many were learned from; None of a stream.
        held_out: How many were held out.
        device: Where it was computed.
        failure: What ended learning early; what was learned until then counts.
    """

    model: Model
    stages: tuple[Report, ...]
    before: HeldOut
    after: HeldOut
    samples: int | None
    held_out: int
    device: str
    failure: PwoptError | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the user ended it early."""
        return any(report.ended == "interrupted" for report in self.stages)


def check_installed() -> None:
    """Check that torch is there, without importing it.

    Raises:
        LearnError: it is not.
    """
    if find_spec("torch") is None:
        raise LearnError("learning needs torch: pip install 'pwopt[learn]'")
