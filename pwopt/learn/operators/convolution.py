"""Conv and ConvTranspose, over one, two or three axes."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators.node import Node
from pwopt.learn.operators.windows import pad, windows

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ONNX Conv."""
    w = windows(node, x.shape[2:], weight.shape[2:])
    padding = list(w.before)
    if not w.is_symmetric:
        x, padding = pad(x, w.before, w.after), [0] * len(padding)
    layer = _CONV[len(padding)]
    return layer(x, weight, bias, w.strides, padding, w.dilations, node.get("group", 1))


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ONNX ConvTranspose: the whole result, cropped (or extended) to what is asked for."""
    rank = weight.dim() - 2
    strides = node.get("strides", [1] * rank)
    dilations = node.get("dilations", [1] * rank)
    group = node.get("group", 1)
    whole = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations)
    before, after = _cropped(node, x.shape[2:], whole.shape[2:], strides)
    y = pad(whole, [-amount for amount in before], [-amount for amount in after])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _cropped(
    node: Node, size: Sequence[int], whole: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return how much of the whole result is cut off at each end; negative: added."""
    rank = len(whole)
    extra = node.get("output_padding", [0] * rank)
    auto_pad = node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [length * s for length, s in zip(size, strides, strict=True)]
    if wanted is None:
        pads = node.get("pads", [0] * 2 * rank) if auto_pad == "NOTSET" else [0] * 2 * rank
        return pads[:rank], [p - e for p, e in zip(pads[rank:], extra, strict=True)]
    totals = [w + e - o for w, e, o in zip(whole, extra, wanted, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    return before, [a - e for a, e in zip(after, extra, strict=True)]
