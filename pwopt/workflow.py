"""The rewrite as a user asks for it: which passes, and what they did to the model's cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from pwopt.analysis import Size, size
from pwopt.candidates import Choice
from pwopt.errors import SpecError
from pwopt.model import Model
from pwopt.observers import Verify
from pwopt.registry import pipeline as parse
from pwopt.rewriting import Context, Observer, PassReport, Pipeline
from pwopt.shapes import InputShapes


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
    pipeline: Pipeline | str | None = None,
    shapes: InputShapes | None = None,
    observers: Sequence[Observer] = (),
) -> Rewritten:
    """Return a cheaper version of `model`, which itself stays as it is.

    Args:
        model: The model or its file.
        bottleneck: Fold affine operators, then split wide k×k convolutions at this rank.
        sides: Where the 1×1 convolutions of `bottleneck` go.
        pipeline: The passes to run instead, as an object or as text.
        shapes: Fixes input axes that the model leaves open, by input name.
        observers: Watch the passes.

    Raises:
        SpecError: neither or both of `bottleneck` and `pipeline`, or a bad option.
        ModelError: the model cannot be read, or its shapes cannot be inferred.
    """
    if (bottleneck is None) == (pipeline is None):
        raise SpecError("say what to do: either a bottleneck rank or a pipeline")
    if pipeline is None:
        pipeline = f"fold-affine,bottleneck{{rank={bottleneck},sides={sides}}}"
    steps = parse(pipeline) if isinstance(pipeline, str) else pipeline
    original = Model.open(model)
    result = original.copy()
    reports = steps.run(result, Context(shapes=shapes), [Verify(), *observers])
    return Rewritten(result, steps, reports, size(original, shapes), size(result, shapes))
