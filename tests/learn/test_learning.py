"""`pwopt.learn.learning.learn`: the stages put together."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="learning needs torch: pip install 'pwopt[learn]'")

import tiny
import torch
from helpers import parse, run, values

from pwopt.data import Samples, open_data
from pwopt.errors import DataError, LearnError
from pwopt.learn import distributed, learning
from pwopt.learn.learning import HINT, borders, learn
from pwopt.learn.stage import Options, Status
from pwopt.learn.wishes import Learned, Wishes
from pwopt.model import Model


@pytest.fixture
def data(tmp_path: Path) -> Samples:
    path = tmp_path / "data.npz"
    np.savez(path, x=tiny.images())
    return open_data(path, tiny.teacher())


def wishes(**more: Any) -> Wishes:
    return Wishes(**{"steps": 40, "blocks": True, "device": "cpu", "batch": 16, **more})


def weights(learned: Learned) -> dict[str, Any]:
    return values(learned.model.to_proto())


def test_it_learns_and_the_graph_stays_the_same(data: Samples) -> None:
    student, teacher = tiny.student(), tiny.teacher()
    before = student.to_proto()
    said: list[str] = []
    seen: list[tuple[str, Status]] = []
    learned = learn(
        student, teacher, data, wishes(), watch=lambda *where: seen.append(where), say=said.append
    )
    assert student.to_proto() == before
    assert [report.stage for report in learned.stages] == ["blocks", "outputs"]
    assert [report.steps for report in learned.stages] == [8, 32]
    assert learned.after.loss < 0.8 * learned.before.loss
    assert (learned.samples, learned.held_out, learned.device) == (120, 40, "cpu")
    assert learned.failure is None
    assert not learned.interrupted
    assert len(seen) == 40
    assert all(0 <= (status.agreement or 0) <= 1 for _, status in seen)
    assert "outputs: 32 steps done" in said[-1]

    proto = learned.model.to_proto()
    assert proto.graph.node == before.graph.node
    old, new = values(before), weights(learned)
    assert {name: array.shape for name, array in new.items()} == {
        name: array.shape for name, array in old.items()
    }
    assert any((new[name] != old[name]).any() for name in old)
    assert not any("do the same" in line for line in said)
    # What is told is what onnxruntime finds.
    x = {"x": tiny.images()}
    (right,), (start,), (end,) = (run(m, x) for m in (teacher, before, proto))
    assert ((end - right) ** 2).mean() < ((start - right) ** 2).mean()


def test_steps_are_the_same_each_time(data: Samples) -> None:
    one, other = (learn(tiny.student(), tiny.teacher(), data, wishes()) for _ in range(2))
    assert one.after == other.after
    assert all(
        (a == b).all() for a, b in zip(weights(one).values(), weights(other).values(), strict=True)
    )
    third = learn(tiny.student(), tiny.teacher(), data, wishes(seed=1))
    assert third.after != one.after


def test_minutes(data: Samples) -> None:
    learned = learn(tiny.student(), tiny.teacher(), data, wishes(steps=None, minutes=0.02))
    assert learned.after.loss < learned.before.loss
    assert all(report.steps > 0 for report in learned.stages)


def test_without_blocks(data: Samples) -> None:
    learned = learn(tiny.student(), tiny.teacher(), data, wishes(blocks=False))
    assert [(report.stage, report.steps) for report in learned.stages] == [("outputs", 40)]


def test_blocks_end_where_both_networks_meet_again() -> None:
    assert borders(tiny.student(), tiny.teacher()) == ["rb"]
    assert borders(tiny.teacher(), tiny.teacher()) == []


def test_a_student_that_is_its_teacher_stays_as_it_is(data: Samples) -> None:
    teacher = tiny.teacher()
    said: list[str] = []
    learned = learn(teacher, teacher, data, wishes(rate=0.01), say=said.append)
    assert "do the same on" in said[0]
    assert learned.after.loss <= learned.before.loss == pytest.approx(0, abs=1e-6)
    assert learned.after.agreement == 1


def lesson_of(data: Samples, **more: Any) -> Any:
    return learning._Lesson(
        tiny.student(),
        tiny.teacher(),
        data,
        wishes(**more),
        torch.device("cpu"),
        distributed.ALONE,
    )


def test_a_batch_is_no_larger_than_the_data(data: Samples) -> None:
    assert lesson_of(data, batch=10**6).batches.size == data.count


def test_errors_count_where_blocks_end(data: Samples) -> None:
    lesson = lesson_of(data)
    batch = next(lesson.batches.from_step(0))
    right, given = (
        network(batch.feeds, also=["rb"]) for network in (lesson.teacher, lesson.student)
    )
    outputs = lesson.objective(given, {"y": right["y"]})
    inner = (given["rb"] - right["rb"]).square().mean() / right["rb"].var()
    assert inner > 0.1
    assert lesson.output_loss(batch).item() == pytest.approx(
        (outputs + HINT * inner).item(), rel=0.02
    )


def test_blocks_are_judged_by_what_they_do_to_the_outputs(
    data: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that learn the contrary end with the start."""
    right = learning._Lesson.block_loss
    monkeypatch.setattr(learning._Lesson, "block_loss", lambda *lesson: -right(*lesson))
    learned = learn(tiny.student(), tiny.teacher(), data, wishes(rate=0.3))
    assert learned.stages[0].best_step == 0
    assert learned.stages[0].best == learned.stages[1].start == learned.before.loss


