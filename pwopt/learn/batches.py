"""Training batches, each of which depends on the seed and its number alone.

So a run that is taken up again at step n sees what an unbroken one would have seen from there.
"""

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pwopt.calibration.samples import numbered
from pwopt.data import Batch, Samples, fixed_batch
from pwopt.data.samples import Array, batched
from pwopt.errors import DataError

Augment = Callable[[Batch, np.random.Generator], Batch]

WAITING = 1024
"""Samples of a stream that wait to be drawn from at random, …"""

WAITING_BYTES = 256 << 20
"""… or fewer, of so many bytes together."""

AHEAD = 2
"""Batches that each worker has begun before they are asked for."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One feed of the model in torch.

    Attributes:
        feeds: A tensor for each input, of its type and shape.
        labels: int64 [samples], or None.
    """

    feeds: dict[str, Tensor]
    labels: Tensor | None


def tensors(batch: Batch) -> TrainingBatch:
    """Hand a batch to torch; the memory is shared where it may be written to.

    Raises:
        DataError: an input of strings.
    """
    for name, array in batch.feeds.items():
        if array.dtype.kind not in "biufc":
            raise DataError(
                f"input '{name}' takes {array.dtype}, of which torch has no tensors: a model with "
                "such an input cannot be trained"
            )
    labels = None if batch.labels is None else _tensor(batch.labels)
    return TrainingBatch({name: _tensor(array) for name, array in batch.feeds.items()}, labels)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def batches_of(samples: Samples, numbers: Collection[int], size: int) -> Iterator[Batch]:
    """Yield the samples of these rising numbers as they are, at most `size` in a batch.

    Numbers beyond the end of a stream are passed over. The last batch is filled up where the model
    fixes its size.

    Raises:
        DataError: samples that do not fit the model or one another, or none of these numbers.
    """
    size = _fed_at_once(samples, size)
    chosen = numbered(samples, numbers)
    empty = True
    while group := list(islice(chosen, size)):
        yield samples.join(group)
        empty = False
    if empty:
        raise DataError(f"{samples.name}: has too few samples to hold some out; give more")


class Batches:
    """Endless training batches, each of which depends on the seed and its number alone.

    Of a source with random access, each epoch takes all samples in another order, and a batch may
    reach from one epoch into the next. A stream is read in its order, again and again, and each
    sample drawn at random from some that wait; it must give the same samples each time.

    Of several processes each takes its own part of what together is one large batch.

    Attributes:
        size: Samples in a batch of this process: what the model demands, else as asked for.
        count: Samples that are learnt from; None for a stream.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        *,
        seed: int = 0,
        leave_out: Collection[int] = (),
        process: int = 0,
        processes: int = 1,
        workers: int = 2,
        augment: Augment | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            samples: What to learn from.
            size: Samples in a batch of one process, unless the model fixes it.
            seed: Of order and augmentation.
            leave_out: Numbers of samples that are held out, see `held_out`.
            process: The number of this one, from 0.
            processes: How many learn together.
            workers: Threads that read and augment; a stream has just one.
            augment: What makes new samples of old ones.

        Raises:
            DataError: no samples are left.
        """
        self.size = _fed_at_once(samples, size)
        self.count: int | None = None
        self._samples, self._seed, self._leave_out = samples, seed, leave_out
        self._process, self._processes = process, processes
        self._augment, self._workers = augment, workers
        if samples.take is not None and samples.count is not None:
            self._numbers = np.setdiff1d(np.arange(samples.count), list(leave_out))
            self.count = len(self._numbers)
            if not self.count:
                raise _none_left(samples.name)

    def from_step(self, first: int) -> Generator[TrainingBatch, None, None]:
        """Yield the batches from number `first` on, and make some ahead in threads meanwhile.

        Closing the iterator ends the threads. To begin late in a stream, all that comes before is
        read.

        Raises:
            DataError: a sample that cannot be read or does not fit.
        """
        stream = self._stream(first) if self.count is None else None
        workers = self._workers if stream is None else 1  # one alone takes batches in their order

        def make(step: int) -> TrainingBatch:
            batch = self._taken(step) if stream is None else next(stream)
            if self._augment is not None:
                rng = np.random.default_rng((self._seed, self._process + 1, step))
                batch = self._augment(batch, rng)
            return tensors(batch)

        pool = ThreadPoolExecutor(workers, thread_name_prefix="pwopt-batches")
        try:
            steps = count(first)
            ahead = deque(pool.submit(make, step) for step in islice(steps, AHEAD * workers))
            for step in steps:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(make, step))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, step: int) -> int:
        """Tell where this process's part of a step's large batch begins in the order of samples."""
        return (step * self._processes + self._process) * self.size

    def _taken(self, step: int) -> Batch:
        places = np.arange(self._start(step), self._start(step) + self.size)
        epochs, places = np.divmod(places, len(self._numbers))
        order = [
            _order(self._seed, epoch, len(self._numbers))[places[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
        return self._samples.at(self._numbers[np.concatenate(order)].tolist())

    def _stream(self, first: int) -> Iterator[Batch]:
        rng = np.random.default_rng((self._seed, 0))
        samples = _mixed(self._again_and_again(), rng)
        skip = self._start(first)
        for _ in count():
            yield self._samples.join(list(islice(samples, skip, skip + self.size)))
            skip = (self._processes - 1) * self.size

    def _again_and_again(self) -> Iterator[Batch]:
        while True:
            empty = True
            for number, sample in enumerate(self._samples.singles()):
                if number not in self._leave_out:
                    yield sample
                    empty = False
            if empty:
                raise _none_left(self._samples.name)


def _mixed(samples: Iterable[Batch], rng: np.random.Generator) -> Iterator[Batch]:
    """Give back each sample late, drawn from those that wait."""
    waiting: list[Batch] = []
    room = 1
    for sample in samples:
        if not waiting:
            sample_bytes = sum(array.nbytes for array in sample.feeds.values())
            room = max(1, min(WAITING, WAITING_BYTES // max(1, sample_bytes)))
        if len(waiting) < room:
            waiting.append(sample)
            continue
        turn = int(rng.integers(len(waiting)))
        yield waiting[turn]
        waiting[turn] = sample


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, 0, epoch)).permutation(samples)


def _fed_at_once(samples: Samples, size: int) -> int:
    if not batched(samples.inputs):
        return 1
    return fixed_batch(samples.inputs) or size


def _none_left(name: str) -> DataError:
    return DataError(f"{name}: has no samples left to learn from")
