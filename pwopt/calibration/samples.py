"""Which samples a model is calibrated on, and which of them it is judged by meanwhile."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pwopt.data import Batch, Samples, fixed_batch
from pwopt.data.samples import Array, batched
from pwopt.errors import DataError
from pwopt.shapes import Input

LIMIT = 1024
"""Samples that are used at most; a quarter of them to judge by."""

BATCH = 16
"""Samples in a batch, where the model takes any number, …"""

BATCH_BYTES = 4 << 20
"""… or fewer, of so many bytes together: of 224×224 pixels, 6. Activations take a multiple."""

HELD_OUT = 4
"""Of so many batches one is held out."""

FEWEST = 8
"""With fewer samples there is nothing to learn from and to judge by."""

LEARNED = 8
"""Of so many samples that are learned from, one is held out, …"""

FEWEST_HELD_OUT = 64
"""… but no fewer than that, short of a quarter of all, …"""

MOST_HELD_OUT = 1024
"""… and no more than that."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batches to calibrate on, and others to judge by. All that is held in memory: the inputs."""

    fit: list[Batch]
    held_out: list[Batch]


def calibration_samples(source: Samples, limit: int = LIMIT) -> Calibration:
    """Choose at most `limit` samples, and hold out every fourth batch of them.

    Where the source knows how many it has, the samples are spread evenly over it: a folder sorted
    by class gives all classes. Otherwise the first ones are taken. They are mixed before they are
    cut into small batches (of what the model demands, then perhaps filled up). The same source
    gives the same batches.

    The inputs of all samples stay in memory: 1,024 images of 224×224 pixels take 617 MB.

    Raises:
        DataError: fewer than 8 samples, or samples that do not fit the model.
    """
    groups = _alike(_chosen(source, limit), source.inputs)
    count = sum(len(group) for group in groups)
    if count < FEWEST:
        raise DataError(
            f"{source.name}: {count} samples are too few to calibrate on; give at least {FEWEST}, "
            "better 256 to 1,024"
        )
    largest = max(sum(a.nbytes for a in group[0].feeds.values()) for group in groups)
    size = fixed_batch(source.inputs) or min(BATCH, BATCH_BYTES // largest)
    size = max(1, min(size, count // HELD_OUT))
    batches = [batch for group in groups for batch in _cut(group, size, source)]
    return Calibration(
        fit=[batch for turn, batch in enumerate(batches, 1) if turn % HELD_OUT],
        held_out=batches[HELD_OUT - 1 :: HELD_OUT],
    )


def held_out(samples: Samples, seed: int = 0) -> Collection[int]:
    """Choose the numbers of the samples that are not learned from, but judged by.

    Of a source with random access they are spread evenly over it, so that a folder sorted by class
    gives all classes. Of a stream, whose length nobody knows, it is every eighth one at its start.

    Raises:
        DataError: fewer than 8 samples.
    """
    if samples.take is None or samples.count is None:
        return range(LEARNED - 1, LEARNED * MOST_HELD_OUT, LEARNED)
    if samples.count < FEWEST:
        raise DataError(
            f"{samples.name}: {samples.count} samples are too few to learn from; give at least "
            f"{FEWEST}, better thousands"
        )
    wanted = min(max(samples.count // LEARNED, FEWEST_HELD_OUT), samples.count // 4, MOST_HELD_OUT)
    numbers: list[int] = spread(samples.count, wanted, np.random.default_rng(seed)).tolist()
    return numbers


def spread(total: int, count: int, rng: np.random.Generator) -> Array:
    """Draw `count` of the numbers below `total`, one out of each of `count` equal stretches.

    Even like every n-th, but blind to what repeats every n (the columns of an image, say). They
    rise; all of them are given where `count` is not less than `total`.
    """
    if count >= total:
        return np.arange(total)
    edges = np.arange(count + 1) * total // count
    return rng.integers(edges[:-1], edges[1:])


def numbered(source: Samples, numbers: Collection[int]) -> Iterator[Batch]:
    """Yield the samples of these rising numbers, one by one.

    A source that cannot `take` is read up to the last one; numbers beyond its end are passed over.
    """
    if source.take is not None:
        return (source.at([number]) for number in numbers)
    first = islice(source.singles(), max(numbers, default=-1) + 1)
    return (sample for number, sample in enumerate(first) if number in numbers)


def real(array: Array, rows: int, samples: int) -> Array:
    """Leave away what belongs to the last `rows` − `samples` rows of a feed, which only fill it up.

    The first axis must count rows, or a number of positions for each row, one row after the other.
    Of any other array nothing is left away.
    """
    if rows == samples or not array.ndim or len(array) % rows:
        return array
    return array[: len(array) // rows * samples]


def _chosen(source: Samples, limit: int) -> Iterator[Batch]:
    """Yield the samples that are chosen, one by one."""
    if source.count is None:
        return islice(source.singles(), limit)
    return numbered(source, spread(source.count, limit, np.random.default_rng(0)).tolist())


def _alike(samples: Iterable[Batch], inputs: Sequence[Input]) -> list[list[Batch]]:
    """Group the samples that can share a batch: rows of the same size, other inputs being equal."""
    counted = batched(inputs)
    groups: list[list[Batch]] = []
    for sample in samples:
        group = next((g for g in groups if counted and _can_join(g[0], sample, counted)), None)
        if group is None:
            groups.append([sample])
        else:
            group.append(sample)
    return groups


def _can_join(one: Batch, other: Batch, counted: Sequence[str]) -> bool:
    return (one.labels is None) == (other.labels is None) and all(
        a.shape[1:] == other.feeds[name].shape[1:]
        if name in counted
        else np.array_equal(a, other.feeds[name])
        for name, a in one.feeds.items()
    )


def _cut(group: list[Batch], size: int, source: Samples) -> Iterator[Batch]:
    """Mix the samples and cut them into batches, filled up where the model fixes the size.

    The list is empty afterwards, so that each sample is in memory once.
    """
    np.random.default_rng(0).shuffle(group)
    while group:
        batch = source.join(group[-size:])
        del group[-size:]
        yield batch