def test_labels_count_if_that_is_wanted(tmp_path: Path) -> None:
    _, _, path = tiny.write(tmp_path)
    without, with_labels = (
        learn(
            tiny.student(),
            tiny.teacher(),
            open_data(path, tiny.teacher()),
            wishes(label_weight=weight, blocks=False, rate=0.01),
        )
        for weight in (0, 1)
    )
    assert without.stages[0].history != with_labels.stages[0].history
    assert with_labels.after.loss < with_labels.before.loss
    assert with_labels.before.loss > without.before.loss  # by a cross entropy


@pytest.mark.parametrize("wrong", [4, -1, -100])
def test_labels_that_are_none_of_the_classes(tmp_path: Path, wrong: int) -> None:
    _, _, path = tiny.write(tmp_path)
    x = np.load(path)["x"]
    np.savez(path, x=x, labels=np.full(len(x), wrong))
    source = open_data(path, tiny.teacher())
    said = rf"npz: labels {wrong}\.\.{wrong}, but the model's classes are 0\.\.3"
    with pytest.raises(DataError, match=said):
        learn(tiny.student(), tiny.teacher(), source, wishes(label_weight=1))
    learn(tiny.student(), tiny.teacher(), source, wishes())  # they do not count


def test_labels_that_are_not_there_cannot_count(tmp_path: Path) -> None:
    _, _, path = tiny.write(tmp_path)
    np.savez(tmp_path / "unlabelled.npz", x=np.load(path)["x"])
    source = open_data(tmp_path / "unlabelled.npz", tiny.teacher())
    with pytest.raises(LearnError, match=r"unlabelled.npz: has no labels that could count"):
        learn(tiny.student(), tiny.teacher(), source, wishes(label_weight=1))


