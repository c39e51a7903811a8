"""Operators that move, join, cut or make tensors."""

import math

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from pwopt.learn.operators.node import DTYPES, Node, ints, tensor, together, widened
from pwopt.learn.operators.windows import pad as pad_with_constant


def concat(node: Node, *inputs: Tensor) -> Tensor:
    """ONNX Concat."""
    return torch.cat(list(together(*inputs)), node.get("axis", 1))


def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """ONNX Split: by sizes (an attribute before opset 13), or into equal parts."""
    axis = node.get("axis", 0)
    given = node.get("split") if sizes is None else ints(sizes)
    if given is not None:
        return torch.split(x, given, axis)
    length, parts = x.shape[axis], node.outputs
    part = -(-length // parts)
    return torch.split(x, [part] * (parts - 1) + [length - part * (parts - 1)], axis)


def slice_(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """ONNX Slice; before opset 10 all but `steps` are attributes."""
    first = node.get("starts") if starts is None else ints(starts)
    last = node.get("ends") if ends is None else ints(ends)
    along = node.get("axes", list(range(len(first)))) if axes is None else ints(axes)
    by = [1] * len(first) if steps is None else ints(steps)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        length = x.shape[axis]
        cut = range(*slice(start, end, step).indices(length))
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(cut.start, cut.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(cut, dtype=torch.int64, device=x.device))
    return x


def pad(
    node: Node,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """ONNX Pad; before opset 11, pads and value are attributes."""
    amounts = node.get("pads") if pads is None else ints(pads)
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in ints(axes)]
    before, after = [0] * x.dim(), [0] * x.dim()
    for axis, first, last in zip(along, amounts, amounts[len(along) :], strict=False):
        before[axis], after[axis] = first, last
    mode = node.get("mode", "constant")
    if mode == "constant":
        fill = node.get("value", 0.0) if value is None else value.item()
        return pad_with_constant(x, before, after, fill)
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        if first or last:
            kept = np.arange(x.shape[axis])[max(-first, 0) : x.shape[axis] - max(-last, 0)]
            index = np.pad(kept, (max(first, 0), max(last, 0)), mode=mode)
            x = x.index_select(axis, tensor(index).to(x.device))
    return x


def reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """ONNX Reshape: a 0 keeps the size that is there, unless `allowzero`."""
    sizes = ints(shape)
    if not node.get("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(node: Node, x: Tensor) -> Tensor:
    """ONNX Flatten: a matrix."""
    axis = node.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(node: Node, x: Tensor) -> Tensor:
    """ONNX Transpose."""
    return x.permute(node.get("perm", list(reversed(range(x.dim())))))


def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """ONNX Squeeze; before opset 13 the axes are an attribute."""
    given = node.get("axes") if axes is None else ints(axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """ONNX Unsqueeze; before opset 13 the axes are an attribute."""
    given = node.get("axes") if axes is None else ints(axes)
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """ONNX Expand: both broadcast to each other."""
    return x.expand(np.broadcast_shapes(x.shape, tuple(ints(shape))))


def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    """ONNX Tile."""
    return x.repeat(ints(repeats))


def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """ONNX Gather."""
    axis = node.get("axis", 0) % x.dim()
    index = indices.to(x.device, torch.int64) % x.shape[axis]
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


def gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """ONNX GatherElements."""
    axis = node.get("axis", 0)
    return x.gather(axis, indices.to(x.device, torch.int64) % x.shape[axis])


def shape(node: Node, x: Tensor) -> Tensor:
    """ONNX Shape; on the CPU, where sizes are read."""
    sizes = list(x.shape)[slice(node.get("start", 0), node.get("end"))]
    return torch.tensor(sizes, dtype=torch.int64)


def size(node: Node, x: Tensor) -> Tensor:
    """ONNX Size; on the CPU, where sizes are read."""
    return torch.tensor(x.numel())


def constant(node: Node) -> Tensor:
    """ONNX Constant: a tensor, or numbers."""
    value: Tensor | None = node.get("value")
    if value is not None:
        return value
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        for attribute in (name, f"{name}s"):
            if attribute in node.attributes:
                return torch.tensor(node.get(attribute), dtype=dtype)
    raise AssertionError(node)  # see `constant_limits`


def constant_limits(node: Node) -> str | None:
    """Name what a Constant may not hold."""
    known = ("value", "value_float", "value_floats", "value_int", "value_ints")
    return None if any(name in node.attributes for name in known) else "of text or sparse"


def constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    """ONNX ConstantOfShape."""
    value = node.get("value")
    value = torch.zeros(1) if value is None else value
    return value.reshape(()).expand(ints(shape))


def identity(node: Node, x: Tensor) -> Tensor:
    """ONNX Identity."""
    return x


def cast(node: Node, x: Tensor) -> Tensor:
    """ONNX Cast; to half precision: float32, in which everything is computed."""
    return widened(x.to(DTYPES[_target(node)]))


def cast_limits(node: Node) -> str | None:
    """Name a type that torch has not."""
    return None if _target(node) in DTYPES else f"to {_target(node)}"


def _target(node: Node) -> str:
    return helper.tensor_dtype_to_np_dtype(node.get("to")).name


def range_(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """ONNX Range."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """ONNX DepthToSpace."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        blocks = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """ONNX SpaceToDepth."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    order = (0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return blocks.reshape(n, c * b**2, h // b, w // b)


def trilu(node: Node, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    """ONNX Trilu."""
    k = 0 if diagonal is None else int(diagonal.item())
    return x.triu(k) if node.get("upper", 1) else x.tril(k)
