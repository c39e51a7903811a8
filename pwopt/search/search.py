"""The fastest model within the accuracy allowed, or the most accurate one at the speed wanted.

A plan says at which option each layer is split: the least total harm that a budget of predicted
time (and of MACs and parameters) allows. Harms of layers add up only roughly, and predicted times
are not measured ones. So plans are built, fitted, timed and judged whole, and the budget is moved
until the bound holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, sqrt

import numpy as np

from pwopt import analysis, graph
from pwopt.calibration.refit import refit
from pwopt.cost import Split
from pwopt.data import Batch
from pwopt.errors import SpecError
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.search.allocation import Choice, allocate
from pwopt.search.front import Point
from pwopt.search.latency import Latencies, Option, Plan, nominal_factors
from pwopt.search.yardstick import Yardstick
from pwopt.shapes import InputShapes, bind

WORST_HARM = 1.0
"""Plans that are foretold to do more harm (nats, or relative error) are not worth building."""

WORST_HARM_TO_LEARN = 20.0
"""That where learning will win back what is lost."""

EARLY = (1.0, 0.3, 0.1)
"""What the harm that the first layer does may count beside that of the last one. Alone, each layer
does its harm to a network that is not split behind it; in a plan, later splits are fitted to make
up for what earlier ones have lost. By how much, only building tells."""

CLOSE = 1.04
"""Speeds as close as this are not told apart any more."""

LEAST_WORTH = 0.1
"""Savings are taken to be worth no less than this part of themselves, whatever is measured."""

STEPS = 6
"""How often a budget is moved, at most, until a bound holds."""

RETRIES = 2
"""How often a model that turned out slower than foretold is made faster, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the user wants; None does not bind.

    Attributes:
        speedup: At least so many times as fast as the original, measured.
        max_drop: At most so many points of top-1 lost; without labels, of agreement.
        max_macs: At most so many multiply-accumulates.
        max_params: At most so many parameters.
        confident: Let the upper end of the drop's 95 % interval meet `max_drop`.

    Raises:
        SpecError: a speed-up or drop is negative, infinite or NaN.
    """

    speedup: float | None = None
    max_drop: float | None = None
    max_macs: int | None = None
    max_params: int | None = None
    confident: bool = False

    def __post_init__(self) -> None:
        for what, wanted in (("speed-up", self.speedup), ("drop", self.max_drop)):
            if wanted is not None and not 0 <= wanted < inf:  # nor NaN
                raise SpecError(f"a {what} of {wanted} cannot be wished for; give a number from 0")

    def allow(self, point: Point) -> bool:
        """Tell whether what a model has lost is within `max_drop`."""
        lost = point.worst_loss if self.confident else point.loss
        return self.max_drop is None or lost <= self.max_drop


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have a layer; `option` is None for the layer as it is.

    `time` is in the unit of the latencies, `harm` in nats or as a relative error.
    """

    where: str
    option: Option | None
    time: float
    macs: int
    params: int
    harm: float


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A plan that was built and judged."""

    plan: Plan
    factors: Mapping[str, Factors]
    point: Point


class Search:
    """Plans for one model, and what became of those that were built.

    Attributes:
        trials: What was built so far.
        put_back: Layers that are no longer split, and why.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[Linear],
        latencies: Latencies,
        harms: Mapping[str, Mapping[Option, float]],
        batches: Sequence[Batch],
        yardstick: Yardstick,
        *,
        shapes: InputShapes | None = None,
        batch: int = 1,
        cores: int = 1,
        worst_harm: float = WORST_HARM,
        progress: Progress | None = None,
    ) -> None:
        """Prepare a search.

        Args:
            model: The model that is split, its exact rewrites made; stays as it is.
            layers: Layers of its graph that can be split.
            latencies: Times of the layers and their options.
            harms: What each option alone does to the outputs.
            batches: Samples that splits are fitted to.
            yardstick: What models are measured against.
            shapes: Open axes of the inputs.
            batch: That of the layers' sizes; a bound on MACs is for one sample, or as in `shapes`.
            cores: Threads to fit with.
            worst_harm: Plans that are foretold to do more harm are not worth building.
            progress: Told how far it is.
        """
        self.trials: list[Trial] = []
        self.put_back: dict[str, str] = {}
        self._model = model
        self._layers = layers
        self._latencies = latencies
        self._harms = harms
        self._batches = batches
        self._yardstick = yardstick
        self._is_timed = latencies.unit == "ms"
        # What the exact rewrites have gained.
        self._gain = self._speed({}) if self._is_timed else yardstick.fewer_macs(model)
        self._size = analysis.size(model, shapes)
        self._macs = analysis.size(model, bind(model, shapes, batch=batch).shapes).macs
        self._cores = cores
        self._worst_harm = worst_harm
        self._progress = progress
        self._early, self._settled = EARLY[0], False

    @property
    def limit(self) -> float:
        """The speed-up over the original beyond which no plan is worth building."""
        return self._gain * self.fastest(Bounds())

    def harm(self, where: str, option: Option) -> float:
        """Return what a split alone does to the outputs; infinite where it is not known."""
        return self._harms.get(where, {}).get(option, inf)

    # -- plans --------------------------------------------------------------------------------

    def plan(self, speedup: float, bounds: Bounds) -> Plan | None:
        """Return the least harmful plan that is foretold to be so many times as fast as the model.

        None if there is none. A speed-up of 0 does not bind.
        """
        limit = inf
        if speedup:
            limit = self._latencies.run_ms * (1 - (1 - 1 / speedup) / self._worth)
        # In equal ratios from the first layer to the last.
        counts = np.geomspace(self._early, 1, len(self._layers)).tolist()
        weights = {layer.where: c for layer, c in zip(self._layers, counts, strict=True)}
        return self._allocate(lambda way: weights[way.where] * way.harm, limit, inf, bounds)

    def fastest(self, bounds: Bounds) -> float:
        """Return the speed-up beyond which no plan is worth building; 0 if none is at all."""
        plan = self._fastest_plan(bounds)
        return 0.0 if plan is None else 1 / self.predicted(plan)

    def _fastest_plan(self, bounds: Bounds) -> Plan | None:
        return self._allocate(lambda way: way.time, inf, self._worst_harm, bounds)

    def predicted(self, plan: Plan) -> float:
        """Return what a plan is foretold to take, as a share of the model's time."""
        return 1 - self._saved(plan) * self._worth

    def _saved(self, plan: Plan) -> float:
        """Sum up what the splits of a plan save by themselves, as a share of the model's time."""
        run, layers = self._latencies.run_ms, self._latencies.layers
        saved = sum(layers[w] - self._latencies.options[w][option] for w, option in plan.items())
        return saved / run if run else 0.0

    @cached_property
    def _worth(self) -> float:
        """What savings are worth together: measured ÷ their sum, of the fastest plan.

        They add up only roughly: a smaller model keeps more of itself in the processor's cache.
        """
        plan = self._fastest_plan(Bounds()) if self._is_timed else None
        if not plan:
            return 1.0
        measured = 1 - self._gain / self._speed(plan)
        return max(measured / self._saved(plan), LEAST_WORTH)

    def ways(self, layer: Linear) -> list[Way]:
        """List the ways to have a layer: as it is, or split at an option that pays."""
        where, size = layer.where, layer.size
        time = self._latencies.layers.get(where, 0.0)
        found = [Way(where, None, time, size.macs, size.params, 0.0)]
        if where in self.put_back:
            return found
        for option in self._latencies.paying(where):
            split = Split(size, option.sides, option.rank)
            faster = self._latencies.options[where][option]
            harm = self.harm(where, option)
            found.append(Way(where, option, faster, split.macs, split.params, harm))
        return found

    def _allocate(
        self, minimise: Callable[[Way], float], time: float, harm: float, bounds: Bounds
    ) -> Plan | None:
        """Take the best way for every layer within limits of time and harm, and of size."""
        ways = [self.ways(layer) for layer in self._layers]
        unsplit = [found[0] for found in ways]
        macs = inf
        if bounds.max_macs is not None and self._size.macs and self._macs:
            most = bounds.max_macs * self._macs / self._size.macs  # for the whole batch
            macs = most - self._macs + sum(way.macs for way in unsplit)
        params = inf
        if bounds.max_params is not None:
            params = bounds.max_params - self._size.params + sum(way.params for way in unsplit)
        time += sum(way.time for way in unsplit) - self._latencies.run_ms
        groups = [
            [Choice(w, (w.time, w.harm, w.macs, w.params), minimise(w)) for w in found]
            for found in ways
        ]
        taken = allocate(groups, (time, harm, macs, params))
        if taken is None:
            return None
        return {way.where: way.option for way in taken if way.option is not None}

    # -- models -------------------------------------------------------------------------------

    def find(self, bounds: Bounds) -> Trial | None:
        """Build models and return the best within the bounds; None where none is.

        That is the most accurate one at the speed wanted; else the fastest that loses no more than
        is allowed; else the most accurate one of the size allowed. It may have no layer split.
        """
        if bounds.speedup is not None:
            speedup = bounds.speedup
            self._settle(lambda: self._aim(speedup, bounds))
        elif bounds.max_drop is not None:
            self._bisect(bounds)
        else:
            self._build(0, bounds)
        within = [trial for trial in self.trials if self._meets(trial, bounds)]
        if bounds.speedup is None and bounds.max_drop is not None:
            return max(within, key=self._reached, default=None)
        return min(within, key=_inaccuracy, default=None)

    def curve(self, points: int) -> None:
        """Build models all the way from the model as it is to the fastest worth building."""
        for speedup in np.geomspace(1, max(self.fastest(Bounds()), 1), points):
            self._build(speedup / (1 + 1e-6), Bounds())

    def model(self, trial: Trial) -> Model:
        """Return the model of a trial."""
        return split_model(self._model, self._layers, trial.factors)

    def _settle(self, build: Callable[[], Trial | None]) -> Trial | None:
        """Find out how much the harm of early layers counts: build until that makes it worse.

        Returns the best of what `build` gave; later plans count as that one did.
        """
        best, kept = None, EARLY[0]
        for self._early in EARLY:
            trial = build()
            if trial is None:
                break
            if trial is best:
                continue
            self._settled = best is not None  # two plans were told apart
            if best is not None and _inaccuracy(trial) >= _inaccuracy(best):
                break
            best, kept = trial, self._early
        self._early = kept
        return best

    def _aim(self, speedup: float, bounds: Bounds) -> Trial | None:
        """Build the least harmful model that is so many times as fast as the original.

        Speed is measured before anything is fitted, since it does not depend on values. None is
        returned where no model was fast enough.
        """
        aim, best = speedup / self._gain, None
        for _ in range(STEPS):
            plan = self._kept_plan(aim, bounds)
            if plan is None:
                break
            reached = self._speed(plan)
            if reached >= speedup and (best is None or reached < best[0]):
                best = reached, plan
            if speedup <= reached < CLOSE * speedup:
                break
            aim *= sqrt(CLOSE) * speedup / reached
        trial = None if best is None else self._trial(best[1])
        for _ in range(RETRIES):  # fitted and measured anew it may be a little slower
            if trial is None or self._reached(trial) >= speedup:
                break
            aim *= CLOSE
            trial = self._build(aim, bounds)
        return trial if trial is not None and self._reached(trial) >= speedup else None

    def _bisect(self, bounds: Bounds) -> None:
        """Build models around the fastest within the bounds.

        Bisects the speed on a logarithmic scale: what is lost grows with it, by and large.
        """
        slow, fast = 1.0, self.fastest(bounds)
        for _ in range(STEPS):
            if fast < CLOSE * slow:
                break
            middle = sqrt(slow * fast)
            build = partial(self._build, middle, bounds)
            trial = build() if self._settled else self._settle(build)
            if trial is not None and bounds.allow(trial.point):
                slow = middle
            else:
                fast = middle
        allowed = [self._reached(trial) for trial in self.trials if bounds.allow(trial.point)]
        if max(allowed, default=0.0) < self._gain:
            self._build(0, bounds)

    def _build(self, speedup: float, bounds: Bounds) -> Trial | None:
        """Build the least harmful model foretold to be so many times as fast as the model."""
        return self._trial(self._kept_plan(speedup, bounds))

    def _meets(self, trial: Trial, bounds: Bounds) -> bool:
        point = trial.point
        return (
            bounds.allow(point)
            and (bounds.speedup is None or self._reached(trial) >= bounds.speedup)
            and (bounds.max_macs is None or (point.macs or inf) <= bounds.max_macs)
            and (bounds.max_params is None or point.params <= bounds.max_params)
        )

    def _reached(self, trial: Trial) -> float:
        """Return how many times as fast as the original it is, by time or by MACs."""
        return trial.point.speedup if self._is_timed else self._speed(trial.plan)

    def _trial(self, plan: Plan | None) -> Trial | None:
        """Fit, build, time and judge a plan, unless that was done before."""
        if plan is None:
            return None
        for done in self.trials:
            if done.plan == plan:
                return done
        factors = {}
        if plan:
            factors = refit(
                self._model,
                self._layers,
                self._splits(plan),
                self._batches,
                threads=self._cores,
                progress=self._progress,
            )
        ranks = {where: str(option) for where, option in plan.items()}
        predicted = self.predicted(plan) / self._gain if self._is_timed else None
        model = split_model(self._model, self._layers, factors)
        trial = Trial(plan, factors, self._yardstick.point(model, predicted, ranks))
        self.trials.append(trial)
        return trial

    def _kept_plan(self, speedup: float, bounds: Bounds) -> Plan | None:
        """Plan until every layer that is split is faster in its model; the others are put back."""
        while plan := self.plan(speedup, bounds):
            if not self._is_timed:
                return plan
            times = self._yardstick.in_place(self._model, self._layers, plan)
            slower = {w: before / after for w, (before, after) in times.items() if after >= before}
            if not slower:
                return plan
            for where, gain in slower.items():
                self.put_back[where] = f"did not get faster in the real model: {gain:.2f}×"
        return plan

    def _speed(self, plan: Plan) -> float:
        """Measure how many times as fast as the original a plan is, or recall it from the cache."""
        if not self._is_timed:
            return self._gain / self.predicted(plan)
        conditions = {where: str(option) for where, option in plan.items()}
        conditions["original"] = self._yardstick.structure
        return self._latencies.recalled(conditions, lambda: self._measured_speed(plan))

    def _measured_speed(self, plan: Plan) -> float:
        factors = {where: _random(split) for where, split in self._splits(plan).items()}
        return self._yardstick.speed(split_model(self._model, self._layers, factors)).ratio

    def _splits(self, plan: Plan) -> dict[str, Split]:
        sizes = {layer.where: layer.size for layer in self._layers}
        return {where: Split(sizes[where], o.sides, o.rank) for where, o in plan.items()}


def _inaccuracy(trial: Trial) -> tuple[float, float]:
    """Return what models of about the same speed are compared by: errors are less noisy."""
    return trial.point.error, trial.point.loss


def _random(split: Split) -> Factors:
    """Make factors of random numbers, of which only the time is of interest.

    Equal ones would not do, since onnxruntime may keep equal weights once.
    """
    rng, like = np.random.default_rng(0), nominal_factors(split)
    parts = {part: getattr(like, part) for part in ("core", "reduce", "expand")}
    scattered = {
        part: weight * rng.uniform(0.5, 1.5, weight.shape)
        for part, weight in parts.items()
        if weight is not None
    }
    return Factors(**scattered)


def split_model(model: Model, layers: Sequence[Linear], factors: Mapping[str, Factors]) -> Model:
    """Return a copy of `model` in which layers are replaced by their factors."""
    result = model.copy()
    nodes = {node.outputs[0].name: node for node in result.graph.nodes if node.outputs}
    names = graph.Names(result)
    for layer in layers:
        if layer.where in factors:
            own = replace(layer, node=nodes[layer.where])
            graph.replace(result.graph, own.node, own.split(factors[layer.where], names))
    return result
