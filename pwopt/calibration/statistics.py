"""Moments of what layers read and write, gathered in one streaming pass over the samples.

The model runs in onnxruntime with these tensors as its outputs. All of them exist for one run at a
time, so runs are cut to `TAPS` bytes: fewer samples where the model takes any number, else fewer
layers at once. Of a convolution's positions a sample is taken, see `POSITIONS`; each moment is a
float64 matrix of channels × channels. So memory is that of the model in onnxruntime, of `TAPS`
about twice, and of the moments: 8·C² bytes for C channels.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import IO

import numpy as np
from onnx import ValueInfoProto

from pwopt import cache, external, runtime
from pwopt.calibration.samples import real, spread
from pwopt.data import Batch, fixed_batch
from pwopt.data.samples import batched, fed_rows
from pwopt.errors import ModelError
from pwopt.linear import Linear
from pwopt.lowrank.moments import Moments
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.roundtrip import with_data
from pwopt.runtime import Array
from pwopt.shapes import Input, Type, bind, infer_types, inputs

TAPS = 512 << 20
"""Bytes of tapped tensors in one run, unless one sample or layer alone has more."""

POSITIONS = 128
"""Positions of a map that are taken from each sample, spread evenly: 2,048 from a batch of 16 …"""

ROWS_PER_CHANNEL = 20
"""… and more where all samples together would give fewer than so many for each channel."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Moments of the channels that a layer reads and writes, the latter with its bias.

    `inputs` is None for pointwise layers: for them the output side is best, which takes `outputs`
    alone, and a head may read 25,088 channels.
    """

    inputs: Moments | None
    outputs: Moments


def gather(
    model: Model,
    layers: Sequence[Linear],
    batches: Sequence[Batch],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Gather statistics of layers on samples, or recall those of the same ones (`pwopt.cache`).

    Args:
        model: The network; stays as it is.
        layers: Layers of its graph.
        batches: Samples; rows that only fill up a batch do not count.
        threads: Threads within one operator.
        progress: Told how far it is.

    Returns:
        Layer's output tensor (`where`) → statistics.

    Raises:
        ModelError: onnxruntime cannot run the model, or an activation is NaN or infinite.
    """
    taps = _taps(layers)
    if not taps:
        return {}
    name = f"statistics/{_key(model, taps, batches)}.npz"
    moments = cache.load(name, lambda file: _read(file, taps))
    if moments is None:
        moments = _measure(model, taps, batches, threads, progress or (lambda *_: None))
        cache.store(name, lambda file: _write(file, moments))
    return {
        layer.where: Statistics(
            None if layer.is_pointwise else moments[_input(layer)], moments[_output(layer)]
        )
        for layer in layers
    }


@dataclass(frozen=True, slots=True)
class _Tap:
    """A tensor whose channels lie along `axis`, and what messages say of it."""

    tensor: str
    axis: int
    what: str = field(compare=False)


def _output(layer: Linear) -> _Tap:
    return _Tap(layer.where, layer.channel_axis, f"layer '{layer.name}' writes")


def _input(layer: Linear) -> _Tap:
    tensor = layer.node.inputs[0].name
    return _Tap(tensor, layer.channel_axis, f"layer '{layer.name}' reads")


def _taps(layers: Sequence[Linear]) -> list[_Tap]:
    """List what is tapped, each tensor once."""
    taps = dict.fromkeys(_output(layer) for layer in layers)
    taps |= dict.fromkeys(_input(layer) for layer in layers if not layer.is_pointwise)
    return [*taps]


