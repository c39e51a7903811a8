"""What goes into a model, and the shape of every tensor in it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from pwopt.errors import ModelError, SpecError
from pwopt.model import Model
from pwopt.roundtrip import axes, dtype

IMAGE_SIDE = 224
"""Pixels assumed for a height or width that the model leaves open: ImageNet's usual crop."""

SEQUENCE = 16
"""Elements assumed for any other axis that the model leaves open."""

Shape = tuple[int | None, ...]
InputShapes = Mapping[str, Sequence[int]]
"""The shapes of inputs by name, as in ``{"images": (1, 3, 224, 224)}``."""


class Type(NamedTuple):
    """Element type, if known, and shape of a tensor; None for an axis that stays open."""

    dtype: np.dtype[Any] | None
    shape: Shape


# Strict inference may fail inside the body of a function operator, as of
# MeanVarianceNormalization, which is no fault of the model's.
_INSIDE_FUNCTION = re.compile(r"\(op_type:[^)]*\): \[ShapeInferenceError\] Inference error")


@dataclass(frozen=True, slots=True)
class Input:
    """One input that a caller must feed; open axes are a symbol's name or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """A number for every axis of every input, and which of them nobody had named."""

    shapes: dict[str, tuple[int, ...]]
    assumed: dict[str, int]

    def describe(self) -> str:
        """Say what was assumed, as in ``N=1, H=224``; empty if the model left nothing open."""
        return ", ".join(f"{symbol}={value}" for symbol, value in self.assumed.items())


def inputs(model: Model) -> list[Input]:
    """List the inputs that a caller must feed: those without an initialiser.

    Raises:
        ModelError: an input that is not a tensor, or has no shape, no type or an unknown one.
    """
    graph = model.proto.graph
    defaults = {t.name for t in graph.initializer} | {
        t.values.name for t in graph.sparse_initializer
    }
    return [_input(model, info) for info in graph.input if info.name not in defaults]


def bind(model: Model, shapes: InputShapes | None = None, *, batch: int = 1) -> Binding:
    """Fix the axes that `model` leaves open: by `shapes` where given, else by what is usual.

    The first axis becomes `batch`; open axes of images become 224, others 16. The same symbol has
    the same value everywhere.

    Raises:
        SpecError: `shapes` names no input of the model or contradicts its declaration.
        ModelError: an input whose channels are open too, so that nothing sensible can be assumed.
    """
    given = dict(shapes or {})
    declared = inputs(model)
    unknown = given.keys() - {i.name for i in declared}
    if unknown:
        names = ", ".join(i.name for i in declared)
        raise SpecError(f"--shape: {model.name} has no input '{min(unknown)}'; it has {names}")

    symbols: dict[str, int] = {}
    assumed: dict[str, int] = {}
    for i in declared:
        if i.name in given:
            _match(model, i, tuple(given[i.name]), symbols)
    bound = {}
    for i in declared:
        if i.name in given:
            bound[i.name] = tuple(given[i.name])
            continue
        sizes = []
        for axis, size in enumerate(i.shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            symbol = size or f"{i.name}[{axis}]"
            if symbol not in symbols:
                symbols[symbol] = assumed[symbol] = _usual(model, i, axis, batch)
            sizes.append(symbols[symbol])
        bound[i.name] = tuple(sizes)
    return Binding(bound, assumed)


def infer(model: Model, binding: Binding) -> dict[str, Shape]:
    """Infer the shape of every tensor, weights included, without decoding a weight.

    Returns:
        Tensor name → shape; None for an axis that stays open. Tensors about which nothing can be
        known (behind operators that onnx has no rule for) are missing.

    Raises:
        ModelError: the bound shapes do not go through the model.
    """
    return {name: kind.shape for name, kind in infer_types(model, binding).items()}


def infer_types(model: Model, binding: Binding) -> dict[str, Type]:
    """Infer the element type and shape of every tensor, as `infer` does."""
    proto = model.skeleton()
    declared = {i.name: _type(i) for i in (*proto.graph.value_info, *proto.graph.output)}
    del proto.graph.value_info[:]
    # Inference is told about inputs and weights alone; an output may be one of them.
    told = {i.name for i in proto.graph.input} | {t.name for t in proto.graph.initializer}
    for info in (*proto.graph.input, *proto.graph.output):
        kind = info.type.tensor_type
        if info.name in binding.shapes:
            shape = binding.shapes[info.name]
            info.type.CopyFrom(helper.make_tensor_type_proto(kind.elem_type, shape))
        elif info.name not in told and info.type.HasField("tensor_type"):
            kind.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        if not _INSIDE_FUNCTION.search(str(error)):
            raise ModelError(f"{model.name}: {_explain(error, binding)}") from error
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    graph = inferred.graph
    types = {i.name: _type(i) for i in (*graph.output, *graph.value_info, *graph.input)}
    types |= {t.name: Type(dtype(t.data_type), tuple(t.dims)) for t in graph.initializer}
    known = declared | {name: type_ for name, type_ in types.items() if type_ is not None}
    return {name: type_ for name, type_ in known.items() if type_ is not None}


def _input(model: Model, info: onnx.ValueInfoProto) -> Input:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(f"{model.name}: input '{info.name}' is not a tensor; pwopt feeds tensors")
    if not tensor.HasField("shape"):
        raise ModelError(
            f"{model.name}: input '{info.name}' declares no shape; export the model with one"
        )
    # Old exporters write −1 for an open axis.
    shape = (None if isinstance(axis, int) and axis < 0 else axis for axis in axes(tensor.shape))
    try:
        return Input(info.name, dtype(tensor.elem_type), tuple(shape))
    except ModelError as error:
        raise ModelError(f"{model.name}: input '{info.name}': {error}") from error


def _match(model: Model, declared: Input, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    """Check a given shape against the declared one, and note in `symbols` what it settles."""
    fits = len(shape) == len(declared.shape) and all(
        size == own if isinstance(own, int) else size > 0
        for size, own in zip(shape, declared.shape, strict=True)
    )
    if not fits:
        raise SpecError(
            f"--shape: {model.name} wants {declared.name}={_text(declared.shape)}, "
            f"not {_text(shape)}"
        )
    for size, own in zip(shape, declared.shape, strict=True):
        if isinstance(own, str) and symbols.setdefault(own, size) != size:
            raise SpecError(
                f"--shape: {declared.name}={_text(shape)} makes '{own}' {size}, "
                f"but {model.name} has it elsewhere as {symbols[own]}"
            )


def _usual(model: Model, declared: Input, axis: int, batch: int) -> int:
    if axis == 0:
        return batch
    if len(declared.shape) < 3:
        return SEQUENCE
    if not any(isinstance(size, int) for size in declared.shape[1:]):
        raise ModelError(
            f"{model.name}: input {declared.name}={_text(declared.shape)} leaves its channels "
            f"open; give its shape, for example --shape {declared.name}=1,3,224,224"
        )
    return IMAGE_SIDE


def _type(info: onnx.ValueInfoProto) -> Type | None:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    shape = tuple(size if isinstance(size, int) else None for size in axes(tensor.shape))
    return Type(dtype(tensor.elem_type) if tensor.elem_type else None, shape)


def _explain(error: Exception, binding: Binding) -> str:
    reason = " ".join(str(error).split())
    if not binding.assumed:
        return f"shapes do not fit together: {reason}"
    return f"does not work with {binding.describe()}; give the shape with --shape ({reason})"


def _text(shape: Sequence[int | str | None]) -> str:
    return ",".join("?" if size is None else str(size) for size in shape)
