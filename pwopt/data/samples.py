"""Feeds made to fit a model's inputs: what every source of samples shares."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.errors import DataError
from pwopt.shapes import Input

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Labels = npt.NDArray[np.int64]
Draw = Callable[[], Iterator[tuple[Feeds, Any]]]
Take = Callable[[Sequence[int]], tuple[Feeds, Any]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One feed of the model.

    Attributes:
        feeds: An array for each input, of its type and shape.
        labels: int64 [samples], or None.
        samples: How many rows are samples. A model of fixed batch size gets a last batch filled
            up with repeated rows, which are not counted here.
    """

    feeds: dict[str, Array]
    labels: Labels | None
    samples: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Batches for one model; iterating again starts anew. Only one batch exists at a time.

    Attributes:
        name: What messages call the source.
        inputs: Those of the model.
        draw: Starts anew, and yields feeds as they come, with labels or None.
        count: Samples in it, None where only iterating tells.
        assumed: What was assumed for the axes that the model leaves open, empty if nothing.
        take: Gives the samples of these numbers, from 0 to `count` - 1, with labels or None; it
            may be called from several threads at once. None where samples come in turn only.
    """

    name: str
    inputs: Sequence[Input]
    draw: Draw
    count: int | None = None
    assumed: str = ""
    take: Take | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches that fit the model.

        Raises:
            DataError: a sample that does not: wrong names, shape or type, NaN or infinity.
        """
        empty = True
        for feeds, labels in self.draw():
            yield self._filled(self._fit(feeds, labels))
            empty = False
        if empty:
            raise DataError(f"{self.name}: has no samples")

    def at(self, numbers: Sequence[int]) -> Batch:
        """Give the samples of these numbers, in this order; only of a source that can `take`.

        The batch is not filled up.

        Raises:
            DataError: a sample that does not fit the model.
        """
        assert self.take is not None
        return self._fit(*self.take(numbers))

    def singles(self) -> Iterator[Batch]:
        """Yield the samples one by one, without the rows that only fill a batch up.

        Raises:
            DataError: a sample that does not fit the model.
        """
        counted = batched(self.inputs)
        for batch in self:
            for row in range(batch.samples):
                one = slice(row, row + 1)
                feeds = {n: a[one].copy() if n in counted else a for n, a in batch.feeds.items()}
                yield Batch(feeds, None if batch.labels is None else batch.labels[one], 1)

    def without(self, numbers: Collection[int]) -> "Samples":
        """Return the samples but those of these numbers; the others are numbered anew."""

        def draw() -> Iterator[tuple[Feeds, Any]]:
            for number, sample in enumerate(self.singles()):
                if number not in numbers:
                    yield sample.feeds, sample.labels

        take = self.take
        if take is None or self.count is None:
            return replace(self, draw=draw, count=None)
        kept = np.setdiff1d(np.arange(self.count), list(numbers))

        def take_kept(wanted: Sequence[int]) -> tuple[Feeds, Any]:
            return take(kept[wanted].tolist())

        return replace(self, draw=draw, count=len(kept), take=take_kept)

    def join(self, parts: Sequence[Batch]) -> Batch:
        """Put batches together that are not filled up; the result is, where the model demands it.

        Labels are left out if some lack them.

        Raises:
            DataError: their samples differ in shape, or in an input that all of a batch share.
        """
        counted, first = batched(self.inputs), parts[0]
        for name, array in first.feeds.items():
            for other in (part.feeds[name] for part in parts[1:]):
                if name in counted and other.shape[1:] != array.shape[1:]:
                    differ = f"shape: '{name}' is {_text(array.shape)} and {_text(other.shape)}"
                elif name not in counted and not np.array_equal(other, array):
                    differ = f"'{name}', which all of a batch share"
                else:
                    continue
                raise DataError(f"{self.name}: samples of one batch differ in {differ}")
        feeds = {
            name: np.concatenate([p.feeds[name] for p in parts]) if name in counted else array
            for name, array in first.feeds.items()
        }
        labels = [part.labels for part in parts if part.labels is not None]
        joined = Batch(
            feeds,
            np.concatenate(labels) if len(labels) == len(parts) else None,
            sum(part.samples for part in parts),
        )
        return self._filled(joined)

    def resize(self, feeds: Feeds, size: int) -> dict[str, Array]:
        """Make a feed of `size` rows out of another: its first ones, repeated where too few."""
        counted = batched(self.inputs)
        return {
            name: array[np.arange(size) % len(array)] if name in counted else array
            for name, array in feeds.items()
        }

    def _fit(self, feeds: Feeds, labels: Any) -> Batch:
        declared = {i.name for i in self.inputs}
        if feeds.keys() != declared:
            raise DataError(
                f"{self.name}: gives {quoted(feeds)}, but the model takes {quoted(declared)}"
            )
        fitted = {i.name: _cast(feeds[i.name], i, self.name) for i in self.inputs}
        for i in self.inputs:
            check_shape(fitted[i.name].shape, i, self.inputs, self.name)
        rows = count_rows(fitted, self.inputs, self.name)
        size = fixed_batch(self.inputs) or rows
        if rows > size:
            raise DataError(f"{self.name}: gives {rows} samples at once; the model takes {size}")
        if labels is not None:
            labels = class_numbers(labels, rows, self.name)
        return Batch(fitted, labels, rows)

    def _filled(self, batch: Batch) -> Batch:
        """Fill up a batch that has fewer samples than the model demands."""
        size = fixed_batch(self.inputs) or batch.samples
        if batch.samples >= size:
            return batch
        return replace(batch, feeds=self.resize(batch.feeds, size))


