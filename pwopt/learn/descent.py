"""One step down the gradient, by Adam, with what keeps it from doing harm.

A student that was fitted to samples is near a minimum, where gradients are mostly noise, and Adam
takes steps of one size all the same. What is kept is therefore the running average of the weights
over the last steps, in which that noise cancels out (Polyak & Juditsky 1992).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import nan
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from pwopt.errors import LearnError
from pwopt.learn.checkpoint import State
from pwopt.learn.distributed import Processes

B = TypeVar("B")
Parameters = Mapping[str, Parameter]

CLIP = 1.0
"""The largest norm of the gradient."""


class Descent(Generic[B]):
    """Changes parameters so that the loss of a batch falls.

    Where the device computes in bfloat16, the loss is computed in mixed precision
    (`torch.autocast`). That type has float32's range, so the loss needs no scaling.
    """

    def __init__(
        self,
        parameters: Parameters,
        loss: Callable[[B], Tensor],
        processes: Processes,
    ) -> None:
        self._parameters = list(parameters.values())
        self._loss, self._processes = loss, processes
        self._optimizer = torch.optim.Adam(self._parameters, lr=0.0)
        self._averages = _copies(self._parameters)

    def step(self, batch: B, rate: float, horizon: int = 1) -> float:
        """Take a step and return the loss before it, the mean over all processes.

        A loss or gradient that is not finite changes nothing and returns NaN.

        Args:
            batch: What to take the loss of.
            rate: Of Adam.
            horizon: Over about how many steps the average of the parameters runs.

        Raises:
            LearnError: the GPU's memory is full, or the loss depends on no parameter.
        """
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        try:
            loss = self._of(batch)
            if not loss.requires_grad:
                raise LearnError("the loss depends on nothing that is to be learned")
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise LearnError("the GPU's memory is full: give a smaller batch") from None
        loss = loss.detach()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._processes.average([loss, *gradients])
        norm = clip_grad_norm_(self._parameters, CLIP)
        if not torch.isfinite(loss + norm):
            return nan
        self._optimizer.step()
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter.detach(), 1 / horizon)
        return loss.item()

    def loss(self, batch: B) -> float:
        """Return the loss of a batch, the mean over all processes; nothing is changed."""
        with torch.no_grad():
            loss = self._of(batch)
        self._processes.average([loss])
        return loss.item()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages in the place of the parameters meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def forget(self) -> None:
        """Begin anew from the parameters as they are, without what is left of the steps so far."""
        self._optimizer.state.clear()
        self._averages = _copies(self._parameters)

    def state(self) -> State:
        """Return what is left of the steps so far: moments and averages."""
        return {"optimizer": self._optimizer.state_dict(), "averages": self._averages}

    def load(self, state: State) -> None:
        """Go on with what `state` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)

    def _of(self, batch: B) -> Tensor:
        device = self._parameters[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(device)):
            return self._loss(batch)


def _copies(parameters: Iterable[Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def has_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies in bfloat16, rather than converting back and forth."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    return tell is not None and any(tell().get(name) for name in ("avx512_bf16", "amx_bf16"))
