"""A student learns to do what its teacher does: the stages, put together.

The student is a rewritten network, the teacher the original. Both are given the same samples, new
ones made of those there are (`pwopt.learn.augment`); no labels are needed. First every block learns
by itself, on what its teacher's counterpart reads; then the whole network learns to give the
teacher's outputs. Each stage keeps the weights that did best on samples held out; so the result
is never worse there than the start.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from pwopt.calibration.augment import mixed
from pwopt.data import Samples
from pwopt.errors import LearnError
from pwopt.graph import is_op
from pwopt.learn.augment import augment
from pwopt.learn.batches import Batches, TrainingBatch, batches_of, held_out, tensors
from pwopt.learn.checkpoint import Checkpoint, fingerprint
from pwopt.learn.distributed import Processes, choose_device, together
from pwopt.learn.network import Network
from pwopt.learn.objective import TEMPERATURE, Distillation, reconstruction
from pwopt.learn.stage import Options, Report, Status
from pwopt.learn.training import train
from pwopt.model import Model

Device = Literal["auto", "cpu", "cuda"]
Feeds = Mapping[str, Tensor]

ACTIVATIONS = ("Clip", "LeakyRelu", "PRelu", "Relu")

BLOCKS = 0.2
"""The share of the time, or of the steps, in which blocks learn by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How to learn.

    Attributes:
        minutes: How long, roughly, in all; None where `steps` are given.
        steps: How many steps, exactly.
        blocks: Let every block learn by itself first.
        rate: The highest learning rate; None to find it by a range test.
        batch: Samples in a step, unless the model fixes it; together, of several processes.
        temperature: What class scores are divided by before they are compared.
        label_weight: What the cross entropy with labels counts beside the teacher.
        device: Where to compute.
        seed: Of the samples' order and augmentation.
        checkpoint: Where the state is saved every few minutes, to be resumed after a kill.
        resume: Go on from that file, if it is there.
    """

    minutes: float | None = 10.0
    steps: int | None = None
    blocks: bool = True
    rate: float | None = None
    batch: int = 64
    temperature: float = TEMPERATURE
    label_weight: float = 0.0
    device: Device = "auto"
    seed: int = 0
    checkpoint: Path | None = None
    resume: bool = False


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
    """

    model: Model
    stages: tuple[Report, ...]
    before: HeldOut
    after: HeldOut
    samples: int | None
    held_out: int
    device: str


def learn(
    student: Model,
    teacher: Model,
    samples: Samples,
    wishes: Wishes,
    *,
    watch: Callable[[str, Status], None] = lambda stage, status: None,
    say: Callable[[str], None] = lambda line: None,
) -> Learned:
    """Train the weights of `student`, which itself stays as it is, to do what `teacher` does.

    Args:
        student: The network that learns.
        teacher: The one it learns from; of the same inputs and outputs.
        samples: What to learn from; labels are only used if `label_weight` is not 0.
        wishes: How to learn.
        watch: Called after each step, with the stage's name.
        say: Called with lines to be read.

    Raises:
        LearnError: an operator that cannot be learned; inputs or outputs that differ; a checkpoint
            of another run; nothing finite to learn from.
        DataError: too few samples, or some that do not fit.
    """
    device = choose_device(wishes.device)
    with together(device) as processes:
        lesson = _Lesson(student, teacher, samples, wishes, device, processes)
        return lesson.hold(watch, say)


