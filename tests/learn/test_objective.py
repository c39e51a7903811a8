import math

import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import torch

from pwopt.errors import LearnError
from pwopt.learn.objective import (
    Distillation,
    divergence,
    reconstruction,
    relative_error,
    to_logits,
)
from pwopt.learn.wishes import TEMPERATURE


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_that_of_the_softened_distributions_times_the_square_of_temperature():
    student, teacher = normal(5, 7), normal(5, 7, seed=1)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    expected = 9 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(divergence(student, teacher, 3.0), expected)


def test_at_a_high_temperature_the_divergence_is_the_squared_error_of_centred_logits():
    student, teacher = normal(4, 6).double(), normal(4, 6, seed=1).double()
    error = student - teacher
    error = error - error.mean(dim=1, keepdim=True)
    expected = error.square().sum() / (2 * 6 * 4)
    torch.testing.assert_close(divergence(student, teacher, 1e3), expected, rtol=1e-2, atol=0)


def test_logits_and_their_softmax_have_the_same_loss_and_gradient():
    raw, teacher = normal(5, 7).requires_grad_(), 4 * normal(5, 7, seed=1)
    losses, gradients = [], []
    for transform in (lambda x: x, lambda x: torch.softmax(x, 1)):
        distil = Distillation.of({"y": transform(teacher)}, samples=5)
        losses.append(distil({"y": transform(raw)}, {"y": transform(teacher)}))
        gradients.append(torch.autograd.grad(losses[-1], raw)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_probability_of_zero_gives_finite_loss_and_gradient():
    probabilities = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    loss = divergence(to_logits(probabilities, True), normal(1, 3), 4.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(probabilities.grad).all()


def test_scores_with_trailing_axes_are_class_scores():
    distil = Distillation.of({"boxes": normal(3, 4, 5), "y": normal(3, 10, 1, 1)}, samples=3)
    assert (distil.scores, distil.probabilities) == ("y", False)


def test_the_relative_error_does_not_depend_on_the_scale_of_a_channel():
    student, teacher = normal(6, 3, 4), normal(6, 3, 4, seed=1) + 0.5
    # Within 1e-4 of the variance of others a channel keeps its own.
    scale = torch.tensor([1.0, 8.0, 0.25]).view(1, 3, 1)
    torch.testing.assert_close(
        relative_error(scale * student, scale * teacher), relative_error(student, teacher)
    )


def test_the_relative_error_of_the_mean_is_about_one():
    teacher = normal(200, 3, 4)
    student = teacher.mean(dim=(0, 2), keepdim=True).expand_as(teacher)
    assert relative_error(student, teacher).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (2, 3, 4, 4)])
def test_a_constant_teacher_gives_a_finite_error_that_is_zero_only_if_met(value, shape):
    teacher = torch.full(shape, value)
    assert relative_error(teacher, teacher) == 0
    error = relative_error(teacher + 0.5, teacher)
    assert torch.isfinite(error)
    assert error > 0


def test_outputs_count_alike_unless_weighted():
    student = {"y": normal(4, 10), "z": 100 * normal(4, 3, 8)}
    teacher = {"y": normal(4, 10, seed=1), "z": 100 * normal(4, 3, 8, seed=2)}
    y = divergence(student["y"], teacher["y"], TEMPERATURE)
    z = relative_error(student["z"], teacher["z"])
    torch.testing.assert_close(Distillation.of(teacher, 4)(student, teacher), (y + z) / 2)
    weighted = Distillation.of(teacher, 4, weights={"z": 3.0})
    torch.testing.assert_close(weighted(student, teacher), (y + 3 * z) / 4)


def test_integer_outputs_are_left_aside():
    outputs = {"class": torch.tensor([1, 2]), "y": normal(2, 5)}
    distil = Distillation.of(outputs, 2)
    assert distil(outputs, outputs).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(LearnError, match="no floating-point output"):
        Distillation.of({"class": torch.tensor([1, 2])}, 2)


def test_labels_add_the_cross_entropy_times_their_weight():
    student, labels = {"y": normal(4, 10)}, torch.tensor([1, 2, 3, 4])
    distil = Distillation.of(student, 4, label_weight=0.5)
    expected = -torch.log_softmax(student["y"], 1)[range(4), labels].mean() / 2
    torch.testing.assert_close(distil(student, student, labels), expected, rtol=1e-4, atol=1e-6)
    assert distil(student, student).item() == pytest.approx(0, abs=1e-6)
    filled_up = {"y": torch.cat([student["y"], normal(3, 10)])}
    torch.testing.assert_close(distil(filled_up, filled_up, labels), expected, rtol=1e-4, atol=1e-6)


def test_mixed_labels_are_distributions_over_classes():
    student = {"y": torch.softmax(normal(2, 3), 1)}
    distil = Distillation.of(student, 2, label_weight=1.0)
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    expected = -(mixed * student["y"].log()).sum() / 2
    torch.testing.assert_close(distil(student, student, mixed), expected, rtol=1e-4, atol=1e-6)


def test_labels_need_class_scores():
    with pytest.raises(LearnError, match="labels are of no use"):
        Distillation.of({"boxes": normal(2, 4, 3)}, 2, label_weight=1.0)


def test_outputs_of_other_shapes_or_names_are_refused():
    distil = Distillation.of({"y": normal(2, 5)}, 2)
    with pytest.raises(LearnError, match=r"output y: the student's shape is \[2, 1\].*\[2, 5\]"):
        distil({"y": normal(2, 1)}, {"y": normal(2, 5)})
    with pytest.raises(LearnError, match="output y of the teacher is not there"):
        distil({"x": normal(2, 5)}, {"y": normal(2, 5)})


def test_reconstruction_sums_errors_relative_to_each_blocks_variance():
    teacher = {"a": normal(50, 4, 6, 6), "b": 1000 * normal(50, 8, seed=1)}
    student = {"a": torch.zeros(50, 4, 6, 6), "b": torch.zeros(50, 8), "other": normal(1)}
    assert reconstruction(student, teacher).item() == pytest.approx(2 / 1.01, rel=0.01)
    assert reconstruction({**teacher}, teacher) == 0


def test_the_loss_of_a_single_sample_is_finite():
    student, teacher = {"y": normal(1, 5, 2)}, {"y": normal(1, 5, 2, seed=1)}
    assert math.isfinite(Distillation.of(teacher, 1)(student, teacher))
