"""What is measured of a model against the original, on samples whose right answers are known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import Array, parse
from made_up import layers_of

from pwopt import analysis, comparing, runtime
from pwopt.data import Batch
from pwopt.errors import DataError, ModelError
from pwopt.model import Model
from pwopt.search import latency, yardstick
from pwopt.search.front import Point
from pwopt.search.latency import Option
from pwopt.search.yardstick import Yardstick


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardstick, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "SECONDS", 0.0)


SCORES = "net (float[N,3] x) => (float[N,3] y) <float[1,3] bias> { y = Add(x, bias) }"


def scoring(*bias: float, text: str = SCORES) -> Model:
    """Make a model that takes scores and adds something to those of each class."""
    return parse(text, {"bias": np.array([bias])})


ORIGINAL = scoring(0, 0, 0)


def batch(rows: Any, labels: Sequence[int] | None = None, samples: int | None = None) -> Batch:
    x = np.array(rows, np.float32)
    known = None if labels is None else np.array(labels)
    return Batch({"x": x}, known, len(x) if samples is None else samples)


def judged(groups: Sequence[Sequence[Batch]], model: Model, original: Model = ORIGINAL) -> Point:
    feeds = {"x": groups[0][0].feeds["x"]}
    return Yardstick(original, groups, feeds).point(model, None, {})


def sure(*classes: int, height: float = 30.0) -> Array:
    """Make scores of which one stands out."""
    return (height * np.eye(3)[list(classes)]).astype(np.float32)


# A model that adds 40 to class 2 always says 2.
TWO = scoring(0, 0, 40)


def test_the_original_itself_loses_nothing() -> None:
    found = judged([[batch(sure(0, 1, 2), [0, 1, 1])]], scoring(0, 0, 0))
    assert (found.drop_points, found.agreement) == (0, 1)
    assert (found.error, found.other_error) == (0, 0)
    assert found.speedup_ci95[0] <= found.speedup_ci95[1]
    assert (found.macs, found.params) == (0, analysis.size(ORIGINAL).params)
    assert found.predicted_ms is None


def test_what_is_lost_less_what_is_gained_counts() -> None:
    # Right before: the first three. Right afterwards: the last two, one of them anew.
    group = [batch(sure(0, 1, 2), [0, 1, 2]), batch(sure(0, 1), [2, 0])]
    assert judged([group], TWO).drop_points == pytest.approx(100 * (2 - 1) / 5)
    assert judged([group], scoring(40, 0, 0)).drop_points == pytest.approx(100 * (2 - 1) / 5)
    gains = [batch(sure(0, 1, 1), [2, 2, 1])]
    assert judged([gains], TWO).drop_points == pytest.approx(-100 / 3)


def test_samples_as_they_are_count_half_and_their_copies_the_other() -> None:
    labels = [0, 0, 2, 2]
    lost = [batch(sure(0, 0, 2, 2), labels)]  # half of them
    kept = [batch(sure(1, 1, 2, 2), labels)]  # wrong before, too
    assert judged([lost], TWO).drop_points == pytest.approx(50)
    assert judged([kept, lost], TWO).drop_points == pytest.approx(25)
    assert judged([lost, kept, kept, kept], TWO).drop_points == pytest.approx(25)
    assert judged([kept, lost, lost, lost], TWO).drop_points == pytest.approx(25)
    assert judged([kept, kept, kept, lost], TWO).drop_points == pytest.approx(50 / 3 / 2)
    assert judged([lost, lost, kept, kept], TWO).drop_points == pytest.approx((50 + 50 / 3) / 2)
    same = [batch(sure(2, 2, 2, 2), labels)]
    for groups, drop in (([lost, lost, same, same], 1 / 4 + 1 / 12), ([lost, same, same], 1 / 4)):
        assert judged(groups, TWO).agreement == pytest.approx(1 - drop)


def test_without_labels_a_changed_class_counts_in_full() -> None:
    rows = np.log([[0.7, 0.2, 0.1], [0.45, 0.15, 0.4], [0.1, 0.1, 0.8]])
    found = judged([[batch(rows)]], TWO)
    assert found.drop_points is None
    assert found.measure == "agreement"
    assert found.agreement == pytest.approx(1 / 3)
    assert found.loss == pytest.approx(200 / 3)


def test_copies_agree_where_they_keep_to_the_class_of_the_sample_as_it_is() -> None:
    as_is, other = [batch(sure(0, 0, 2, 2))], [batch(sure(1, 1, 1, 2))]
    # Of the copies the original itself keeps one of four: that one stays, the third is gained.
    found = judged([as_is, other], TWO)
    assert found.agreement == pytest.approx(1 - (0.5 - 0.25) / 2)
    # Neither model says of the first two copies what the original says of the samples.
    assert judged([as_is, [batch(sure(1, 1, 2, 2))]], TWO).agreement == pytest.approx(0.75)
    assert judged([as_is, as_is], TWO).agreement == pytest.approx(0.5)
    assert judged([as_is, other], ORIGINAL).agreement == 1


def test_the_original_foretells_what_is_lost_on_copies_by_its_own_probabilities() -> None:
    as_is = [batch(sure(0, 1, 2))]
    # It takes the first two for another class: by 0.7 - 0.1 and by 0.45 - 0.4.
    copies = [batch(np.log([[0.7, 0.2, 0.1], [0.45, 0.15, 0.4], [0.1, 0.1, 0.8]]))]
    foretold = 100 * (0.6 + 0.05 + 0) / 3
    assert judged([as_is, copies], TWO).foretold_points == pytest.approx(foretold, rel=1e-5)
    both = judged([as_is, copies, as_is], TWO)  # sure of two, of which nothing remains
    assert both.foretold_points == pytest.approx((foretold + 200 / 3) / 2, rel=1e-5)
    assert judged([as_is, copies], ORIGINAL).foretold_points == 0
    assert judged([as_is], TWO).foretold_points is None


def test_outputs_that_are_probabilities_are_taken_as_such() -> None:
    text = SCORES.replace("y = Add", "s = Add").replace("}", " y = Softmax<axis = 1>(s) }")
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    bias = np.log([2.0, 1, 1])
    other, original = scoring(*bias, text=text), scoring(0, 0, 0, text=text)
    found = judged([[batch(np.log(p))]], other, original)
    q = p * [2, 1, 1] / (p * [2, 1, 1]).sum(axis=1, keepdims=True)
    assert found.error == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-4)
    assert found.agreement == 1


def test_outputs_without_axes_are_judged_by_their_error() -> None:
    text = "net (float[N,3] x) => (float y) <float[1,3] bias> {{ s = {0}(x, bias)  {1} }}"
    mean = "y = ReduceMean<keepdims = 0>(s)"
    one, two = (parse(text.format("Mul", mean), {"bias": np.full((1, 3), k)}) for k in (1, 2))
    found = judged([[batch([[1, 2, 3]]), batch([[4, 5, 6]])]], two, one)
    assert found.measure == "error"
    assert found.error == pytest.approx((2**2 + 5**2) / ((2**2 + 5**2) - (2 + 5) ** 2 / 2))


def test_error_is_the_divergence_over_samples_and_copies() -> None:
    rng = np.random.default_rng(0)
    groups = [[batch(rng.standard_normal((4, 3)))] for _ in range(3)]
    bias = np.array([0.5, 0, -0.5])
    expected = []
    for (one,) in groups:
        p = comparing.log_probabilities(one.feeds["x"])
        q = comparing.log_probabilities(one.feeds["x"] + bias)
        expected += [*(np.exp(p) * (p - q)).sum(axis=1)]
    found = judged(groups, scoring(*bias))
    assert found.error == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_interval_holds_the_estimate_and_narrows_with_samples() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (50, 800):
        classes = rng.integers(3, size=count)
        labels = np.where(rng.random(count) < 0.9, classes, (classes + 1) % 3)
        group = [batch(sure(*classes), list(labels))]
        found = judged([group], scoring(0, 0, 29.99 + 0.02))  # a third and more is lost
        assert found.drop_points is not None
        assert found.drop_ci95 is not None
        assert found.agreement is not None
        assert found.agreement_ci95 is not None
        low, high = found.drop_ci95
        assert low < found.drop_points < high
        assert found.agreement_ci95[0] < found.agreement < found.agreement_ci95[1]
        assert found.worst_loss == high
        hits = (classes == labels).astype(float) - (labels == 2)
        error = 100 * hits.std() / count**0.5
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_copies_are_no_new_evidence() -> None:
    """The interval is as wide with ten copies that say the same as without any."""
    rng = np.random.default_rng(1)
    classes = rng.integers(3, size=60)
    group = [batch(sure(*classes), list(classes))]
    once = judged([group], TWO)
    often = judged([group] * 11, TWO)
    assert often.drop_points == pytest.approx(once.drop_points)
    assert often.drop_ci95 == pytest.approx(once.drop_ci95)
    assert often.agreement_ci95 == pytest.approx(once.agreement_ci95)
    feeds = {"x": sure(0)}
    yardsticks = [Yardstick(ORIGINAL, [group] * n, feeds) for n in (1, 11)]
    assert [y.samples for y in yardsticks] == [60, 60]


def test_the_interval_knows_that_few_samples_say_little() -> None:
    """As of two samples more, of which one half is lost and one half is gained."""
    for count in (3, 30, 300):
        classes = [0, 1, 2] * (count // 3)
        same = judged([[batch(sure(*classes), classes)]], ORIGINAL)
        width = 1.96 / (count + 2)
        assert same.drop_ci95 == pytest.approx((-100 * width, 100 * width))
        assert same.agreement_ci95 == (pytest.approx(1 - width), 1)
    lost = judged([[batch(sure(0, 1, 0, 2), [0, 1, 0, 2])]], TWO)
    mean, squares = 3 / 6, 4 / 6  # three of four, and the two halves
    width = 1.96 * ((squares - mean**2) / 6) ** 0.5
    assert lost.drop_ci95 == pytest.approx((100 * (mean - width), 100))
    assert lost.agreement_ci95 == (0, 1)  # no share is beyond


def test_the_bootstrap_of_the_speed_goes_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.random.default_rng(0).uniform(1, 2, (20, 2))
    monkeypatch.setattr(
        runtime, "interleave", lambda sessions, *_, **__: runtime.Timing(times[:, : len(sessions)])
    )
    found = [
        Yardstick(ORIGINAL, [[batch(sure(0, 1))]], {"x": sure(0)}, seed=seed).speed(TWO).ci95
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


SAME = [0] * 8


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        (SAME, None, "takes all samples for class 0"),
        (SAME, [0, 1] * 4, "takes all samples for class 0"),
        ([0, 1] * 4, [0, 1, 0, 2, 2, 2, 2, 2], "gets only 38% right"),
        ([0, 1] * 4, [0, 1, 0, 1, 0, 2, 2, 2], "one of 8 samples is 12.5 points"),
        ([0, 1] * 4, None, "one of 8 samples is 12.5 points"),
        ([0, 1] * 50, None, None),
    ],
)
def test_caution(classes: list[int], labels: list[int] | None, said: str | None) -> None:
    found = Yardstick(ORIGINAL, [[batch(sure(*classes), labels)]], {"x": sure(0)}).caution
    assert found is None if said is None else said in str(found)
    few = [batch(sure(*classes[:7]), labels and labels[:7])]
    said = "one of 7 samples is 14.3 points"
    assert said in str(Yardstick(ORIGINAL, [few], {"x": sure(0)}).caution)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1] * 3 + [0, 3], r"the samples: labels 0\.\.3, but .* classes are 0\.\.2"),
        ([0, -1] * 4, r"labels -1\.\.0"),
    ],
)
def test_labels_of_other_classes(labels: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Yardstick(ORIGINAL, [[batch(sure(*[0, 1] * 4), labels)]], {"x": sure(0)})


def test_samples_of_which_some_are_right_tell_something() -> None:
    right = [batch(sure(*[0, 1] * 4), [0, 1, 0, 1, 0, 1, 2, 2])]  # three quarters
    assert Yardstick(ORIGINAL, [right], {"x": sure(0)}).samples == 8


def test_rows_that_only_fill_up_a_batch_do_not_count() -> None:
    text = SCORES.replace("[N,3]", "[4,3]")
    original, other = (scoring(*bias, text=text) for bias in ((0, 0, 0), (0, 0, 40)))
    full = batch(sure(2, 2, 2, 0), [2, 2, 2, 0])
    part = batch(sure(0, 2, 0, 0), [0, 2], samples=2)
    groups = [[full, part]]
    found = judged(groups, other, original)
    assert found.drop_points == pytest.approx(100 * 2 / 6)
    assert found.agreement == pytest.approx(1 - 2 / 6, abs=1e-6)
    assert Yardstick(original, groups, full.feeds).samples == 6
    only_twos = [[full, batch(sure(2, 2, 0, 0), [2, 2], samples=2)]]
    assert judged(only_twos, other, original).drop_points == pytest.approx(100 / 6)


def test_one_batch_without_labels_is_without_labels() -> None:
    group = [batch(sure(0, 1), [0, 1]), batch(sure(2, 0))]
    found = judged([group], TWO)
    assert (found.drop_points, found.drop_ci95) == (None, None)
    assert found.measure == "agreement"


MAPS = """
    net (float[N,3,2,2] x) => (float[N,3,2,2] y)
    <float[1,3,1,1] scale> { y = Mul(x, scale) }
