"""The rewrite as a user asks for it: which passes, and what they did to the model's cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from pwopt.analysis import Size, size
from pwopt.candidates import Choice
from pwopt.errors import SpecError
from pwopt.judging import Gate, SiteJudge
from pwopt.model import Model
from pwopt.observers import Verify
from pwopt.proof import prove
from pwopt.registry import pipeline as parse
from pwopt.rewriting import Context, Observer, PassReport, Pipeline
from pwopt.shapes import InputShapes

_FOLD_AND_MOVE = (
    "fold-affine,fold-pad,fold-affine-before,merge-linear-convs,pool-before-pointwise,hoist-stride"
)

EXACT: dict[Gate, str] = {
    "measured": f"{_FOLD_AND_MOVE},fuse-siblings,gemm-to-conv,conv-to-gemm",
    "macs": _FOLD_AND_MOVE,  # the others save no MACs
    "always": f"{_FOLD_AND_MOVE},gemm-to-conv",
}
"""The exact passes that have a chance, by gate; fused siblings are a matter of measurement."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A rewritten model, what each pass did, and the cost before and after."""

    model: Model
    pipeline: Pipeline
    reports: tuple[PassReport, ...]
    before: Size
    after: Size

    @property
    def changed(self) -> bool:
        """Whether any pass rewrote anything."""
        return any(report.rewrote for report in self.reports)


def rewrite(
    model: Model | ModelProto | str | Path,
    *,
    bottleneck: int | None = None,
    sides: Choice = "auto",
    exact: bool = False,
    gate: Gate = "measured",
    pipeline: Pipeline | str | None = None,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int = 1,
    observers: Sequence[Observer] = (),
) -> Rewritten:
    """Return a cheaper version of `model`, which itself stays as it is.

    Args:
        model: The model or its file.
        bottleneck: Fold affine operators, then split wide k×k convolutions at this rank.
        sides: Where the 1×1 convolutions of `bottleneck` go.
        exact: Make the exact rewrites that pay, before the bottlenecks if there are any.
        gate: When an exact rewrite pays, see `pwopt.judging.SiteJudge`.
        pipeline: The passes to run instead, as an object or as text.
        shapes: Fixes input axes that the model leaves open, by input name.
        threads: Threads to measure exact rewrites with.
        batch: Batch to measure them at.
        observers: Watch the passes.

    Raises:
        SpecError: nothing to do, a pipeline beside other wishes, or a bad option.
        ModelError: the model cannot be read, or its shapes cannot be inferred; or the proof that
            exact rewrites changed nothing fails.
    """
    if (bottleneck is None and not exact) == (pipeline is None):
        raise SpecError("say what to do: a bottleneck rank or exact rewrites, or else a pipeline")
    original = Model.open(model)
    result = original.copy()
    watching = [Verify(), *observers]
    steps = Pipeline(())
    reports: tuple[PassReport, ...] = ()
    if exact:
        judge = SiteJudge(gate, shapes=shapes, threads=threads, batch=batch)
        steps = parse(EXACT[gate])
        reports = steps.run(result, Context(shapes=shapes, judge=judge), watching)
        if any(report.rewrote for report in reports):
            prove(original, result, shapes)
    if bottleneck is not None:
        pipeline = f"fold-affine,bottleneck{{rank={bottleneck},sides={sides}}}"
    if pipeline is not None:
        more = parse(pipeline) if isinstance(pipeline, str) else pipeline
        steps = Pipeline(steps.passes + more.passes)
        reports += more.run(result, Context(shapes=shapes), watching)
    if any(report.rewrote for report in reports):
        result = result.copy()  # whose message tells of inputs that were edited, too
    return Rewritten(result, steps, reports, size(original, shapes), size(result, shapes))