def in_turn(take: Take, count: int, size: int) -> Draw:
    """Return how to draw all samples in the order of their numbers, `size` at a time."""

    def draw() -> Iterator[tuple[Feeds, Any]]:
        for start in range(0, count, size):
            yield take(range(start, min(start + size, count)))

    return draw


def batched(inputs: Sequence[Input]) -> list[str]:
    """List inputs whose first axis counts samples: open ones, else those as long as the first."""
    ranked = [i for i in inputs if i.shape]
    opened = [i.name for i in ranked if not isinstance(i.shape[0], int)]
    return opened or [i.name for i in ranked if i.shape[0] == ranked[0].shape[0]]


def fixed_batch(inputs: Sequence[Input]) -> int | None:
    """Return the batch size that a model with these inputs demands; None if any will do."""
    sizes = [i.shape[0] for i in inputs if i.name in batched(inputs)]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def fed_rows(feeds: Feeds, inputs: Sequence[Input]) -> int:
    """Count the rows of a feed, those that fill it up too; 1 if no input has a batch axis."""
    return next((len(feeds[name]) for name in batched(inputs)), 1)


def check_shape(
    shape: Sequence[int], declared: Input, inputs: Sequence[Input], source: str
) -> None:
    """Check the shape of the array for one of `inputs`, its axis that counts samples aside.

    Raises:
        DataError: it does not fit.
    """
    counts = declared.name in batched(inputs)
    expected = ("N", *declared.shape[1:]) if counts else declared.shape
    if not fits(shape, expected):
        raise misfit(source, declared.name, shape, _text(expected))


def count_rows(arrays: Feeds, inputs: Sequence[Input], source: str) -> int:
    """Count the samples.

    Raises:
        DataError: none, or not equally many for all inputs.
    """
    counts = {name: len(arrays[name]) for name in batched(inputs)}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} of '{name}'" for name, count in counts.items())
        raise DataError(f"{source}: samples differ in number: {text}")
    rows = next(iter(counts.values()), 1)
    if rows == 0:
        raise DataError(f"{source}: has no samples")
    return rows


def class_numbers(labels: Any, samples: int, source: str) -> Labels:
    """Read labels as int64 [samples].

    Raises:
        DataError: not integers, not one for each sample, or beyond int64.
    """
    numbers = _array(labels, "labels", source)
    if numbers.dtype.kind not in "iu" or numbers.ndim == 0 or numbers.size != len(numbers):
        raise DataError(
            f"{source}: labels are {numbers.dtype} {list(numbers.shape)}; wanted are integers, one "
            "class number for each sample"
        )
    if len(numbers) != samples:
        raise DataError(f"{source}: {len(numbers)} labels for {samples} samples")
    if numbers.size and numbers.max() > np.iinfo(np.int64).max:
        raise DataError(f"{source}: label {numbers.max()} is too large for a class number")
    return numbers.reshape(-1).astype(np.int64)


def fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    """Tell whether a shape is as expected; open axes take any size."""
    return len(shape) == len(expected) and all(
        size == want or not isinstance(want, int)
        for size, want in zip(shape, expected, strict=True)
    )


def misfit(source: str, name: str, shape: Sequence[int], expected: str) -> DataError:
    """Make the error for an array that does not fit its input."""
    return DataError(f"{source}: '{name}' has shape {_text(shape)}, but the model takes {expected}")


def quoted(names: Iterable[object]) -> str:
    """Write names as messages give them."""
    return ", ".join(f"'{name}'" for name in sorted(map(str, names))) or "nothing"


def _cast(value: Any, declared: Input, source: str) -> Array:
    """Cast an array to the input's type, if that loses no more than precision.

    Raises:
        DataError: no array, another kind of numbers, NaN, infinity, or a value beyond the type.
    """
    if declared.dtype.isbuiltin != 1:  # bfloat16 and others that numpy itself does not know
        raise DataError(
            f"{source}: input '{declared.name}' takes {declared.dtype}, which onnxruntime does not "
            "take from Python; export the model with an input of another type"
        )
    array = _array(value, f"'{declared.name}'", source)
    if not np.can_cast(array.dtype, declared.dtype, "same_kind"):
        raise DataError(
            f"{source}: '{declared.name}' is {array.dtype}, but the model takes {declared.dtype}"
        )
    with np.errstate(over="ignore"):
        result = np.asarray(array, dtype=declared.dtype, order="C")
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        raise DataError(
            f"{source}: '{declared.name}' holds NaN or infinity as {declared.dtype}; mend the "
            "samples or their preprocessing"
        )
    if result.dtype.kind in "iu" and (result != array).any():
        raise DataError(
            f"{source}: '{declared.name}' holds numbers beyond {declared.dtype}; mend the samples"
        )
    return result


def _array(value: Any, what: str, source: str) -> Array:
    try:
        array: Array = np.asarray(value)
    except Exception as error:  # rows of unequal length, or whatever the value's own code raises
        raise DataError(
            f"{source}: {what} cannot be made an array of; give a numpy array"
        ) from error
    return array


def _text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
