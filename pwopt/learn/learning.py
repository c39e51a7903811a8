"""A student learns to do what its teacher does: the stages, put together.

The student is a rewritten network, the teacher the original. Both are given the same samples, new
ones made of those there are (`pwopt.learn.augment`); no labels are needed. The whole network learns
to give the teacher's outputs. If asked to, every block learns by itself before that, on what its
teacher's counterpart reads. Either stage keeps the weights whose outputs did best on samples held
out; so their loss is never larger than at the start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from pwopt.calibration import held_out
from pwopt.calibration.augment import mixed
from pwopt.comparing import Array, check_labels, one_class
from pwopt.data import Samples
from pwopt.errors import DataError, LearnError
from pwopt.graph import is_op
from pwopt.learn.augment import augment
from pwopt.learn.batches import Batches, TrainingBatch, batches_of, tensors
from pwopt.learn.checkpoint import Checkpoint, fingerprint
from pwopt.learn.distributed import Processes, choose_device, together
from pwopt.learn.network import Network
from pwopt.learn.objective import Distillation, reconstruction
from pwopt.learn.stage import Options, Status
from pwopt.learn.training import train
from pwopt.learn.wishes import HeldOut, Learned, Say, Watch, Wishes
from pwopt.model import Model

Feeds = Mapping[str, Tensor]

ACTIVATIONS = ("Clip", "LeakyRelu", "PRelu", "Relu")

HINT = 5.0
"""What the error at the end of each block counts, beside that of the outputs."""

NOTHING = 1e-4
"""Held-out losses below this teach nothing: as of a teacher that is sure of all that it is given,
because somebody forgot to divide images by 255."""

BLOCKS = 0.2
"""The share of the time, or of the steps, in which blocks learn by themselves, if they do."""


def learn(
    student: Model,
    teacher: Model,
    samples: Samples,
    wishes: Wishes,
    *,
    watch: Watch = lambda stage, status: None,
    say: Say = lambda line: None,
) -> Learned:
    """Train the weights of `student`, which itself stays as it is, to do what `teacher` does.

    Args:
        student: The network that learns.
        teacher: The one it learns from; of the same inputs and outputs.
        samples: What to learn from; labels are only used if `label_weight` is not 0.
        wishes: How to learn.
        watch: Called after each step, in the first process only.
        say: Called with lines to be read, in the first process only.

    Raises:
        LearnError: an operator that cannot be learned; inputs or outputs that differ; a checkpoint
            of another run; nothing finite to learn from.
        DataError: too few samples, or some that do not fit.
    """
    device = choose_device(wishes.device)
    with together(device) as processes:
        lesson = _Lesson(student, teacher, samples, wishes, device, processes)
        return lesson.hold(watch, say if processes.first else lambda line: None)


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
        self.source = samples.name
        self.student, self.teacher = Network(student).to(device), Network(teacher).to(device)
        self.borders = borders(student, teacher)
        left_out = held_out(samples, wishes.seed)
        as_they_are = list(batches_of(samples, left_out, wishes.batch))
        _check_fed(student, as_they_are[0].feeds, samples.name)
        self.held_out = [*as_they_are, *mixed(as_they_are, turn=0)]
        self.held_out_count = sum(batch.samples for batch in as_they_are)
        at_once = min(wishes.batch, samples.count or wishes.batch)
        self.batches = Batches(
            samples,
            max(at_once // processes.count, 1),
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
            weights=_output_weights(wishes, self.taught[0]),
            label_weight=wishes.label_weight,
        )
        if wishes.label_weight and all(batch.labels is None for batch in as_they_are):
            raise LearnError(f"{samples.name}: has no labels that could count")
        self.key = fingerprint(
            self.student.weights,
            self.teacher.weights,
            student.skeleton().SerializeToString(deterministic=True),
            teacher.skeleton().SerializeToString(deterministic=True),
            *(array.tobytes() for batch in as_they_are for array in batch.feeds.values()),
            repr((self.batches.count, processes.count, wishes.blocks, wishes.rate, wishes.batch)),
            repr((wishes.temperature, wishes.label_weight, wishes.seed)),
            repr(sorted(wishes.output_weights.items())),
            repr((wishes.minutes, wishes.steps)),
        )

    def hold(self, watch: Watch, say: Say) -> Learned:
        """Go through the stages."""
        checkpoint = None
        if self.wishes.checkpoint is not None:
            begin = Checkpoint.resume if self.wishes.resume else Checkpoint
            checkpoint = begin(self.wishes.checkpoint, self.key)
        weights = dict(self.student.weights)
        before = self.judged()
        if before.loss < NOTHING:
            say(
                f"student and teacher do the same on {self.source} already (loss "
                f"{before.loss:.1g}): there is little to learn, or the samples are not what the "
                "models expect; see --preprocess"
            )
        elif caution := self.caution():
            say(caution)
        latest = before

        def judge() -> float:
            nonlocal latest
            latest = self.judged()
            return latest.loss  # of the whole network: blocks by themselves may undo it

        reports, failure = [], None
        for stage, loss, options in self.stages():

            def watch_stage(status: Status, stage: str = stage) -> None:
                watch(stage, replace(status, agreement=latest.agreement))

            try:
                report = train(
                    weights,
                    loss,
                    self.batches.from_step,
                    judge,
                    options,
                    stage=stage,
                    checkpoint=checkpoint,
                    processes=self.processes,
                    watch=watch_stage,
                    say=say,
                )
            except DataError as error:  # as of one sample among many; the best weights are in place
                failure = error
                break
            reports.append(report)
            say(report.message)
            if report.ended == "interrupted":
                break
        after = self.judged()
        if failure and (self.processes.count > 1 or not after.loss < before.loss):
            raise failure
        return Learned(
            model=self.student.trained(),
            stages=tuple(reports),
            before=before,
            after=after,
            samples=self.batches.count,
            held_out=self.held_out_count,
            device=str(self.device),
            failure=failure,
        )

    def stages(self) -> Iterator[tuple[str, Callable[[TrainingBatch], Tensor], Options]]:
        """Yield the name of each stage, its loss, and how long it takes."""
        share = BLOCKS if self.wishes.blocks and self.borders else 0.0
        if share:
            yield "blocks", self.block_loss, self.options(share)
        yield "outputs", self.output_loss, self.options(1 - share)

    def options(self, share: float) -> Options:
        """Return how to spend this share of the time."""
        minutes, steps = self.wishes.minutes, self.wishes.steps
        return Options(
            minutes=None if minutes is None or steps is not None else share * minutes,
            steps=None if steps is None else max(round(share * steps), 1),
            rate=self.wishes.rate,
        )

    def caution(self) -> str | None:
        """Say that the teacher cannot tell the samples apart, where that is so."""
        scores = self.objective.scores
        if scores is None:
            return None
        classes = torch.cat([_classes(outputs[scores]) for outputs in self.taught])
        found = one_class(classes.cpu().numpy())
        return None if found is None else f"Caution: {self.source}: {found}"

    # -- losses -------------------------------------------------------------------------------

    def feeds(self, batch: TrainingBatch) -> Feeds:
        """Move a batch to the device."""
        return {name: feed.to(self.device) for name, feed in batch.feeds.items()}

    def labels(self, batch: TrainingBatch) -> Tensor | None:
        """Move a batch's labels to the device, if there are any and they count."""
        scores = self.objective.scores
        if batch.labels is None or scores is None or not self.wishes.label_weight:
            return None
        classes = self.taught[0][scores].shape[1]
        check_labels(batch.labels.numpy(), classes, self.source)
        return batch.labels.to(self.device)

    def block_loss(self, batch: TrainingBatch) -> Tensor:
        """Let every block work on what the teacher's reads, and compare what comes out."""
        feeds = self.feeds(batch)
        with torch.no_grad():
            outputs = self.teacher(feeds, also=self.borders)
        wanted = {name: outputs[name] for name in self.borders}
        return reconstruction(self.student(feeds, also=self.borders, given=wanted), wanted)

    def output_loss(self, batch: TrainingBatch) -> Tensor:
        """Compare what student and teacher make of a batch, in the end and where blocks end."""
        feeds = self.feeds(batch)
        with torch.no_grad():
            outputs = self.teacher(feeds, also=self.borders)
        hints = {name: outputs[name] for name in self.borders}
        wanted = {name: outputs[name] for name in self.teacher.outputs}
        given = self.student(feeds, also=self.borders)
        loss = self.objective(given, wanted, self.labels(batch))
        return loss + HINT * reconstruction(given, hints)

    @torch.no_grad()
    def judged(self) -> HeldOut:
        """Tell how the student does on held-out samples; labels count as they do in learning."""
        losses, same, count = [], 0, 0
        scores = self.objective.scores
        for batch, wanted in zip(self.held_out, self.taught, strict=True):
            fed = tensors(batch)
            outputs = self.student(self.feeds(fed))
            losses.append(float(self.objective(outputs, wanted, self.labels(fed))))
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
        mine = {tensor.name: tensor for tensor in ours}
        known = {tensor.name: tensor for tensor in theirs}
        names, wanted = (", ".join(sorted(tensors)) for tensors in (mine, known))
        if mine.keys() != known.keys():
            raise LearnError(
                f"{student.name}: its {what} are {names}, those of {teacher.name} {wanted}; "
                "learning needs the same"
            )
        for name, tensor in mine.items():
            if not _may_be_equal(tensor.shape, known[name].shape):
                raise LearnError(
                    f"{student.name}: '{name}' has shape {list(tensor.shape)}, in {teacher.name} "
                    f"{list(known[name].shape)}; learning needs the same"
                )


