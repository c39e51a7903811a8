"""Resize and Upsample: nearest and linear, one axis after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pwopt.learn.operators.node import Node, ints, tensor

_Coordinates = npt.NDArray[np.float32]

_MODES = ("nearest", "linear")
_TRANSFORMS = (
    *("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric"),
)


def limits(node: Node) -> str | None:
    """Name what is asked for and missing."""
    transform = node.get("coordinate_transformation_mode", "half_pixel")
    if node.get("mode", "nearest") not in _MODES:
        return f"with mode={node.get('mode')}"
    if transform not in _TRANSFORMS:
        return f"with coordinate_transformation_mode={transform}"
    for flag in ("antialias", "exclude_outside"):
        if node.get(flag, 0):
            return f"with {flag}=1"
    return None


def resize(node: Node, x: Tensor, *given: Tensor | None) -> Tensor:
    """ONNX Resize: inputs are scales in opset 10, then region of interest, scales, sizes."""
    if node.opset < 11:
        assert given[0] is not None
        return upsample(node, x, given[0])
    scales, sizes = (*given, None, None, None)[1:3]
    axes = [axis % x.dim() for axis in node.get("axes", range(x.dim()))]
    lengths = [x.shape[axis] for axis in axes]
    if sizes is not None and sizes.numel():
        targets, factors = _from_sizes(node, lengths, ints(sizes))
    else:
        assert scales is not None
        factors = _factors(scales)
        targets = [int(np.float32(n) * f) for n, f in zip(lengths, factors, strict=True)]
    transform = node.get("coordinate_transformation_mode", "half_pixel")
    rounding = node.get("nearest_mode", "round_prefer_floor")
    is_linear = node.get("mode", "nearest") == "linear"
    for axis, target, factor in zip(axes, targets, factors, strict=True):
        if target != x.shape[axis] or factor != 1:
            places = _places(transform, x.shape[axis], target, factor)
            x = _linear(x, axis, places) if is_linear else _nearest(x, axis, places, rounding)
    return x


def upsample(node: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """ONNX Upsample, and Resize as of opset 10; before opset 9 the scales are an attribute."""
    factors = _factors(torch.tensor(node.get("scales")) if scales is None else scales)
    for axis, factor in enumerate(factors):
        if factor == 1:
            continue
        target = int(np.float32(x.shape[axis]) * factor)
        places = _places("asymmetric", x.shape[axis], target, factor)
        if node.get("mode", "nearest") == "nearest":
            x = _nearest(x, axis, places, "ceil" if factor < 1 else "floor")  # as onnxruntime
        else:
            x = _linear(x, axis, places)
    return x


def _factors(scales: Tensor) -> list[np.float32]:
    return [np.float32(scale) for scale in scales.tolist()]


def _from_sizes(
    node: Node, lengths: Sequence[int], sizes: Sequence[int]
) -> tuple[Sequence[int], list[np.float32]]:
    """Return target sizes and scales, where sizes are given."""
    factors = [np.float32(s) / np.float32(n) for s, n in zip(sizes, lengths, strict=True)]
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    targets = [int(np.floor(factor * np.float32(n) + np.float32(0.5))) for n in lengths]
    return targets, [factor] * len(lengths)


def _places(transform: str, length: int, target: int, scale: np.float32) -> _Coordinates:
    """Return where each element of the result lies in the original (ONNX operators, Resize)."""
    i = np.arange(target, dtype=np.float32)
    half = np.float32(0.5)
    if transform == "asymmetric":
        return i / scale
    if transform == "align_corners":
        return i * np.float32((length - 1) / (target - 1)) if target > 1 else i * 0
    if transform == "pytorch_half_pixel" and target == 1:
        return i * 0
    offset = np.float32(0)
    if transform == "half_pixel_symmetric":
        offset = np.float32(length / 2) * (1 - np.float32(target) / (scale * np.float32(length)))
    return offset + (i + half) / scale - half


def _nearest(x: Tensor, axis: int, places: _Coordinates, rounding: str) -> Tensor:
    rounded: dict[str, npt.NDArray[Any]] = {
        "floor": np.floor(places),
        "ceil": np.ceil(places),
        "round_prefer_floor": np.ceil(places - np.float32(0.5)),
        "round_prefer_ceil": np.floor(places + np.float32(0.5)),
    }
    index = rounded[rounding].clip(0, x.shape[axis] - 1).astype(np.int64)
    return x.index_select(axis, tensor(index).to(x.device))


def _linear(x: Tensor, axis: int, places: _Coordinates) -> Tensor:
    last = x.shape[axis] - 1
    places = places.clip(0, last)
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, last)
    shares = tensor(places - low).to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
    below = x.index_select(axis, tensor(low).to(x.device))
    above = x.index_select(axis, tensor(high).to(x.device))
    return torch.lerp(below, above, shares.expand_as(below))