def _measure(
    model: Model, taps: Sequence[_Tap], batches: Sequence[Batch], threads: int, report: Progress
) -> dict[_Tap, Moments]:
    declared = inputs(model)
    size, groups = _runs(model, taps, batches)
    samples, done = sum(batch.samples for batch in batches), 0
    gathered = {tap: Gathering(samples) for tap in taps}
    for group in groups:
        session = runtime.session(_tapped(model, group), threads=threads)
        for batch in batches:
            for part in _parts(batch, declared, size):
                values = runtime.run(session, part.feeds, name=model.name)
                for tap in group:
                    array = real(values[tap.tensor], fed_rows(part.feeds, declared), part.samples)
                    if not np.isfinite(array).all():
                        raise ModelError(
                            f"{model.name}: {tap.what} NaN or infinite values on the calibration "
                            "samples; mend the model or the samples' preprocessing"
                        )
                    gathered[tap].add(np.moveaxis(array, tap.axis, -1), part.samples)
            done += batch.samples
            report("statistics", done // len(groups), samples)
    return {tap: gathering.moments() for tap, gathering in gathered.items()}


def _runs(
    model: Model, taps: Sequence[_Tap], batches: Sequence[Batch]
) -> tuple[int, list[list[_Tap]]]:
    """Return how many rows, and which taps, one run may have to stay within `TAPS` bytes.

    Tensors of unknown shape count nothing.
    """
    declared = inputs(model)
    largest = max(batches, key=lambda batch: sum(a.nbytes for a in batch.feeds.values()))
    rows = fed_rows(largest.feeds, declared)
    shapes = {name: array.shape for name, array in largest.feeds.items()}
    types = infer_types(model, bind(model, shapes))
    sizes = {tap: _bytes(types.get(tap.tensor)) for tap in taps}
    if fixed_batch(declared) is None:
        size = min(rows, max(1, TAPS * rows // max(sum(sizes.values()), 1)))
    else:
        size = rows
    groups: list[list[_Tap]] = [[]]
    room = TAPS
    for tap in taps:
        room -= sizes[tap] * size // rows
        if room < 0 and groups[-1]:
            groups.append([])
            room = TAPS - sizes[tap] * size // rows
        groups[-1].append(tap)
    return size, groups


def _bytes(kind: Type | None) -> int:
    if kind is None or kind.dtype is None:
        return 0
    return prod(size or 0 for size in kind.shape) * kind.dtype.itemsize


def _tapped(model: Model, taps: Sequence[_Tap]) -> Model:
    """Make a model that has the taps as its only outputs."""
    proto = model.to_proto()
    del proto.graph.output[:]
    proto.graph.output.extend(ValueInfoProto(name=n) for n in dict.fromkeys(t.tensor for t in taps))
    return model.beside(proto)


def _parts(batch: Batch, declared: Sequence[Input], size: int) -> Iterator[Batch]:
    """Cut a batch into parts of `size` rows."""
    if size >= fed_rows(batch.feeds, declared):
        yield batch
        return
    counted = batched(declared)
    for start in range(0, batch.samples, size):
        rows = slice(start, start + size)
        feeds = {name: a[rows] if name in counted else a for name, a in batch.feeds.items()}
        yield Batch(feeds, None, min(size, batch.samples - start))


class Gathering:
    """Moments of one tensor, of positions sampled from each run."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._rng = np.random.default_rng(0)
        self._waiting: list[Array] = []
        self._moments: Moments | None = None

    def add(self, array: Array, samples: int) -> None:
        """Take positions of an array (…, C) that belongs to so many samples."""
        *shape, channels = array.shape
        wanted = samples * max(POSITIONS, ceil(ROWS_PER_CHANNEL * channels / self._samples))
        chosen = spread(prod(shape), wanted, self._rng)
        self._waiting.append(array[np.unravel_index(chosen, shape)])
        # Merging costs as much as the moments of so many rows.
        if sum(map(len, self._waiting)) >= channels:
            self._merge()

    def moments(self) -> Moments:
        """Return the moments of all that was added."""
        self._merge()
        assert self._moments is not None  # there are batches
        return self._moments

    def _merge(self) -> None:
        if self._waiting:
            new = Moments.of(np.concatenate(self._waiting))
            self._moments = new if self._moments is None else self._moments + new
            self._waiting.clear()


# -- cache ------------------------------------------------------------------------------------


def _key(model: Model, taps: Sequence[_Tap], batches: Sequence[Batch]) -> str:
    """Hash all that the moments depend on."""
    digest = hashlib.blake2b(digest_size=16)
    wanted = [(tap.tensor, tap.axis) for tap in taps]
    constants = (_SCHEMA, TAPS, POSITIONS, ROWS_PER_CHANNEL)
    digest.update(repr((constants, wanted)).encode())
    for part in _content(model):
        digest.update(part)
    for batch in batches:
        for name, array in sorted(batch.feeds.items()):
            digest.update(repr((name, array.dtype, array.shape, batch.samples)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _content(model: Model) -> Iterator[bytes]:
    """Yield the bytes of a model, weight by weight, those in other files too."""
    proto = model.to_proto()
    for tensor in (*proto.graph.initializer, *external.tensors(proto)):
        yield with_data(tensor, model.folder).SerializeToString(deterministic=True)
    del proto.graph.initializer[:]
    yield proto.SerializeToString(deterministic=True)


def _read(stream: IO[bytes], taps: Sequence[_Tap]) -> dict[_Tap, Moments]:
    with np.load(stream) as file:
        return {
            tap: Moments(int(file[f"count{i}"]), file[f"mean{i}"], file[f"scatter{i}"])
            for i, tap in enumerate(taps)
        }


def _write(file: IO[bytes], moments: Mapping[_Tap, Moments]) -> None:
    arrays: dict[str, Array] = {}
    for i, values in enumerate(moments.values()):
        arrays[f"count{i}"] = np.array(values.count)
        arrays[f"mean{i}"] = values.mean
        arrays[f"scatter{i}"] = values.scatter
    np.savez(file, **arrays)  # type: ignore[arg-type]  # names that are none of its options
