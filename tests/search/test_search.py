"""The search: plans against all there are, bounds that hold, what is built and what is put back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import inf, prod
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import parse, random_feeds, run
from made_up import layers_of, macs_as_ms

from pwopt import analysis
from pwopt.cost import Sides, Split
from pwopt.data import Batch
from pwopt.errors import SpecError
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.runtime import Speedup
from pwopt.search import search as module
from pwopt.search.front import Point
from pwopt.search.latency import Latencies, Option, Plan, nominal_factors
from pwopt.search.search import CLOSE, EARLY, Bounds, Search, Trial, split_model

NET = """
    net (float[N,64,8,8] x) => (float[N,10] y)
    <float[96,64,3,3] w1, float[96] b1, float[128,96,3,3] w2, float[128,128,1,1] w3,
     float[10,128] w4>
    {
        a = Conv<pads = [1,1,1,1]>(x, w1, b1)
        ra = Relu(a)
        b = Conv<pads = [1,1,1,1]>(ra, w2)
        rb = Relu(b)
        c = Conv(rb, w3)
        g = GlobalAveragePool(c)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, w4)
    }
"""

TABLE = Latencies(
    10,
    {"a": 3, "b": 5, "c": 1, "y": 0.1},
    {
        "a": {Option("input", 16): 1, Option("input", 32): 2, Option("both", 16): 2.9},
        "b": {Option("output", 16): 1, Option("output", 32): 2, Option("both", 48): 1.5},
        "c": {Option("output", 16): 0.5, Option("output", 32): 0.95},
        "y": {},
    },
)
HARMS = {
    "a": {Option("input", 16): 0.5, Option("input", 32): 0.02, Option("both", 16): 0.0},
    "b": {Option("output", 16): 0.9, Option("output", 32): 0.1, Option("both", 48): 0.05},
    "c": {Option("output", 16): 0.03, Option("output", 32): 0.0},
}


def point(**fields: Any) -> Point:
    measures = ("drop_points", "drop_ci95", "agreement", "agreement_ci95", "foretold_points")
    unknown = dict.fromkeys(("predicted_ms", "macs", *measures))
    known = {"speedup": 1.0, "speedup_ci95": (1, 1), "measured_ms": 1.0, "params": 1}
    return Point(**{**unknown, **known, "error": 0.0, "other_error": 0.0, "ranks": {}, **fields})


class FakeYardstick:
    """Times go by MACs, by `slowness` slower than foretold; what is lost, by the ranks alone."""

    def __init__(self, original: Model, *, slowness: float = 1, slow: Sequence[str] = ()) -> None:
        self.original = original
        self.slowness = slowness
        self.slow = slow
        self.timed_in_place: list[Plan] = []
        self.structure = "net"

    def fewer_macs(self, model: Model) -> float:
        before, after = (analysis.size(m).macs for m in (self.original, model))
        assert before
        assert after
        return before / after

    def speed(self, model: Model) -> Speedup:
        ratio = self.fewer_macs(model)
        ratio = ratio / self.slowness if ratio > 1 else ratio
        return Speedup(ratio, (ratio, ratio))

    def in_place(
        self, model: Model, layers: Sequence[Linear], plan: Plan
    ) -> dict[str, tuple[float, float]]:
        self.timed_in_place.append(dict(plan))
        return {where: (1.0, 1.25 if where in self.slow else 0.5) for where in plan}

    def point(self, model: Model, predicted: float | None, ranks: Mapping[str, str]) -> Point:
        size = analysis.size(model)
        drop = sum(64 / int(option.split()[1]) for option in ranks.values())
        return point(
            speedup=self.speed(model).ratio,
            predicted_ms=predicted and 10 * predicted,
            macs=size.macs,
            params=size.params,
            drop_points=drop,
            drop_ci95=(drop / 2, 2 * drop),
            ranks=ranks,
        )


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Split]]:
    """Let no split be fitted; note those that would have been."""
    calls: list[dict[str, Split]] = []

    def refit(
        model: Model, layers: Sequence[Linear], splits: dict[str, Split], *_: Any, **__: Any
    ) -> dict[str, Factors]:
        calls.append(splits)
        return {where: nominal_factors(split) for where, split in splits.items()}

    monkeypatch.setattr(module, "refit", refit)
    return calls


MODEL = parse(NET)


class Additive(Search):
    """Takes savings to add up: the made-up table knows nothing of the yardstick's speeds."""

    _worth = 1.0  # type: ignore[assignment]


