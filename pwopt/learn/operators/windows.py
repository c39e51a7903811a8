"""Windows that slide over a map: how large, how far apart, and what is padded around it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators.node import Node


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a Conv or a pool on a map of given size; one entry an axis."""

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]

    @property
    def extents(self) -> list[int]:
        """Pixels from the first to the last that a window sees."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def is_symmetric(self) -> bool:
        """Whether as much is padded before as after, as torch's own layers pad."""
        return list(self.before) == list(self.after) and min(self.before, default=0) >= 0


def limits(node: Node) -> str | None:
    """Name automatic padding of which runtimes make different things."""
    if not node.get("auto_pad", "NOTSET").startswith("SAME"):
        return None
    if set(node.get("dilations", ())) - {1}:
        return f"with auto_pad={node.get('auto_pad')} and dilations"
    if max(node.get("strides", ()), default=1) > 3:
        return f"with auto_pad={node.get('auto_pad')} and strides of more than 3"
    return None


def windows(node: Node, size: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Return the windows of `node` on a map of `size` (ONNX operators, Conv: auto_pad and pads)."""
    rank = len(kernel)
    strides = node.get("strides", [1] * rank)
    dilations = node.get("dilations", [1] * rank)
    auto_pad = node.get("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        pads = node.get("pads", [0] * 2 * rank)
        return Windows(kernel, strides, dilations, pads[:rank], pads[rank:])
    if auto_pad == "VALID":
        return Windows(kernel, strides, dilations, [0] * rank, [0] * rank)
    totals = [
        max((-(-length // s) - 1) * s + (k - 1) * d + 1 - length, 0)
        for length, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    return Windows(kernel, strides, dilations, before, after)


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0) -> Tensor:
    """Pad the last axes of `x`, one entry an axis; negative entries crop."""
    if not any(before) and not any(after):
        return x
    pairs = zip(reversed(before), reversed(after), strict=True)
    return F.pad(x, [amount for pair in pairs for amount in pair], value=value)
