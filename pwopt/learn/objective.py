"""What a student is asked to do: give the same outputs, or the same inner values, as its teacher.

No labels are needed. Class scores are compared as distributions (Hinton, Vinyals & Dean 2015),
all else by squared error in units of the teacher's variance, so that outputs of any scale count
alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as functional
from torch import Tensor

from pwopt.comparing import Array, are_probabilities, class_scores
from pwopt.errors import LearnError
from pwopt.learn.wishes import TEMPERATURE

_STEADY = 1e-2
"""A channel that hardly varies in a batch is held to a tenth of its own size."""

_FAINT = 1e-4
"""A channel with a smaller share of the average variance than this is held to that share."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Distillation:
    """The loss of a student's outputs against its teacher's.

    Attributes:
        scores: The output that holds class scores [samples, classes, 1, …], if any.
        probabilities: The scores have been through a softmax already.
        temperature: What scores are divided by before their softmax.
        weights: How much each output counts, 1 where it is not named.
        label_weight: How much the cross entropy with labels counts, where there are labels.
    """

    scores: str | None
    probabilities: bool = False
    temperature: float = TEMPERATURE
    weights: Mapping[str, float] = field(default_factory=dict)
    label_weight: float = 0.0

    @classmethod
    def of(
        cls,
        teacher: Tensors,
        samples: int,
        *,
        temperature: float = TEMPERATURE,
        weights: Mapping[str, float] | None = None,
        label_weight: float = 0.0,
    ) -> Self:
        """Find out what kinds of outputs there are, from a teacher's outputs for some samples.

        Raises:
            LearnError: no output is a floating-point tensor, or labels count and no output holds
                class scores.
        """
        if not any(output.is_floating_point() for output in teacher.values()):
            raise LearnError("the model has no floating-point output to learn from")
        scores = class_scores({name: _array(output) for name, output in teacher.items()}, samples)
        if scores is None and label_weight:
            raise LearnError("labels are of no use: no output is [samples, classes]")
        return cls(
            scores=scores,
            probabilities=scores is not None and are_probabilities(_array(teacher[scores])),
            temperature=temperature,
            weights=weights or {},
            label_weight=label_weight,
        )

    def __call__(self, student: Tensors, teacher: Tensors, labels: Tensor | None = None) -> Tensor:
        """Return the weighted mean over outputs; labels are [samples] or [samples, classes].

        Rows beyond the labels only fill up a batch, and are not compared with any.

        Integer and boolean outputs are left aside: nothing can be learned from them.

        Raises:
            LearnError: outputs differ in name or shape.
        """
        check_outputs(student, teacher)
        names = [name for name, output in teacher.items() if output.is_floating_point()]
        weights = {name: self.weights.get(name, 1.0) for name in names}
        total = sum(
            (weights[name] * self._loss(name, student[name], teacher[name]) for name in names),
            start=torch.zeros(()),
        )
        loss = total / sum(weights.values())
        if labels is None or self.scores is None or not self.label_weight:
            return loss
        logits = to_logits(student[self.scores], self.probabilities)
        real = logits[: len(labels)]  # the rows after them only fill up the batch
        return loss + self.label_weight * functional.cross_entropy(real, labels)

    def _loss(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        if name != self.scores:
            return relative_error(student, teacher)
        return divergence(
            to_logits(student, self.probabilities),
            to_logits(teacher, self.probabilities),
            self.temperature,
        )


def reconstruction(student: Tensors, teacher: Tensors) -> Tensor:
    """Return Σ over blocks of the mean squared error ÷ the variance of the teacher's values.

    `teacher` holds the tensors where blocks end; `student` may hold others as well. As in block
    reconstruction (BRECQ, Li et al. 2021), without its Hessian.

    Raises:
        LearnError: a tensor is missing or of another shape.
    """
    check_outputs(student, teacher)
    return sum(
        (_block_error(student[name], output) for name, output in teacher.items()),
        start=torch.zeros(()),
    )


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher ‖ student) of logits [samples, classes], the mean over samples.

    The gradient of the KL falls as 1/T², hence the factor (Hinton et al. 2015, section 2).
    """
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of (s − t)² ÷ the teacher's variance in that channel (axis 1), this batch.

    Where a channel hardly varies, its own size or the other channels' variance stands in for it,
    and 1 where the teacher gives nothing but zeros. With several processes the variance is that
    of each one's own batch.
    """
    student, teacher = student.float(), teacher.float()
    axes = [axis for axis in range(teacher.ndim) if axis != 1]
    if teacher.numel() == 0:
        return student.sum()
    variance = teacher.var(dim=axes, keepdim=True, correction=0) if axes else teacher.new_zeros(1)
    square = teacher.square().mean(dim=axes, keepdim=True) if axes else teacher.square()
    scale = variance + _STEADY * square
    scale = scale.clamp(min=_FAINT * scale.mean())
    scale = torch.where(scale > 0, scale, 1)
    return ((student - teacher).square() / scale).mean()


def to_logits(scores: Tensor, probabilities: bool) -> Tensor:
    """Return logits [samples, classes] of scores [samples, classes, 1, …].

    The logarithms of probabilities are logits: a softmax gives the probabilities back.
    """
    flat = scores.float().flatten(start_dim=1)
    return flat.clamp(min=torch.finfo(flat.dtype).tiny).log() if probabilities else flat


def check_outputs(student: Tensors, teacher: Tensors) -> None:
    """Check that a student has all that its teacher has, of the same shapes.

    Raises:
        LearnError: it has not.
    """
    for name, output in teacher.items():
        if name not in student:
            raise LearnError(f"output {name} of the teacher is not there in the student")
        if student[name].shape != output.shape:
            raise LearnError(
                f"output {name}: the student's shape is {list(student[name].shape)}, the "
                f"teacher's {list(output.shape)}; they must be the same"
            )


def _block_error(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    variance = teacher.var(correction=0)
    scale = variance + _STEADY * teacher.square().mean()
    return functional.mse_loss(student, teacher) / torch.where(scale > 0, scale, 1)


def _array(tensor: Tensor) -> Array:
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array