def search(table: Latencies = TABLE, harms: Any = HARMS) -> Search:
    """Prepare a search with the made-up table."""
    return Additive(MODEL, layers_of(MODEL), table, harms, [], FakeYardstick(MODEL))  # type: ignore[arg-type]


def timed(**options: Any) -> Search:
    """Prepare a search on the yardstick that `options` describe.

    Its table has all options, timed by MACs; harm falls with the rank.
    """
    table = macs_as_ms(MODEL, layers_of(MODEL))
    harms = {w: {o: 0.1 * (16 / o.rank) ** 2 for o in row} for w, row in table.options.items()}
    yardstick = FakeYardstick(MODEL, **options)
    return Search(MODEL, layers_of(MODEL), table, harms, [], yardstick)  # type: ignore[arg-type]


def every_plan(found: Search) -> Iterator[tuple[dict[str, Option], float, float, int, int]]:
    """Go through all plans, with their times, harms, MACs and parameters of the whole model."""
    size = analysis.size(MODEL)
    for ways in product(*(found.ways(layer) for layer in layers_of(MODEL))):
        macs, params = size.macs or 0, size.params
        for layer, way in zip(layers_of(MODEL), ways, strict=True):
            macs, params = macs + way.macs - layer.size.macs, params + way.params - size_of(layer)
        saved = sum(TABLE.layers[way.where] - way.time for way in ways)
        plan = {way.where: way.option for way in ways if way.option}
        yield plan, TABLE.run_ms - saved, sum(way.harm for way in ways), macs, params


def size_of(layer: Linear) -> int:
    return layer.size.params


def model_of(found: Search, trial: Trial | None) -> onnx.ModelProto:
    assert trial is not None
    return found.model(trial).to_proto()


# -- bounds -----------------------------------------------------------------------------------

LABELLED = point(drop_points=0.8, drop_ci95=(0.1, 1.5), agreement=0.5, agreement_ci95=(0.4, 0.6))
AGREEING = point(agreement=0.992, agreement_ci95=(0.985, 0.995), error=7.0)
OFF = point(error=0.008, other_error=0.008)


@pytest.mark.parametrize("judged", [LABELLED, AGREEING, OFF])
def test_a_drop_is_allowed_up_to_the_bound(judged: Point) -> None:
    assert Bounds(max_drop=0.81).allow(judged)
    assert not Bounds(max_drop=0.79).allow(judged)
    assert Bounds().allow(judged)
    assert Bounds(speedup=9, max_macs=1, max_params=1).allow(judged)


@pytest.mark.parametrize("judged", [LABELLED, AGREEING])
def test_the_confident_go_by_the_worse_end_of_the_interval(judged: Point) -> None:
    assert Bounds(max_drop=1.51, confident=True).allow(judged)
    assert not Bounds(max_drop=1.49, confident=True).allow(judged)


@pytest.mark.parametrize("wanted", [-1, -0.01, float("nan"), inf, -inf])
@pytest.mark.parametrize("what", ["speedup", "max_drop"])
def test_bounds_that_mean_nothing(what: str, wanted: float) -> None:
    with pytest.raises(SpecError, match="give a number from 0"):
        Bounds(**{what: wanted})


def test_the_bound_itself_is_allowed_and_a_gain_always() -> None:
    assert Bounds(max_drop=0.8).allow(OFF)
    assert Bounds(max_drop=0).allow(point())
    assert Bounds(max_drop=0).allow(point(drop_points=-0.5, drop_ci95=(-1, 0.2)))