"""


def test_outputs_that_are_no_classes_are_judged_by_their_error() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((16, 3, 2, 2))
    one = {"scale": np.ones((1, 3, 1, 1))}
    original, half = parse(MAPS, one), parse(MAPS, {"scale": 0.5 * one["scale"]})
    group = [batch(rows[:10], list(range(10))), batch(rows[10:], list(range(6)))]
    found = judged([group], half, original)
    assert found.measure == "error"
    assert (found.drop_points, found.agreement, found.agreement_ci95) == (None, None, None)
    centred = rows - rows.mean(axis=(0, 2, 3), keepdims=True)
    assert found.error == pytest.approx(0.25 * (rows**2).sum() / (centred**2).sum(), rel=1e-4)
    assert found.other_error == found.error
    assert found.loss == found.worst_loss == 100 * found.error
    assert judged([group], original, original).error == 0


def test_several_outputs() -> None:
    text = """
        net (float[N,3] x) => (float[N,3,1,2] maps, float[N,3] y)
        <float[1,3] bias, float[1,3,1,1] scale, int64[2] axes = {2, 3}, int64[4] twice = {1,1,1,2}>
        {
            y = Add(x, bias)
            high = Unsqueeze(x, axes)
            wide = Expand(high, twice)
            maps = Mul(wide, scale)
        }
    """

    def model(bias: float, scale: float) -> Model:
        weights = {"bias": np.array([[0, 0, bias]]), "scale": np.full((1, 3, 1, 1), scale)}
        return parse(text, weights)

    group = [batch(np.random.default_rng(0).standard_normal((32, 3)))]
    both, maps, scores = (
        judged([group], model(*change), model(0, 1)) for change in ((2, 0.7), (0, 0.7), (2, 1))
    )
    assert maps.measure == scores.measure == "agreement"
    assert maps.agreement == 1
    assert scores.agreement is not None
    assert scores.agreement < 1
    assert both.agreement == scores.agreement
    assert both.error == pytest.approx(maps.error + scores.error)
    assert both.other_error == pytest.approx(maps.error)
    assert (maps.other_error, scores.other_error) == (maps.error, 0)
    assert maps.loss == 100 * maps.error
    assert min(maps.error, scores.error) > 0.01


def test_samples_of_several_sizes_keep_their_labels_apart() -> None:
    """Images of different sizes come in batches of their own."""
    model = parse("net (float[N,3,H,W] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }")
    other = parse(
        """net (float[N,3,H,W] x) => (float[N,3,1,1] y) <float[1,3,1,1] b>
        { g = GlobalAveragePool(x)  y = Add(g, b) }""",
        {"b": np.array([0, 0, 40.0]).reshape(1, 3, 1, 1)},
    )
    maps = [
        np.broadcast_to(sure(*classes)[..., None, None], (len(classes), 3, size, size))
        for classes, size in (((0, 2), 4), ((2, 2, 2), 8))
    ]
    group = [batch(maps[0], [0, 2]), batch(maps[1], [2, 2, 2])]
    assert judged([group], other, model).drop_points == pytest.approx(20)


def test_speed_and_prediction() -> None:
    group = [batch(sure(0, 1, 2))]
    feeds = {"x": sure(0)}
    found = Yardstick(ORIGINAL, [group], feeds).point(TWO, 0.5, {"c": "both 16"})
    assert found.ranks == {"c": "both 16"}
    low, high = found.speedup_ci95
    assert 0 < low <= found.speedup <= high
    assert found.measured_ms > 0
    assert found.predicted_ms == pytest.approx(0.5 * found.speedup * found.measured_ms)


def test_milliseconds_are_those_of_the_original_once_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the machine is slower later on."""
    measured = [(10.0,), (40.0, 20.0), (100.0, 25.0), (30.0, 33.0)]

    def interleave(sessions: Sequence[Any], *_: Any, **__: Any) -> runtime.Timing:
        row = measured.pop(0)
        assert len(sessions) == len(row)
        return runtime.Timing(np.array([row] * 7))

    monkeypatch.setattr(runtime, "interleave", interleave)
    found = Yardstick(ORIGINAL, [[batch(sure(0, 1, 2))]], {"x": sure(0)})
    first, second = (found.point(TWO, predicted, {}) for predicted in (0.6, None))
    assert (first.speedup, first.measured_ms, first.predicted_ms) == (2, 5, 6)
    assert (second.speedup, second.measured_ms, second.predicted_ms) == (4, 2.5, None)
    own = found.original()
    assert (own.speedup, own.speedup_ci95, own.measured_ms) == (1, (1, 1), 10)
    assert (own.ranks, own.predicted_ms, own.loss, own.error) == ({}, None, 0, 0)
    assert not measured


CONV = """
    net (float[N,64,6,6] x) => (float[N,64,6,6] y)
    <float[64,64,3,3] w> { y = Conv<pads = [1,1,1,1]>(x, w) }
"""


def test_macs_and_layers_in_place() -> None:
    model = parse(CONV)
    smaller = parse(CONV.replace("[64,64,3,3]", "[64,64,1,1]").replace("[1,1,1,1]", "[0,0,0,0]"))
    x = np.zeros((1, 64, 6, 6), np.float32)
    found = Yardstick(model, [[Batch({"x": x}, None, 1)]], {"x": x})
    assert found.fewer_macs(smaller) == pytest.approx(9)
    assert found.fewer_macs(model) == 1
    times = found.in_place(model, layers_of(model), {"y": Option("both", 16)})
    assert times.keys() == {"y"}
    assert min(times["y"]) > 0


def test_models_without_macs_are_equal() -> None:
    assert Yardstick(ORIGINAL, [[batch(sure(0))]], {"x": sure(0)}).fewer_macs(TWO) == 1


def test_a_model_that_does_not_run_is_told_by_name() -> None:
    broken = parse("net (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="onnxruntime cannot run it"):
        Yardstick(broken, [[batch(sure(0))]], {"x": sure(0)})
