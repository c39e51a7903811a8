"""Tuning whole: statistics, harms, plans, fits and judgement on a small network."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers import Array, parse, run
from made_up import images, layers_of, macs_as_ms, network, time_by_macs

from pwopt import tuning
from pwopt.analysis import size
from pwopt.data import Samples
from pwopt.errors import BoundError, DataError, ModelError
from pwopt.model import Model
from pwopt.rewriting import Event
from pwopt.search import latency
from pwopt.search.front import Point
from pwopt.search.latency import Option
from pwopt.search.search import Bounds
from pwopt.search.yardstick import Yardstick
from pwopt.shapes import inputs
from pwopt.tuning import Tuned, tune


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    time_by_macs(monkeypatch)


X, CLASSES = images(64, seed=3)
FRESH, FRESH_CLASSES = images(512, seed=4)

MODEL = network()
"""b and c are of rank 12, nearly: rank 16 loses next to nothing."""

HALF = network(ranks=(12, 64))
"""c is of full rank."""


def samples(model: Model, x: Array = X, labels: Array | None = CLASSES) -> Samples:
    def draw() -> Iterator[tuple[dict[str, Array], Array | None]]:
        yield {"x": x}, None if labels is None else labels

    return Samples("made up", inputs(model), draw, len(x))


def tuned(model: Model = MODEL, bounds: Bounds | None = None, **options: Any) -> Tuned:
    return tune(model, model.copy(), samples(model), bounds or Bounds(max_drop=1.0), **options)


@cache
def usual(*, by_macs: bool = False) -> Tuned:
    """Tune as most tests want it, once."""
    return tuned(by_macs=by_macs)


@cache
def half(drop: float) -> Tuned:
    """Tune the network that one layer of resists."""
    return tuned(HALF, Bounds(max_drop=drop))


def told(result: Tuned) -> dict[str, Event]:
    return {event.where: event for event in result.events}


def hits(model: Model) -> float:
    """Return the percentage that a model gets right of samples that nobody has seen."""
    return 100 * float((run(model, {"x": FRESH})[0].argmax(axis=1) == FRESH_CLASSES).mean())


def test_the_network_has_learnt_something() -> None:
    assert min(hits(MODEL), hits(HALF)) > 85


@pytest.mark.parametrize("by_macs", [False, True])
def test_layers_of_low_rank_are_split(by_macs: bool) -> None:
    before = MODEL.to_proto()
    result = usual(by_macs=by_macs)
    assert MODEL.to_proto() == before
    onnx.checker.check_model(result.model.to_proto(), full_check=True)
    assert hits(MODEL) - hits(result.model) < 2
    macs = size(result.model).macs
    assert macs
    assert (size(MODEL).macs or 0) / macs > 2

    events = told(result)
    assert [*events] == ["a", "b", "c", "y"]
    assert {where for where, event in events.items() if event.kind == "rewrote"} >= {"b", "c"}
    for where in ("b", "c"):
        data = events[where].data
        assert events[where].reason == f"split on {data['sides']} at rank {data['rank']}"
        assert data["unit"] == ("MACs" if by_macs else "ms")
        assert data["before"] > data["after"] > 0  # type: ignore[operator]
        ratio = data["before"] / data["after"]  # type: ignore[operator]
        assert data["predicted_speedup"] == pytest.approx(ratio, abs=0.01)
        assert 0 < data["harm"] < 0.5  # type: ignore[operator]
    assert events["y"].reason == "too narrow: no split is foretold to save time"


def test_what_is_told_of_the_chosen_is_what_was_built() -> None:
    result = usual()
    front = result.front
    assert front.chosen is not None
    chosen = front.points[front.chosen]
    found = size(result.model)
    assert (chosen.macs, chosen.params) == (found.macs, found.params)
    assert chosen.ranks == {
        where: f"{event.data['sides']} {event.data['rank']}"
        for where, event in told(result).items()
        if event.kind == "rewrote"
    }
    assert chosen.measure == "top-1"
    assert chosen.loss <= 1
    assert front.samples == 16  # a quarter
    assert chosen.predicted_ms == pytest.approx(chosen.measured_ms, rel=1e-3)
    assert (front.original.speedup, front.original.loss, front.original.error) == (1, 0, 0)
    assert front.original.ranks == {}
    assert (front.threads, front.batch) == (1, 1)


def test_layers_of_full_rank_are_left_alone() -> None:
    given = samples(HALF, *images(256, seed=3))  # of fewer, rank 16 loses none that is held out
    events = told(tune(HALF, HALF.copy(), given, Bounds(max_drop=0.0)))
    # a first one of rank 12 goes, the other stays wide or whole
    assert events["b"].kind == "rewrote"
    c = events["c"]
    assert c.kind == "skipped" or c.data["rank"] > 16  # type: ignore[operator]
    if c.kind == "skipped":
        assert c.reason == "its splits cost more accuracy than their time is worth"


def test_more_may_be_lost_faster_it_is() -> None:
    speeds = []
    for drop in (0.0, 5.0, 40.0):
        result = half(drop)
        chosen = result.front.points[result.front.chosen or 0]
        assert chosen.loss <= drop
        speeds.append(chosen.speedup)
    assert speeds == sorted(speeds)
    assert speeds[-1] > speeds[0]


def test_without_labels_it_goes_by_agreement() -> None:
    given = samples(MODEL, labels=None)
    result = tune(MODEL, MODEL.copy(), given, Bounds(max_drop=1.0))
    chosen = result.front.points[result.front.chosen or 0]
    assert chosen.measure == "agreement"
    assert chosen.agreement is not None
    assert chosen.agreement >= 0.99
    assert chosen.speedup > 2
    assert hits(MODEL) - hits(result.model) < 2


@pytest.mark.parametrize("by_macs", [False, True])
def test_a_speed_is_reached_at_least_harm(by_macs: bool) -> None:
    errors = []
    for speedup in (1.5, 3):
        result = tuned(HALF, Bounds(speedup=speedup), by_macs=by_macs)
        chosen = result.front.points[result.front.chosen or 0]
        assert (size(HALF).macs or 0) >= speedup * (size(result.model).macs or 0)
        errors.append(chosen.error)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.7, 0.3])
def test_sizes_hold(what: str, share: float) -> None:
    limit = int(share * getattr(size(MODEL), what))
    result = tuned(MODEL, Bounds(**{f"max_{what}": limit}))
    assert getattr(size(result.model), what) <= limit
    assert hits(MODEL) - hits(result.model) < 10


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("by_macs", [False, True])
def test_macs_are_those_of_one_sample_whatever_the_batch(batch: int, by_macs: bool) -> None:
    limit = int(0.5 * (size(MODEL).macs or 0))
    result = tuned(MODEL, Bounds(max_macs=limit), batch=batch, by_macs=by_macs)
    macs = size(result.model).macs or 0
    assert 0.3 * limit < macs <= limit


NOTHING = r"nothing faster than [2-9]\.\d\d× is worth building"


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (
            Bounds(speedup=100),
            rf"net.onnx: no allocation found that is 100 times as fast; {NOTHING}$",
        ),
        (
            Bounds(max_params=100),
            r"that is at most 100 parameters; nothing so small is worth building$",
        ),
        (Bounds(max_params=100, speedup=2), rf"2 times as fast with .*100 parameters; {NOTHING}$"),
        (
            Bounds(max_macs=10_000, max_drop=1.5),
            r"at most 1\.5 points lost with at most 10,000 MACs; nothing so small is .*building$",
        ),
        (
            Bounds(speedup=4.5, max_drop=0.01),
            r"4\.5 times as fast with at most 0\.01 points lost; [45]\.\d\d× loses \d\S* points$",
        ),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(bounds: Bounds, said: str) -> None:
    model = Model(HALF.to_proto(), path=Path("net.onnx"))
    with pytest.raises(BoundError, match=said) as caught:
        tuned(model, bounds)
    assert "\n" not in str(caught.value)


def test_what_is_lost_is_told_in_the_unit_it_is_judged_by() -> None:
    proto = HALF.to_proto()
    del proto.graph.node[-3:], proto.graph.output[:]
    maps = onnx.helper.make_tensor_value_info("rc", onnx.TensorProto.FLOAT, ["N", 96, 4, 4])
    proto.graph.output.append(maps)
    bounds = Bounds(speedup=4.5, max_drop=0.01)
    with pytest.raises(BoundError, match=r"; [45]\.\d\d× loses \d\S* % error$"):
        tuned(Model(proto), bounds)
    unlabelled = samples(HALF, labels=None)
    with pytest.raises(BoundError, match=r"; [45]\.\d\d× loses \d\S* points$"):
        tune(HALF, HALF.copy(), unlabelled, bounds)


def test_the_fastest_that_was_built_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    judge = Yardstick.point

    def point(self: Yardstick, *given: Any) -> Point:
        judged = replace(judge(self, *given), drop_points=50.0)
        found.append(judged.speedup)
        return judged

    monkeypatch.setattr(Yardstick, "point", point)
    with pytest.raises(BoundError) as caught:
        tuned()
    assert len({*found}) > 2
    assert str(caught.value).endswith(f"; {max(found):.2f}× loses 50 points")


def test_a_network_that_cannot_gain() -> None:
    narrow = parse(
        """
        net (float[N,3,16,16] x) => (float[N,8,1,1] y)
        <float[8,3,3,3] w1, float[8,8,3,3] w2, float[8,1,3,3] w3>
        {
            a = Conv(x, w1)
            b = Conv(a, w2)
            c = Conv<group = 8>(b, w3)
            y = GlobalAveragePool(c)
        }
        """
    )
    given = samples(narrow, labels=None)  # of which it knows nothing
    result = tune(narrow, narrow.copy(), given, Bounds(max_drop=1.0))
    assert result.model.to_proto() == narrow.to_proto()
    assert {event.kind for event in result.events} == {"skipped"}
    reasons = {where: event.reason for where, event in told(result).items()}
    assert reasons["a"] == reasons["b"] == "too narrow: no split is foretold to save time"
    assert "group" in reasons["c"] or "depthwise" in reasons["c"]
    assert [point.ranks for point in result.front.points] == [{}]
    said = r"that is 2 times as fast; nothing faster than 1\.00× is worth building$"
    with pytest.raises(BoundError, match=said):
        tune(narrow, narrow.copy(), given, Bounds(speedup=2))
    assert "only" in str(tuned(narrow).front.caution)
    assert "one of 16 samples is 6.2 points" in str(usual().front.caution)


def test_what_does_not_pay_in_place_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: Model, layers: list[Any], **_: Any) -> latency.Latencies:
        found = macs_as_ms(model, layers)
        slow = dict.fromkeys(found.options["b"], 0.97 * found.layers["b"])
        return replace(found, options={**found.options, "b": slow})

    monkeypatch.setattr(latency, "measure", slow)
    events = told(tuned())
    assert events["b"].kind == "skipped"
    assert events["b"].reason.startswith("no split pays in place: 1.03× at ")
    assert events["c"].kind == "rewrote"


def test_a_layer_that_the_profile_does_not_show_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def blind(model: Model, layers: list[Any], **_: Any) -> latency.Latencies:
        found = macs_as_ms(model, layers)
        seen = {where: ms for where, ms in found.layers.items() if where != "c"}
        return replace(found, layers=seen, options={where: found.options[where] for where in seen})

    monkeypatch.setattr(latency, "measure", blind)
    events = told(tuned())
    assert events["b"].kind == "rewrote"
    assert events["c"].reason == "its kernels could not be told apart in onnxruntime's profile"


def test_layers_put_back_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(
        self: Yardstick, model: Model, layers: Sequence[Any], plan: dict[str, Option]
    ) -> dict[str, tuple[float, float]]:
        return {where: (1, 2 if where == "c" else 0.5) for where in plan}

    monkeypatch.setattr(Yardstick, "in_place", in_place)
    result = tuned()
    events = told(result)
    assert events["c"].reason == "did not get faster in the real model: 0.50×"
    assert events["b"].kind == "rewrote"
    assert "c" in {n.output[0] for n in result.model.to_proto().graph.node if len(n.input) == 3}


def test_a_bottleneck_that_is_there_stays() -> None:
    once = usual().model
    again = tuned(once)
    split = {e.where for e in again.events if e.reason == "has a 1×1 bottleneck already"}
    assert split
    assert not any(event.where in split for event in again.events if event.kind == "rewrote")


def test_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CURVE", 5)
    result = tuned(HALF, curve=True)
    points = result.front.points
    speeds = sorted(point.speedup for point in points)
    assert len(points) >= 4
    assert speeds[0] == 1
    assert speeds[-1] > 3
    assert len({tuple(sorted(point.ranks.items())) for point in points}) == len(points)
    alone = half(1.0)
    assert told(alone) == told(result)
    assert alone.model.to_proto() == result.model.to_proto()
    assert points[: len(alone.front.points)] == alone.front.points
    assert result.front.chosen == alone.front.chosen


def test_the_same_twice() -> None:
    results = [half(5.0), tuned(HALF, Bounds(max_drop=5.0))]
    assert results[0].events == results[1].events
    assert results[0].front == results[1].front
    assert results[0].model.to_proto() == results[1].model.to_proto()


def test_few_samples() -> None:
    given = samples(MODEL, X[:7], CLASSES[:7])
    with pytest.raises(DataError, match="7 samples are too few"):
        tune(MODEL, MODEL.copy(), given, Bounds(max_drop=1.0))
    assert tuned(limit=16).front.samples == 4


def test_progress_is_told() -> None:
    said: list[str] = []
    tuned(progress=lambda what, *_: said.append(what))
    assert {"trying splits", "fitting layers"} <= {*said}


def test_macs_that_are_not_known() -> None:
    model = parse(
        """
        net (float[N,64,K] x, int64[1] n) => (float y) <float[64,64,3] w>
        { t = Tile(x, n)  y = ReduceMean<keepdims = 0>(t) }
        """.replace("Tile(x, n)", "Conv(x, w)").replace(", int64[1] n", "")
    )
    with pytest.raises((ModelError, DataError)):
        tune(model, model.copy(), samples(model), Bounds(max_macs=5))


def test_made_up_times_are_those_of_the_layers() -> None:
    found = macs_as_ms(MODEL, layers_of(MODEL))
    assert found.layers["b"] == pytest.approx(64 * 64 * 9 * 16 / 1e6)
    assert found.paying("b")
    assert not found.paying("y")