def test_several_outputs_are_weighted(data: Samples) -> None:
    texts = (
        text.replace("float[N,4] y)", "float[N,4] y, float[N,8,1,1] g)")
        for text in (tiny.TEACHER, tiny.STUDENT)
    )
    teacher, student = tiny.teacher(next(texts)), tiny.student(next(texts))

    def start(**output_weights: float) -> float:
        wanted = wishes(steps=1, output_weights=output_weights)
        return learn(student, teacher, data, wanted).before.loss

    scores, features = start(g=0), start(y=0)
    assert start() == pytest.approx((scores + features) / 2)
    assert start(y=3) == pytest.approx((3 * scores + features) / 4)
    with pytest.raises(LearnError, match="no output z that could be weighted, but g, y"):
        start(z=1)
    with pytest.raises(LearnError, match="all outputs have weight 0"):
        start(y=0, g=0)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"x)": "z)", "(x,": "(z,"}, "its inputs are x, those of net z; learning needs the same"),
        ({"] y)": "] s)", "y = Gemm": "s = Gemm"}, "its outputs are y, those of net s; learning"),
        ({"3,8,8] x": "3,9,9] x"}, r"'x' has shape \['N', 3, 8, 8\], in net \['N', 3, 9, 9\]"),
        (
            {"N,4] y": "N,5] y", "4,8] w3": "5,8] w3", "4] b3": "5] b3"},
            r"'y' has shape \['N', 4\], in net \['N', 5\]; learning needs the same",
        ),
    ],
)
def test_models_that_do_not_match(data: Samples, edits: dict[str, str], message: str) -> None:
    text = tiny.TEACHER
    for old, new in edits.items():
        text = text.replace(old, new)
    with pytest.raises(LearnError, match=message) as caught:
        learn(tiny.student(), parse(text), data, wishes())
    assert "\n" not in str(caught.value)


def test_a_student_that_fixes_what_its_teacher_leaves_open(data: Samples) -> None:
    student = tiny.student(tiny.STUDENT.replace("N", "1"))
    with pytest.raises(LearnError, match=r"'x' is \[1, 3, 8, 8\], but .*data.npz is fed as \[16, "):
        learn(student, tiny.teacher(), data, wishes())


def test_shapes_that_only_running_tells(data: Samples) -> None:
    teacher = parse(
        tiny.TEACHER.replace("float[4,8] w3, float[4] b3", "float[5,8] w3, float[5] b3").replace(
            "float[N,4] y", "float[N,5] y"
        )
    )
    proto = tiny.student().to_proto()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(LearnError, match=r"output y: the student's shape is \[16, 4\], the teach"):
        learn(Model(proto), teacher, data, wishes())


def test_a_missing_operator_is_named_before_samples_are_read(data: Samples) -> None:
    def never() -> Iterator[Any]:
        raise AssertionError("read")

    unread = Samples("never", data.inputs, never)
    student = tiny.student(tiny.STUDENT.replace("rb = Relu(b)", "rb = Hardmax(b)"))
    with pytest.raises(LearnError, match="learning does not know Hardmax"):
        learn(student, tiny.teacher(), unread, wishes())


def spoilt(count: int, bad: int) -> Samples:
    """Give a stream whose sample number `bad` is NaN."""

    def draw() -> Iterator[Any]:
        for number, image in enumerate(tiny.images(count)):
            yield {"x": image[None] * (np.nan if number == bad else 1)}, None

    return open_data(lambda: (feeds for feeds, _ in draw()), tiny.teacher())


def test_nan_in_the_data_before_anything_is_learned() -> None:
    with pytest.raises(DataError, match="holds NaN or infinity"):
        learn(tiny.student(), tiny.teacher(), spoilt(160, 3), wishes(rate=0.01))


def test_nan_late_in_the_data_keeps_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwopt.learn.batches.WAITING", 1)
    monkeypatch.setattr("pwopt.calibration.samples.MOST_HELD_OUT", 8)
    learned = learn(
        tiny.student(), tiny.teacher(), spoilt(800, 790), wishes(rate=0.01, blocks=False, steps=400)
    )
    assert isinstance(learned.failure, DataError)
    assert "holds NaN or infinity" in str(learned.failure)
    assert learned.stages == ()
    assert learned.after.loss < learned.before.loss