def _check_fed(student: Model, feeds: Mapping[str, Array], source: str) -> None:
    """Check that samples, which were made to fit the teacher, fit the student too.

    Raises:
        LearnError: the student fixes an axis, as its batch, at another size.
    """
    for tensor in student.graph.inputs:
        shape = feeds[tensor.name].shape
        if not _may_be_equal(tensor.shape, shape):
            raise LearnError(
                f"{student.name}: '{tensor.name}' is {list(tensor.shape)}, but {source} is fed as "
                f"{list(shape)}: learning needs a student with the open axes of its teacher"
            )


def _may_be_equal(one: Sequence[object] | None, other: Sequence[object] | None) -> bool:
    """Tell whether two shapes may be the same; what is not a number is open."""
    if one is None or other is None:
        return True
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if isinstance(a, int)]
    return len(one) == len(other) and all(a == b or not isinstance(b, int) for a, b in pairs)


def _output_weights(wishes: Wishes, outputs: Mapping[str, Tensor]) -> Mapping[str, float]:
    """Return how much outputs count.

    Raises:
        LearnError: a name that no output has, or no output counts.
    """
    weights = wishes.output_weights
    if unknown := weights.keys() - outputs.keys():
        raise LearnError(
            f"there is no output {', '.join(sorted(unknown))} that could be weighted, but "
            f"{', '.join(sorted(outputs))}"
        )
    learned = [name for name, value in outputs.items() if value.is_floating_point()]
    if learned and not any(weights.get(name, 1.0) for name in learned):
        raise LearnError("all outputs have weight 0: there is nothing to learn")
    return weights