# -- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speedup", [1, 1.1, 1.3, 1.7, 2, 2.5, 3, 3.9, 4, 5])
def test_a_plan_does_least_harm_of_all_that_are_fast_enough(speedup: float) -> None:
    found = search()
    plan = found.plan(speedup, Bounds())
    harms = [h for _, time, h, *_ in every_plan(found) if time <= 10 / speedup + 1e-6]
    if not harms:
        assert plan is None
        return
    assert plan is not None
    own = next(row for row in every_plan(found) if row[0] == plan)
    assert own[1] <= 10 / speedup + 1e-6
    assert own[2] == pytest.approx(min(harms), abs=1e-3)
    assert found.predicted(plan) == pytest.approx(own[1] / 10)


@pytest.mark.parametrize("share", [0.95, 0.7, 0.4, 0.3, 0.1])
@pytest.mark.parametrize("what", ["max_macs", "max_params"])
def test_a_plan_keeps_to_the_size_of_the_whole_model(what: str, share: float) -> None:
    found, size = search(), analysis.size(MODEL)
    limit = int(share * ((size.macs or 0) if what == "max_macs" else size.params))
    plan = found.plan(0, Bounds(**{what: limit}))
    column = 3 if what == "max_macs" else 4
    harms = [row[2] for row in every_plan(found) if row[column] <= limit]
    if not harms:
        assert plan is None
        return
    own = next(row for row in every_plan(found) if row[0] == plan)
    assert own[column] <= limit
    assert own[2] == pytest.approx(min(harms), abs=1e-3)


def test_options_that_hardly_pay_or_harm_without_end_are_in_no_plan() -> None:
    found = search(harms={**HARMS, "b": {**HARMS["b"], Option("output", 16): inf}})
    ways = {w.option for layer in layers_of(MODEL) for w in found.ways(layer)}
    assert Option("both", 16) not in ways  # 3 → 2.9
    assert found.plan(0, Bounds()) in ({}, {"c": Option("output", 32)})
    plan = found.plan(1 / found.predicted({"a": Option("input", 16)}), Bounds())
    assert plan is not None
    fastest = found.fastest(Bounds())
    assert fastest == pytest.approx(10 / (10 - 2 - 3.5 - 0.5))  # b at both 48, not at output 16


def test_harm_that_nobody_measured_is_infinite() -> None:
    found = search(harms={"a": HARMS["a"]})
    assert found.harm("a", Option("input", 16)) == 0.5
    assert found.harm("a", Option("input", 48)) == inf
    assert found.harm("b", Option("output", 16)) == inf
    assert found.plan(1.3, Bounds()) is None
    assert (found.plan(1.2, Bounds()) or {}).keys() == {"a"}


def test_the_fastest_worth_building_does_not_harm_too_much() -> None:
    found = search()
    times = [row[1] for row in every_plan(found) if row[2] <= module.WORST_HARM]
    assert found.fastest(Bounds()) == pytest.approx(10 / min(times))
    assert min(times) < min(row[1] for row in every_plan(found) if row[2] <= 0.5)
    assert found.fastest(Bounds(max_params=1)) == 0


@pytest.mark.parametrize("slowness", [0.8, 1, 1.3])
def test_savings_are_worth_what_they_are_together(slowness: float) -> None:
    found = timed(slowness=slowness)
    plan = found.plan(0.999 * found.fastest(Bounds()), Bounds())
    assert plan
    (fastest,) = {found.fastest(Bounds()), timed(slowness=slowness).limit}
    assert fastest == pytest.approx(timed().limit / slowness)
    assert found.predicted(plan) == pytest.approx(1 / fastest, rel=0.01)
    assert found.predicted({}) == 1


def test_savings_that_are_worth_nothing_together_promise_nothing() -> None:
    found = timed(slowness=1e3)
    assert found.plan(1.3, Bounds()) is None
    assert found.fastest(Bounds()) < 1.2


def test_what_exact_rewrites_gained_counts(fitted: list[Any]) -> None:
    wider = NET.replace("[128,96,3,3]", "[128,96,5,5]").replace(
        "b = Conv<pads = [1,1,1,1]>", "b = Conv<pads = [2,2,2,2]>"
    )
    yardstick: Any = FakeYardstick(parse(wider))
    like = timed()
    found = Search(MODEL, layers_of(MODEL), like._latencies, like._harms, [], yardstick)
    gain = yardstick.fewer_macs(MODEL)
    assert gain > 2
    assert found.limit == pytest.approx(gain * found.fastest(Bounds()))
    assert found.find(Bounds(speedup=0.99 * gain)).plan == {}
    assert found.find(Bounds(speedup=1.2 * gain)).plan
    assert found.find(Bounds(speedup=30 * gain)) is None