class _Lesson:
    """Student and teacher, what they are given, and how it is told how well the student does."""

    def __init__(
        self,
        student: Model,
        teacher: Model,
        samples: Samples,
        wishes: Wishes,
        device: torch.device,
        processes: Processes,
    ) -> None:
        _check_alike(student, teacher)
        self.wishes, self.device, self.processes = wishes, device, processes
        self.student, self.teacher = Network(student).to(device), Network(teacher).to(device)
        self.borders = borders(student, teacher)
        left_out = held_out(samples, wishes.seed)
        as_they_are = list(batches_of(samples, left_out, wishes.batch))
        self.held_out = [*as_they_are, *mixed(as_they_are, turn=0)]
        self.held_out_count = sum(batch.samples for batch in as_they_are)
        self.batches = Batches(
            samples,
            max(wishes.batch // processes.count, 1),
            seed=wishes.seed,
            leave_out=left_out,
            process=processes.rank,
            processes=processes.count,
            augment=augment,
        )
        with torch.no_grad():
            self.taught = [self.teacher(self.feeds(tensors(batch))) for batch in self.held_out]
        first = self.held_out[0]
        self.objective = Distillation.of(
            self.taught[0],
            len(next(iter(first.feeds.values()))),
            temperature=wishes.temperature,
            label_weight=wishes.label_weight,
        )
        self.key = fingerprint(
            self.student.weights,
            self.teacher.weights,
            student.skeleton().SerializeToString(deterministic=True),
            teacher.skeleton().SerializeToString(deterministic=True),
            *(array.tobytes() for batch in as_they_are for array in batch.feeds.values()),
            repr((self.batches.count, processes.count, wishes.blocks, wishes.rate, wishes.batch)),
            repr((wishes.temperature, wishes.label_weight, wishes.seed)),
            repr((wishes.minutes, wishes.steps)),
        )

    def hold(self, watch: Callable[[str, Status], None], say: Callable[[str], None]) -> Learned:
        """Go through the stages."""
        checkpoint = None
        if self.wishes.checkpoint is not None:
            begin = Checkpoint.resume if self.wishes.resume else Checkpoint
            checkpoint = begin(self.wishes.checkpoint, self.key)
        before = self.judged()
        reports = []
        for stage, loss, judge, options in self.stages():
            report = train(
                dict(self.student.weights),
                loss,
                self.batches.from_step,
                judge,
                options,
                stage=stage,
                checkpoint=checkpoint,
                processes=self.processes,
                watch=partial(watch, stage),
                say=say,
            )
            reports.append(report)
            say(report.message)
            if report.ended == "interrupted":
                break
        return Learned(
            model=self.student.trained(),
            stages=tuple(reports),
            before=before,
            after=self.judged(),
            samples=self.batches.count,
            held_out=self.held_out_count,
            device=str(self.device),
        )

    def stages(
        self,
    ) -> Iterator[tuple[str, Callable[[TrainingBatch], Tensor], Callable[[], float], Options]]:
        """Yield the name of each stage, its loss, how it is judged, and how long it takes."""
        share = BLOCKS if self.wishes.blocks and self.borders else 0.0
        if share:
            yield "blocks", self.block_loss, self.block_judge, self.options(share)
        yield "outputs", self.output_loss, lambda: self.judged().loss, self.options(1 - share)

    def options(self, share: float) -> Options:
        """Return how to spend this share of the time."""
        minutes, steps = self.wishes.minutes, self.wishes.steps
        return Options(
            minutes=None if minutes is None or steps is not None else share * minutes,
            steps=None if steps is None else max(round(share * steps), 1),
            rate=self.wishes.rate,
        )

    # -- losses -------------------------------------------------------------------------------

    def feeds(self, batch: TrainingBatch) -> Feeds:
        """Move a batch to the device."""
        return {name: feed.to(self.device) for name, feed in batch.feeds.items()}

    def block_loss(self, batch: TrainingBatch) -> Tensor:
        """Let every block work on what the teacher's reads, and compare what comes out."""
        feeds = self.feeds(batch)
        with torch.no_grad():
            outputs = self.teacher(feeds, also=self.borders)
        wanted = {name: outputs[name] for name in self.borders}
        return reconstruction(self.student(feeds, also=self.borders, given=wanted), wanted)

    def block_judge(self) -> float:
        """Return the mean of `block_loss` over held-out samples."""
        losses = [float(self.block_loss(tensors(batch))) for batch in self.held_out]
        return float(np.average(losses, weights=[batch.samples for batch in self.held_out]))

    def output_loss(self, batch: TrainingBatch) -> Tensor:
        """Compare what student and teacher make of a batch."""
        feeds = self.feeds(batch)
        with torch.no_grad():
            wanted = self.teacher(feeds)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        return self.objective(self.student(feeds), wanted, labels)

    @torch.no_grad()
    def judged(self) -> HeldOut:
        """Tell how the student does on held-out samples; labels do not count."""
        losses, same, count = [], 0, 0
        scores = self.objective.scores
        for batch, wanted in zip(self.held_out, self.taught, strict=True):
            outputs = self.student(self.feeds(tensors(batch)))
            losses.append(float(self.objective(outputs, wanted)))
            if scores is not None:
                chosen, right = (_classes(o[scores])[: batch.samples] for o in (outputs, wanted))
                same += int((chosen == right).sum())
                count += len(right)
        loss = float(np.average(losses, weights=[batch.samples for batch in self.held_out]))
        return HeldOut(loss, same / count if count else None)


def borders(student: Model, teacher: Model) -> list[str]:
    """Find the tensors where blocks end: both networks have them, the student in another way.

    A block begins where the student leaves the teacher's tensors, and ends where it is back at one,
    or at what an activation makes of it.
    """
    known = {tensor.name for node in teacher.graph.nodes for tensor in node.outputs}
    known |= {tensor.name for tensor in teacher.graph.inputs}
    ends = []
    for node in student.graph.nodes:
        read = [t.name for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        back = [tensor for tensor in node.outputs if tensor.name in known]
        if back and not known.issuperset(read):
            ends += [_activated(tensor) for tensor in back]
    return [tensor.name for tensor in ends if tensor.name in known]


def _activated(tensor: gs.Tensor) -> gs.Tensor:
    """Return what an activation makes of a tensor, if nobody else reads that."""
    if len(tensor.outputs) == 1 and is_op(tensor.outputs[0], *ACTIVATIONS):
        return tensor.outputs[0].outputs[0]
    return tensor


def _classes(scores: Tensor) -> Tensor:
    return scores.flatten(start_dim=1).argmax(dim=1)


def _check_alike(student: Model, teacher: Model) -> None:
    """Check that two networks take and give the same.

    Raises:
        LearnError: they do not.
    """
    for what, ours, theirs in (
        ("inputs", student.graph.inputs, teacher.graph.inputs),
        ("outputs", student.graph.outputs, teacher.graph.outputs),
    ):
        ours, theirs = (sorted(str(t.name) for t in tensors) for tensors in (ours, theirs))
        if ours != theirs:
            raise LearnError(
                f"{student.name}: its {what} are {', '.join(ours)}, those of {teacher.name} "
                f"{', '.join(theirs)}; learning needs the same"
            )
