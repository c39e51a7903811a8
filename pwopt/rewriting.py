"""Passes, what they report, and the pipeline that runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import ClassVar, Literal, Protocol

from pwopt.calibration import LIMIT
from pwopt.data import Samples
from pwopt.editing import Edit
from pwopt.errors import PwoptError
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.shapes import InputShapes


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, or was declined, at one place.

    `where` is the first output of the node in question, since node names may be empty or
    repeated.
    """

    kind: Literal["rewrote", "skipped"]
    where: str
    reason: str
    data: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PassReport:
    """All events of one pass."""

    name: str
    events: tuple[Event, ...]

    @property
    def rewrote(self) -> int:
        """How many sites were rewritten."""
        return sum(event.kind == "rewrote" for event in self.events)

    @property
    def skipped(self) -> int:
        """How many sites were left alone."""
        return len(self.events) - self.rewrote


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an edit stays: why, and what was counted or measured."""

    accepted: bool
    reason: str
    data: Mapping[str, int | float | str] = field(default_factory=dict)


class Judge(Protocol):
    """Decides whether an edit, just made in `model`, is right and pays."""

    def __call__(self, model: Model, edit: Edit, *, free: bool) -> Judgement:
        """Judge; the edit is in place before and after. A `free` one need not pay."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may ask for beyond the model itself.

    `shapes` fixes input axes that the model leaves open.
    `judge` decides on edits that are legal; without one they all stay.
    `samples` is data to calibrate on, `most_samples` how many of them; `seed` is that of whatever
    is random about it.
    `progress` is told how far it is.
    """

    shapes: InputShapes | None = None
    judge: Judge | None = None
    samples: Samples | None = None
    most_samples: int = LIMIT
    seed: int = 0
    progress: Progress | None = None

    def settle(
        self,
        model: Model,
        edit: Edit,
        where: str,
        reason: str,
        data: Mapping[str, int | float | str] | None = None,
        *,
        free: bool = False,
    ) -> Event:
        """Keep `edit` or take it back, as the judge says, and report it as an event.

        Say `free` where it can cost nothing, as of a node that vanishes into the weights of
        another: then it need only be right.
        """
        verdict = self.judge(model, edit, free=free) if self.judge else Judgement(True, "")
        data = {**(data or {}), **verdict.data}
        if not verdict.accepted:
            edit.undo()
            return Event("skipped", where, verdict.reason, data)
        edit.settle()
        return Event("rewrote", where, reason, data)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite. Its fields are its options, its docstring is its help.

    A pass edits `model.graph` and yields one Event per site, declined ones too. Where it does not
    apply it says so in an event; an exception means a fault. It neither logs, times nor checks:
    observers do. Running it twice changes nothing the second time.
    """

    name: ClassVar[str]
    """Kebab-case, as in pipelines and on the command line."""

    exact: ClassVar[bool]
    """False: changes the numbers on purpose."""

    @abstractmethod
    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Rewrite `model` in place, reporting site by site."""

    def __str__(self) -> str:
        """Write the pass as a pipeline does: its name, and the options that are not default."""
        options = [
            f"{option.name}={value_text(getattr(self, option.name))}"
            for option in fields(self)
            if getattr(self, option.name) != option.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


class Observer:
    """Watches a pipeline; override what you need."""

    def before(self, step: Pass, model: Model) -> None:
        """Do something before each pass."""

    def after(self, step: Pass, model: Model, report: PassReport) -> None:
        """Do something after each pass."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str()` gives the text that `pwopt.spec` parses."""

    passes: tuple[Pass, ...]

    def run(
        self, model: Model, context: Context | None = None, observers: Sequence[Observer] = ()
    ) -> tuple[PassReport, ...]:
        """Run the passes on `model`, in place, and note them in its metadata.

        The note goes behind that of earlier runs, so that it is the pipeline of all that was done.

        Raises:
            PwoptError: a pass failed; the message names it and those before it, and `model` is
                in no state to be used.
        """
        reports: list[PassReport] = []
        for step in self.passes:
            for observer in observers:
                observer.before(step, model)
            report = PassReport(step.name, _apply(step, model, context or Context(), reports))
            reports.append(report)
            for observer in observers:
                observer.after(step, model, report)
        if any(report.rewrote for report in reports):
            note(model, str(self))
        return tuple(reports)

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)


def note(model: Model, pipeline: str) -> None:
    """Note in a model's metadata what was done, behind what was done before."""
    earlier = model.metadata().get("pwopt.pipeline")
    model.annotate("pwopt.version", version("pwopt"))
    model.annotate("pwopt.pipeline", f"{earlier},{pipeline}" if earlier else pipeline)


def value_text(value: object) -> str:
    """Write an option's value as pipelines do."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _apply(
    step: Pass, model: Model, context: Context, earlier: Sequence[PassReport]
) -> tuple[Event, ...]:
    try:
        return tuple(step.apply(model, context))
    except PwoptError:
        raise
    except Exception as error:
        after = f" after {', '.join(r.name for r in earlier)}" if earlier else ""
        raise PwoptError(
            f"{model.name}: pass '{step.name}' failed{after}: {type(error).__name__}: {error}; "
            "this is a fault of the pass, please report it"
        ) from error