def test_no_layer_at_all() -> None:
    found = Search(MODEL, [], TABLE, {}, [], FakeYardstick(MODEL))  # type: ignore[arg-type]
    assert found.fastest(Bounds()) == 1
    assert found.plan(0, Bounds()) == {}
    assert found.plan(1.1, Bounds()) is None


# -- bounds that hold -------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [0.5, 1, 2, 3, 5])
@pytest.mark.parametrize("confident", [False, True])
def test_the_fastest_of_the_allowed_is_found(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch, drop: float, confident: bool
) -> None:
    monkeypatch.setattr(module, "EARLY", (1.0,))  # or plans lose more that harm less
    found, bounds = timed(), Bounds(max_drop=drop, confident=confident)
    best = found.find(bounds)
    assert best is not None
    assert bounds.allow(best.point)
    assert all(t.point.speedup <= best.point.speedup for t in found.trials if bounds.allow(t.point))
    # Of all speeds, finely stepped, none that is told apart from it is allowed as well.
    end = found.fastest(bounds)
    faster = np.geomspace(best.point.speedup * CLOSE * 1.01, max(end, 1), 20)
    for speedup in faster[faster < end / 1.01]:
        plan = found.plan(speedup, bounds)
        assert plan is not None
        lost = sum(64 / option.rank for option in plan.values())
        assert lost * (2 if confident else 1) > drop
    assert len(found.trials) <= module.STEPS + 1


def test_more_is_allowed_faster_is_found(fitted: list[Any]) -> None:
    found = [timed().find(Bounds(max_drop=drop)) for drop in (0.4, 1, 2, 4, 8, 16)]
    speeds = [trial.point.speedup for trial in found if trial]
    assert len(speeds) == 6
    assert speeds == sorted(speeds)
    assert speeds[-1] > 1.5 * speeds[0]


def test_nothing_lost_is_nothing_split(fitted: list[Any]) -> None:
    found = timed()
    best = found.find(Bounds(max_drop=0))
    assert best is not None
    assert best.plan == {}
    assert best.point.drop_points == 0
    assert model_of(found, best) == MODEL.to_proto()


