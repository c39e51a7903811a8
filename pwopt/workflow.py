"""The rewrite as a user asks for it: which passes, and what they did to the model's cost."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from pwopt import external
from pwopt.analysis import Size, size
from pwopt.calibration import LIMIT, held_out
from pwopt.candidates import Choice
from pwopt.data import Samples, Source, open_data
from pwopt.data.samples import batched
from pwopt.errors import LearnError, SpecError
from pwopt.judging import Gate, SiteJudge
from pwopt.learn.wishes import Learned, Say, Watch, Wishes, check_installed
from pwopt.model import Model
from pwopt.observers import Verify
from pwopt.progress import Progress
from pwopt.proof import prove
from pwopt.registry import pipeline as parse
from pwopt.rewriting import Context, Observer, PassReport, Pipeline, note
from pwopt.search.front import Front
from pwopt.search.search import WORST_HARM, WORST_HARM_TO_LEARN, Bounds
from pwopt.shapes import InputShapes
from pwopt.tuning import tune

Init = Literal["auto", "svd", "calibrated", "learned"]
Activation = Literal["linear", "relu"]

_FOLD_AND_MOVE = (
    "fold-affine,fold-pad,fold-affine-before,merge-linear-convs,pool-before-pointwise,hoist-stride"
)

EXACT: dict[Gate, str] = {
    "measured": f"{_FOLD_AND_MOVE},fuse-siblings,gemm-to-conv,conv-to-gemm",
    "macs": _FOLD_AND_MOVE,  # the others save no MACs
    "always": f"{_FOLD_AND_MOVE},gemm-to-conv",
}
"""The exact passes that have a chance, by gate; fused siblings are a matter of measurement."""

BEFORE: dict[Gate, str] = {
    "measured": f"{_FOLD_AND_MOVE},fuse-siblings",
    "macs": _FOLD_AND_MOVE,
    "always": _FOLD_AND_MOVE,
}
"""Those that come before bottlenecks of chosen ranks. Whether a Gemm is a Conv is a matter of
measurement, often a tie, and of no account once it is split."""

RELU = "relu-bottlenecks"
"""What makes bottlenecks non-linear."""

BEHIND = "merge-linear-convs"
"""The exact passes that may find something new behind a split."""

AUTO = "bottleneck{rank=auto,init=calibrated}"
"""What stands in the pipeline for bottlenecks of chosen ranks; it cannot be run as such."""

DEFAULT = Bounds(max_drop=1.0)
"""What `bottleneck="auto"` keeps to where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A rewritten model, what each pass did, and the cost before and after.

    `pipeline` is the text of the passes. `front` holds what `bottleneck="auto"` built and judged,
    `learned` what learning did, if there was any.
    """

    model: Model
    pipeline: str
    reports: tuple[PassReport, ...]
    before: Size
    after: Size
    front: Front | None = None
    learned: Learned | None = None

    @property
    def changed(self) -> bool:
        """Whether any pass rewrote anything."""
        return any(report.rewrote for report in self.reports)


def rewrite(
    model: Model | ModelProto | str | Path,
    *,
    bottleneck: int | Literal["auto"] | None = None,
    sides: Choice = "auto",
    init: Init = "auto",
    data: Source | None = None,
    preprocess: str | None = None,
    bounds: Bounds = DEFAULT,
    cost: Literal["measured", "macs"] = "measured",
    curve: bool = False,
    samples: int = LIMIT,
    learning: Wishes | None = None,
    activation: Activation = "linear",
    exact: bool = False,
    gate: Gate | None = None,
    pipeline: Pipeline | str | None = None,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int = 1,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    watch: Watch = lambda stage, status: None,
    say: Say = lambda line: None,
) -> Rewritten:
    """Return a cheaper version of `model`, which itself stays as it is.

    Args:
        model: The model or its file.
        bottleneck: Split wide k×k convolutions at this rank, after affine operators are folded; or
            `auto`: split every layer as `bounds` ask for, between exact rewrites.
        sides: Where the 1×1 convolutions go, at a given rank.
        init: What splits are fitted to: `svd` to the weights alone, `calibrated` to `data`;
            `auto` takes the latter if there is data. `learned` goes on from there: the whole model
            learns from the original, on all of `data`.
        data: Samples, see `pwopt.data.open_data`; labels are used, by `auto`, if there are any.
        preprocess: How 8-bit images become inputs.
        bounds: What `auto` keeps to.
        cost: What `auto` compares splits by: `measured` time, or `macs` for other hardware.
        curve: Let `auto` build models all along the curve of speed against accuracy.
        samples: Samples to use at most.
        learning: How to learn, for `init="learned"`.
        activation: What stands between the convolutions of a split: nothing, or a Relu, which has
            to be learned.
        exact: Make the exact rewrites that pay, before the bottlenecks if there are any.
        gate: When an exact rewrite pays, see `pwopt.judging.SiteJudge`; goes by `cost` unless said.
        pipeline: The passes to run instead, as an object or as text.
        shapes: Fixes input axes that the model leaves open, by input name.
        threads: Threads to measure with.
        batch: Batch to measure at.
        seed: Of whatever is random.
        observers: Watch the passes.
        progress: Told how far it is.
        watch: Called after each step of learning.
        say: Called with lines on learning to be read.

    Raises:
        SpecError: nothing to do, wishes that do not go together, or a bad option.
        DataError: samples that do not fit.
        ModelError: the model cannot be read or run, or its shapes cannot be inferred; or the proof
            that exact rewrites changed nothing fails.
        BoundError: no model within `bounds` was found.
        LearnError: torch is not installed, or the model cannot be learned.
    """
    auto = bottleneck == "auto"
    if (bottleneck is None and not exact) == (pipeline is None):
        raise SpecError("say what to do: a bottleneck rank or exact rewrites, or else a pipeline")
    if data is None and (auto or init == "calibrated"):
        raise SpecError("bottlenecks are calibrated on samples; add --data")
    if auto and init == "svd":
        raise SpecError("--bottleneck auto is calibrated: leave --init svd out, or give a rank")
    if init == "learned":
        _check_learning(bottleneck, data, bounds)
    elif activation != "linear":
        raise SpecError(f"a bottleneck with {activation} has to be learned: add --init learned")
    original = Model.open(model)
    opened = None
    if data is not None:
        opened = open_data(data, original, preprocess=preprocess, shapes=shapes)
        shapes = {**_open_shapes(opened, batch), **(shapes or {})}
    gate = gate or cost
    learning = learning or Wishes()
    calibrated_on = opened
    if opened is not None and init == "learned":
        # What learning is judged by must be new to its start, too: else nothing seems to be gained.
        calibrated_on = opened.without(held_out(opened, learning.seed))
    context = Context(
        shapes=shapes, samples=calibrated_on, most_samples=samples, seed=seed, progress=progress
    )
    watching = [Verify(), *observers]
    result = original.copy()
    texts: list[str] = []
    reports: tuple[PassReport, ...] = ()
    front, learned = None, None

    def run(steps: Pipeline, judge: SiteJudge | None = None) -> None:
        nonlocal reports
        reports += steps.run(result, replace(context, judge=judge), watching)
        texts.append(str(steps))

    judge = SiteJudge(gate, shapes=shapes, threads=threads, batch=batch)
    if exact or auto:
        run(parse((EXACT if exact else BEFORE)[gate]), judge)
        if any(report.rewrote for report in reports):
            prove(original, result, shapes)
    if calibrated_on is not None and auto:
        # Models may be large, and are copied often: their weights wait in files.
        has_files = bool(external.tensors(result.proto))
        original, result = original.moved_out(), result.moved_out()
        tuned = tune(
            original,
            result,
            calibrated_on,
            bounds,
            by_macs=cost == "macs",
            curve=curve,
            limit=samples,
            shapes=shapes,
            threads=threads,
            batch=batch,
            seed=seed,
            worst_harm=WORST_HARM_TO_LEARN if init == "learned" else WORST_HARM,
            progress=progress,
        )
        result, front = tuned.model if has_files else tuned.model.moved_in(), tuned.front
        reports += (PassReport("bottleneck", tuned.events),)
        texts.append(AUTO)
        if reports[-1].rewrote:
            note(result, AUTO)
    elif bottleneck is not None:
        fitted = ",init=calibrated" if opened is not None and init != "svd" else ""
        run(parse(f"fold-affine,bottleneck{{rank={bottleneck},sides={sides}{fitted}}}"))
    elif pipeline is not None:
        run(parse(pipeline) if isinstance(pipeline, str) else pipeline)
    if bottleneck is not None and reports[-1].rewrote:
        if activation == "relu":
            run(parse(RELU))
        if auto or init == "learned":
            merged = parse(BEHIND).run(result, replace(context, judge=judge), watching)
            if any(report.rewrote for report in merged):
                reports += merged
                texts.append(BEHIND)
        if opened is not None and init == "learned":
            from pwopt.learn.learning import learn

            learned = learn(result, original, opened, learning, watch=watch, say=say)
            result = learned.model
            note(result, str(learning))
            texts.append(str(learning))
    elif init == "learned":
        say("no layer was split: there is nothing to learn")
    if any(report.rewrote for report in reports):
        result = result.copy()  # whose message tells of inputs that were edited, too
    before, after = size(original, shapes), size(result, shapes)
    return Rewritten(result, ",".join(texts), reports, before, after, front, learned)


def _check_learning(
    bottleneck: int | Literal["auto"] | None, data: Source | None, bounds: Bounds
) -> None:
    """Check that what is wanted can be had by learning.

    Raises:
        SpecError: wishes that do not go together.
        LearnError: torch is not installed, or there are several processes.
    """
    if bottleneck is None:
        raise SpecError("what is learned are bottlenecks: give --bottleneck R or auto")
    if data is None:
        raise SpecError("bottlenecks are learned from samples; add --data")
    sized = any((bounds.speedup, bounds.max_macs, bounds.max_params))
    if bottleneck == "auto" and (bounds.max_drop is not None or not sized):
        raise SpecError(
            "ranks cannot be chosen by --max-drop with --init learned: the loss is what learning "
            "is to win back; give --speedup instead, and let pwopt check judge"
        )
    check_installed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LearnError(
            "several processes would disturb one another's measurements: rewrite without --init "
            "learned in one, then start pwopt learn by torchrun"
        )


def _open_shapes(samples: Samples, batch: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of inputs that the model leaves open but for the batch, as samples have."""
    first, counted = next(iter(samples)).feeds, batched(samples.inputs)
    shapes = {}
    for i in samples.inputs:
        rows, *rest = first[i.name].shape or (1,)
        if not all(isinstance(size, int) for size in i.shape[1:]):
            is_open = i.name in counted and not isinstance(i.shape[0], int)
            shapes[i.name] = (batch if is_open else rows, *rest)
    return shapes