def test_a_wrong_label_late_in_the_data_keeps_what_was_learned() -> None:
    def draw() -> Iterator[Any]:
        for number, image in enumerate(tiny.images(800)):
            yield {"x": image[None]}, np.array([99 if number == 790 else number % 4])

    source = open_data(draw, tiny.teacher())
    wanted = wishes(rate=0.01, blocks=False, steps=400, label_weight=0.1)
    learned = learn(tiny.student(), tiny.teacher(), source, wanted)
    assert str(learned.failure) == "draw: labels 0..99, but the model's classes are 0..3"
    assert learned.after.loss < learned.before.loss


def test_a_teacher_that_takes_all_for_one_class(tmp_path: Path) -> None:
    path = tmp_path / "bright.npz"
    np.savez(path, x=np.abs(tiny.images()) + 1000 * np.ones((160, 1, 1, 1), np.float32))
    said: list[str] = []
    source = open_data(path, tiny.teacher())
    learn(tiny.student(), tiny.teacher(), source, wishes(rate=1e-6), say=said.append)
    assert "bright.npz: the original takes all samples for class" in said[0]
    assert "look at --preprocess" in said[0]


def test_a_rate_that_is_far_too_high(data: Samples) -> None:
    said: list[str] = []
    learned = learn(
        tiny.student(), tiny.teacher(), data, wishes(rate=1e4, steps=400), say=said.append
    )
    assert learned.after.loss <= learned.before.loss
    assert {report.ended for report in learned.stages} <= {"diverged", "not finite"}
    assert any("diverged, even at a rate of" in line for line in said)


def test_a_full_disk_does_not_end_learning(
    data: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    said: list[str] = []
    path = tmp_path / "run.pt"
    learned = learn(tiny.student(), tiny.teacher(), data, wishes(checkpoint=path), say=said.append)
    assert learned.after.loss < learned.before.loss
    unsaved = [line for line in said if "learning goes on without a checkpoint" in line]
    assert unsaved
    assert all("No space left on device" in line and "run.pt" in line for line in unsaved)
    assert not path.exists()


def test_a_checkpoint_of_another_run(data: Samples, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    learn(tiny.student(), tiny.teacher(), data, wishes(checkpoint=path))
    for other in ({"steps": 41}, {"seed": 1}, {"output_weights": {"y": 2.0}}):
        again = wishes(**{"checkpoint": path, "resume": True, **other})
        with pytest.raises(LearnError, match=r"run\.pt: is of another run"):
            learn(tiny.student(), tiny.teacher(), data, again)


def test_an_interrupted_run_keeps_the_best(data: Samples) -> None:
    def watch(stage: str, status: Status) -> None:
        if stage == "outputs" and status.step == 30:
            raise KeyboardInterrupt

    learned = learn(tiny.student(), tiny.teacher(), data, wishes(steps=100), watch=watch)
    assert learned.interrupted
    assert [report.ended for report in learned.stages] == ["done", "interrupted"]
    assert learned.after.loss < learned.before.loss


def test_going_on_after_a_break_ends_in_the_same_weights(
    data: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(self: learning._Lesson, share: float) -> Options:
        return Options(steps=round(share * 40), checkpoint_seconds=0)

    def watch(stage: str, status: Status) -> None:
        if (stage, status.step) == stop:
            raise MemoryError

    monkeypatch.setattr(learning._Lesson, "options", options)
    whole = learn(tiny.student(), tiny.teacher(), data, wishes())
    for stop in (("blocks", 5), ("outputs", 17)):
        path = tmp_path / f"{stop[0]}.pt"
        with pytest.raises(MemoryError):
            learn(tiny.student(), tiny.teacher(), data, wishes(checkpoint=path), watch=watch)
        said: list[str] = []
        resumed = learn(
            tiny.student(),
            tiny.teacher(),
            data,
            wishes(checkpoint=path, resume=True),
            say=said.append,
        )
        assert any("going on from step" in line for line in said)
        assert weights(resumed).keys() == weights(whole).keys()
        for name, array in weights(whole).items():
            np.testing.assert_array_equal(weights(resumed)[name], array)