def test_where_even_the_model_as_it_is_loses_too_much_there_is_none(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = timed()
    monkeypatch.setattr(FakeYardstick, "point", lambda *_: point(drop_points=2.0, drop_ci95=(1, 3)))
    assert found.find(Bounds(max_drop=1)) is None


@pytest.mark.parametrize("slowness", [1, 1.1, 1.3])
@pytest.mark.parametrize("speedup", [1.5, 2, 3])
def test_the_speed_wanted_is_measured_not_foretold(
    fitted: list[Any], speedup: float, slowness: float
) -> None:
    found = timed(slowness=slowness)
    best = found.find(Bounds(speedup=speedup))
    assert best is not None
    assert best.point.speedup >= speedup
    assert 1 / found.predicted(best.plan) >= slowness * speedup * 0.999
    # and no more than needed: grids of ranks are coarse
    assert best.point.speedup < 1.3 * speedup
    # What was too slow was never fitted.
    assert all(trial.point.speedup >= speedup for trial in found.trials)
    assert len(fitted) == len(found.trials) <= len(EARLY)


@pytest.mark.parametrize("speedup", [1.5, 2.5, 3])
def test_early_harm_counts_as_much_as_it_is_found_to(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch, speedup: float
) -> None:
    """Later splits mend most of what the first one breaks, or none of it."""

    def errors(mended: float, early: Sequence[float]) -> tuple[float, float]:
        judge = FakeYardstick.point

        def point(self: FakeYardstick, *given: Any) -> Point:
            judged = judge(self, *given)
            harms = {w: (16 / int(option.split()[1])) ** 2 for w, option in judged.ranks.items()}
            return replace(judged, error=sum(harms.values()) - mended * harms.get("a", 0))

        with monkeypatch.context() as patch:
            patch.setattr(FakeYardstick, "point", point)
            patch.setattr(module, "EARLY", early)
            found = timed()
            best = found.find(Bounds(speedup=speedup))
        assert best is not None
        return best.point.error, found._early

    for mended in (0.0, 0.95):
        assert errors(mended, EARLY)[0] <= errors(mended, EARLY[:1])[0]
    assert errors(0.95, EARLY)[0] < 0.9 * errors(0.95, EARLY[:1])[0]
    assert errors(0.0, EARLY)[1] == EARLY[0]
    assert errors(0.95, EARLY)[1] < EARLY[0]


def test_a_speed_that_no_plan_reaches(fitted: list[Any]) -> None:
    assert timed().find(Bounds(speedup=50)) is None
    fastest = timed().fastest(Bounds())
    assert timed(slowness=2).find(Bounds(speedup=0.9 * fastest)) is None
    assert not fitted


def test_a_speed_and_a_drop_must_both_hold(fitted: list[Any]) -> None:
    best = timed().find(Bounds(speedup=2))
    assert best is not None
    lost = best.point.loss
    assert lost > 0
    assert timed().find(Bounds(speedup=2, max_drop=1.01 * lost)) is not None
    assert timed().find(Bounds(speedup=2, max_drop=0.99 * lost)) is None
    assert timed().find(Bounds(speedup=2, max_drop=1.01 * lost, confident=True)) is None


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_the_model_built_is_as_small_as_wanted(fitted: list[Any], what: str, share: float) -> None:
    limit = int(share * getattr(analysis.size(MODEL), what))
    found = timed()
    best = found.find(Bounds(**{f"max_{what}": limit}))
    assert best is not None
    assert getattr(best.point, what) <= limit
    weights = model_of(found, best).graph.initializer
    assert best.point.params == sum(prod(weight.dims) for weight in weights)
    with_speed = timed().find(Bounds(**{f"max_{what}": limit}, speedup=1.5, max_drop=1000))
    assert with_speed is not None
    assert getattr(with_speed.point, what) <= limit


def test_a_size_that_no_plan_reaches(fitted: list[Any]) -> None:
    size = analysis.size(MODEL)
    assert timed().find(Bounds(max_macs=(size.macs or 0) // 50)) is None
    assert timed().find(Bounds(max_params=size.params // 50)) is None
    assert timed().find(Bounds(max_params=size.params // 50, max_drop=1)) is None
    assert not fitted


# -- what is built ----------------------------------------------------------------------------


def test_a_layer_that_is_not_faster_in_its_model_is_put_back(fitted: list[Any]) -> None:
    found = timed(slow=["b"])
    best = found.find(Bounds(max_drop=4))
    assert best is not None
    assert best.plan.keys() == {"a", "c"} or best.plan.keys() == {"a"}
    assert found.put_back == {"b": "did not get faster in the real model: 0.80×"}
    assert not any("b" in splits for splits in fitted)
    (b,) = (layer for layer in layers_of(MODEL) if layer.where == "b")
    assert [way.option for way in found.ways(b)] == [None]
    assert "b" in {node.output[0] for node in model_of(found, best).graph.node}
    assert "b.core" not in {node.output[0] for node in model_of(found, best).graph.node}


def test_all_layers_put_back_is_the_model_as_it_came(fitted: list[Any]) -> None:
    found = timed(slow=["a", "b", "c"])
    best = found.find(Bounds(max_drop=4))
    assert best is not None
    assert best.plan == {}
    assert model_of(found, best) == MODEL.to_proto()


@pytest.mark.parametrize("what", ["macs", "params"])
def test_the_size_holds_though_a_layer_is_put_back(fitted: list[Any], what: str) -> None:
    limit = int(0.75 * getattr(analysis.size(MODEL), what))
    best = timed(slow=["a"]).find(Bounds(**{f"max_{what}": limit}))
    assert best is not None
    assert "a" not in best.plan
    assert getattr(best.point, what) <= limit
    assert timed(slow=["a", "b", "c"]).find(Bounds(**{f"max_{what}": limit})) is None


def test_the_speed_holds_though_a_layer_is_put_back(fitted: list[Any]) -> None:
    best = timed(slow=["a"]).find(Bounds(speedup=1.5))
    assert best is not None
    assert "a" not in best.plan
    assert best.point.speedup >= 1.5
    assert timed(slow=["a", "b", "c"]).find(Bounds(speedup=1.5)) is None


def test_no_plan_is_built_twice(fitted: list[Any]) -> None:
    found = timed()
    best = found.find(Bounds(max_drop=2))
    assert found.find(Bounds(max_drop=2)) is best
    found.curve(8)
    assert found.find(Bounds(max_drop=2)) is not None
    plans = [tuple(sorted(trial.plan.items())) for trial in found.trials]
    assert len(plans) == len(set(plans)) > 5
    assert len(fitted) == sum(map(bool, plans))


def test_the_curve_goes_from_the_model_as_it_is_to_the_fastest(fitted: list[Any]) -> None:
    found = timed()
    found.curve(6)
    speeds = sorted(trial.point.speedup for trial in found.trials)
    assert len(speeds) == 6
    assert speeds[0] == 1
    assert speeds[-1] == pytest.approx(found.fastest(Bounds()), rel=0.01)
    ratios = [fast / slow for slow, fast in pairwise(speeds)]
    assert max(ratios) < 1.6 * speeds[-1] ** (1 / 5)
    for trial in found.trials:
        assert trial.point.predicted_ms == pytest.approx(10 / trial.point.speedup)
        assert trial.point.ranks == {where: str(option) for where, option in trial.plan.items()}


def losing(monkeypatch: pytest.MonkeyPatch, drop: Callable[[float], float]) -> None:
    """Let what a model loses follow from its speed."""
    judge = FakeYardstick.point

    def point(self: FakeYardstick, *given: Any) -> Point:
        found = judge(self, *given)
        lost = drop(found.speedup)
        return replace(found, drop_points=lost, drop_ci95=(lost, lost))

    monkeypatch.setattr(FakeYardstick, "point", point)


def test_a_faster_one_of_the_curve_is_taken_where_it_is_allowed(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lost does not always grow with the speed."""
    end = timed().fastest(Bounds())
    losing(monkeypatch, lambda speed: 9.0 if 1.3 < speed < 0.95 * end else 0.5)
    bisected = timed().find(Bounds(max_drop=1))
    assert bisected is not None
    assert 1 <= bisected.point.speedup <= 1.3
    found = timed()
    found.curve(6)
    best = found.find(Bounds(max_drop=1))
    assert best is not None
    assert best.point.speedup == pytest.approx(end, rel=0.01)
    assert best.point.speedup == max(trial.point.speedup for trial in found.trials)
    assert bisected.plan in [trial.plan for trial in found.trials]


def test_what_the_curve_holds_beyond_the_bounds_is_not_taken(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, lambda speed: 9.0 if speed > 1.3 else 0.5)
    for bounds in (Bounds(max_drop=1), Bounds(max_drop=1, confident=True)):
        found = timed()
        found.curve(6)
        best = found.find(bounds)
        assert best is not None
        assert best.point.speedup <= 1.3 < max(trial.point.speedup for trial in found.trials)
    params = analysis.size(MODEL).params // 2
    found = timed()
    found.curve(6)
    small = found.find(Bounds(max_params=params))  # the whole one would lose less
    assert small is not None
    assert small.point.params <= params
    assert found.find(Bounds(speedup=50)) is None


def test_at_a_speed_a_better_one_of_the_curve_is_taken(
    fitted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = timed().fastest(Bounds())
    losing(monkeypatch, lambda speed: 0.5 if speed > 0.95 * end or speed < 1.4 else 9.0)
    for bounds in (Bounds(speedup=1.5), Bounds(speedup=1.5, max_drop=10)):
        found = timed()
        found.curve(6)
        aimed, best = timed().find(bounds), found.find(bounds)
        assert aimed is not None
        assert best is not None
        assert 1.5 <= aimed.point.speedup < 0.95 * end < best.point.speedup
        assert (aimed.point.loss, best.point.loss) == (9.0, 0.5)
    # Nor is a faster one that loses more, though that is allowed.
    losing(monkeypatch, lambda speed: 9.0 if speed > 0.95 * end else 0.5)
    found = timed()
    found.curve(6)
    best = found.find(Bounds(speedup=1.5, max_drop=10))
    assert best is not None
    assert best.point.speedup < max(trial.point.speedup for trial in found.trials)
    assert best.point.loss == 0.5


def test_a_model_that_cannot_gain_has_a_curve_of_one_point(fitted: list[Any]) -> None:
    found = search(replace(TABLE, options={}), {})
    found.curve(8)
    assert found.find(Bounds(max_drop=1)) is found.trials[0]
    assert [trial.plan for trial in found.trials] == [{}]


def test_by_macs_nothing_is_timed_before_the_model_is_there(fitted: list[Any]) -> None:
    table = macs_as_ms(MODEL, layers_of(MODEL))
    harms = {w: {o: 1 / o.rank for o in row} for w, row in table.options.items()}
    yardstick: Any = FakeYardstick(MODEL, slow=["a", "b", "c"], slowness=9)
    found = Search(MODEL, layers_of(MODEL), replace(table, unit="MACs"), harms, [], yardstick)
    best = found.find(Bounds(speedup=2))
    assert best is not None
    assert not found._yardstick.timed_in_place  # type: ignore[attr-defined]
    assert best.point.predicted_ms is None
    assert 2 * (best.point.macs or inf) <= (analysis.size(MODEL).macs or 0)
    assert not found.put_back

    # Of the allowed the one of fewest MACs, although this machine runs it more slowly than none.
    found.curve(4)
    assert {} in [trial.plan for trial in found.trials]
    best = found.find(Bounds(max_drop=3))
    assert best is not None
    assert best.plan
    allowed = [t.point.macs or inf for t in found.trials if t.point.loss <= 3]
    assert best.point.macs == min(allowed) < max(allowed)
    assert best.point.speedup < 1


@pytest.mark.parametrize("bounds", [Bounds(max_drop=3), Bounds(speedup=2)])
def test_the_same_twice(bounds: Bounds) -> None:
    """With splits really fitted."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 64, 8, 8)).astype(np.float32)
    protos = []
    for _ in range(2):
        found = timed()
        found._batches = [Batch({"x": x[:8]}, None, 8), Batch({"x": x[8:]}, None, 8)]
        best = found.find(bounds)
        assert best is not None
        protos.append(model_of(found, best))
    assert protos[0] == protos[1]
    onnx.checker.check_model(protos[0], full_check=True)


# -- split models -----------------------------------------------------------------------------


def test_split_model_replaces_those_layers_alone() -> None:
    before = MODEL.to_proto()
    layers = layers_of(MODEL)
    sizes = {layer.where: layer.size for layer in layers}
    factors = {
        where: nominal_factors(Split(sizes[where], sides, 16))
        for where, sides in (("a", "both"), ("c", "output"))
    }
    result = split_model(MODEL, layers, factors)
    assert MODEL.to_proto() == before
    proto = result.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    written = [node.output[0] for node in proto.graph.node]
    assert written[:3] == ["a.reduce", "a.core", "a"]
    assert {"b", "c.core", "c", "y"} <= {*written}
    feeds = random_feeds(MODEL, side=8)
    assert run(result, feeds)[0].shape == run(MODEL, feeds)[0].shape
    assert split_model(MODEL, layers, {}).to_proto() == before


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_weights_that_only_time_counts_for_differ_from_one_another(sides: Sides) -> None:
    factors = module._random(Split(layers_of(MODEL)[0].size, sides, 16))
    parts = [part for part in (factors.reduce, factors.core, factors.expand) if part is not None]
    assert len(parts) == (3 if sides == "both" else 2)
    for part in parts:
        assert len(np.unique(part)) > 0.9 * part.size
        assert np.isfinite(part).all()
        assert part.min() > 0
