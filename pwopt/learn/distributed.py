"""Several processes that learn as one, started by torch's own launcher.

`torchrun --nproc-per-node 2 -m pwopt learn …` sets RANK, WORLD_SIZE and LOCAL_RANK. Each process
sees its own batches; gradients are averaged by hand, which is all that is needed here: it asks
nothing of how the network is called, nor that every parameter is used.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pwopt.errors import LearnError
from pwopt.learn.wishes import Device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Those that learn together, and which of them this one is.

    Attributes:
        rank: 0 is the one that decides, writes and narrates.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this is the process that decides."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return the first process's value, in all of them; the others' are ignored."""
        if self.count == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # None was replaced

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.count == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes: one message for all of them."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


ALONE = Processes()


def choose_device(name: Device = "auto") -> torch.device:
    """Return the device to learn on: with several GPUs in a machine, this process's own.

    Raises:
        LearnError: a GPU is asked for and there is none, or fewer than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LearnError("no GPU that torch can use: choose --device cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise LearnError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start as "
            "many processes as there are GPUs"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone without it.

    Raises:
        LearnError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise LearnError(f"the other processes cannot be joined ({reason}); use torchrun") from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
