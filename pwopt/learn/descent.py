"""One step down the gradient, by Adam, with what keeps it from doing harm."""

from collections.abc import Callable, Mapping
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

    def step(self, batch: B, rate: float) -> float:
        """Take a step and return the loss before it, the mean over all processes.

        A loss or gradient that is not finite changes nothing and returns NaN.

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
        return loss.item()

    def loss(self, batch: B) -> float:
        """Return the loss of a batch, the mean over all processes; nothing is changed."""
        with torch.no_grad():
            loss = self._of(batch)
        self._processes.average([loss])
        return loss.item()

    def forget(self) -> None:
        """Begin anew, without the moments of the steps so far."""
        self._optimizer.state.clear()

    def state(self) -> State:
        """Return the moments of the steps so far."""
        return self._optimizer.state_dict()

    def load(self, state: State) -> None:
        """Go on with the moments that `state` gave."""
        self._optimizer.load_state_dict(state)

    def _of(self, batch: B) -> Tensor:
        device = self._parameters[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(device)):
            return self._loss(batch)


def has_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies in bfloat16, rather than converting back and forth."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    return tell is not None and any(tell().get(name) for name in ("avx512_bf16", "amx_bf16"))
