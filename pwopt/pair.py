"""Two models that take the same inputs: their outputs, latencies and file sizes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from pwopt import external, runtime
from pwopt.data import Batch, Samples
from pwopt.data.samples import fed_rows
from pwopt.errors import ModelError
from pwopt.model import Model
from pwopt.runtime import Array, Feeds

Outputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Latency:
    """Median latencies of one run, interleaved; the speed-up's 95 % interval by bootstrap."""

    threads: int
    batch: int
    original_ms: float
    rewritten_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models, and what onnxruntime loads it from."""

    model: Model
    source: Model | Path

    @classmethod
    def open(cls, model: Model | str | Path) -> "Side":
        """Load the model if need be.

        Raises:
            ModelError: it cannot be loaded.
        """
        if isinstance(model, Model):
            return cls(model, model)
        return cls(Model.load(model), Path(model))

    def file_bytes(self) -> int:
        """Count the bytes of its file, external weights included, or of the one it would have."""
        if isinstance(self.source, Path):
            return self.source.stat().st_size + external.stored_bytes(self.model.proto)
        proto = self.model.to_proto()
        return proto.ByteSize() + external.stored_bytes(proto)


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and its rewrite."""

    original: Side
    rewritten: Side

    @property
    def names(self) -> tuple[str, str]:
        """What messages call them: their names, or their paths if the names are equal."""
        a, b = self.original.model, self.rewritten.model
        if a.name == b.name and a.path and b.path:
            return str(a.path), str(b.path)
        return a.name, b.name

    def outputs(self, samples: Samples) -> Iterator[tuple[Batch, Outputs, Outputs]]:
        """Run both on all samples, with all cores; rows that filled up a batch are cut off.

        Raises:
            DataError: samples that do not fit.
            ModelError: a model that cannot be run, or whose outputs differ in name, type or shape.
        """
        before, after = self._sessions(runtime.cores())
        original, rewritten = self.names
        for batch in samples:
            rows = fed_rows(batch.feeds, samples.inputs)
            a = runtime.run(before, batch.feeds, name=original)
            b = runtime.run(after, batch.feeds, name=rewritten)
            for name in a:
                if a[name].shape != b[name].shape:
                    raise ModelError(
                        f"{rewritten}: its output '{name}' has shape {list(b[name].shape)}, "
                        f"that of {original} {list(a[name].shape)}; compare a model with its own "
                        "rewrite"
                    )
            yield batch, _cut(a, rows, batch.samples), _cut(b, rows, batch.samples)

    def latency(self, feeds: Feeds, *, batch: int, threads: int, seed: int) -> Latency:
        """Time both on one feed, whose `batch` rows are reported."""
        timing = runtime.interleave(self._sessions(threads), feeds)
        original_ms, rewritten_ms = timing.median_ms
        speedup = timing.speedup(0, 1, seed=seed)
        return Latency(threads, batch, original_ms, rewritten_ms, speedup.ratio, speedup.ci95)

    def _sessions(self, threads: int) -> list[ort.InferenceSession]:
        """Load both; they must have the same inputs, and outputs of the same names and types."""
        sides = (self.original, self.rewritten)
        original, rewritten = self.names
        sessions = [runtime.session(side.source, threads=threads) for side in sides]
        for what, (a, b) in (
            ("inputs", [_signature(s.get_inputs(), shapes=True) for s in sessions]),
            ("outputs", [_signature(s.get_outputs(), shapes=False) for s in sessions]),
        ):
            if a != b:
                raise ModelError(
                    f"{rewritten}: its {what} ({b}) are not those of {original} ({a}); compare a "
                    "model with its own rewrite"
                )
        return sessions


def _cut(outputs: Outputs, rows: int, samples: int) -> Outputs:
    """Drop the rows that filled the batch up."""
    if rows == samples:
        return outputs
    return {
        name: value[:samples] if value.ndim and len(value) == rows else value
        for name, value in outputs.items()
    }


def _signature(arguments: Sequence[Any], *, shapes: bool) -> str:
    texts = []
    for argument in arguments:
        sizes = ",".join(str(d) if isinstance(d, int) else "?" for d in argument.shape)
        texts.append(f"{argument.name}: {argument.type}" + (f"[{sizes}]" if shapes else ""))
    return "; ".join(sorted(texts))
