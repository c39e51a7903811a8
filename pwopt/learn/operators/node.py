"""What an operator's function gets to know beside its inputs: attributes, opset, outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
    )
}
"""Element types by numpy's name. Half precision is read and written, but not computed in."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the graph, without its tensors.

    Attributes:
        op: Operator of the standard domain.
        name: What messages call it.
        opset: Version of the standard operators.
        attributes: As the node has them; tensors are torch's, text is str.
        outputs: How many outputs are asked for.
    """

    op: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute, or the default of its operator."""
        return self.attributes.get(attribute, default)


def tensor(values: npt.NDArray[Any]) -> Tensor:
    """Return a copy of values as they are computed with: half precision becomes float32."""
    is_half = values.dtype.name in ("float16", "bfloat16")
    return torch.from_numpy(np.array(values, np.float32 if is_half else None, order="C"))


def widened(x: Tensor) -> Tensor:
    """Return half precision as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ints(x: Tensor) -> list[int]:
    """Return sizes, axes and the like, which were computed as a tensor."""
    return [int(value) for value in x.reshape(-1).tolist()]


def together(*tensors: Tensor) -> Sequence[Tensor]:
    """Bring tensors to one device: what is computed from shapes lies on the CPU, data need not."""
    device = tensors[0].device
    if all(x.device == device for x in tensors):
        return tensors
    device = next(x.device for x in tensors if x.device.type != "cpu")
    return [x.to(device) for x in tensors]
