"""Weights that lie in files of their own beside the model (ONNX ExternalData.md)."""

import contextlib
import hashlib
import math
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    numpy_helper,
)

from pwopt.cost import tensor_bytes
from pwopt.errors import ModelError
from pwopt.files import atomic_write
from pwopt.roundtrip import with_data

_ALIGNMENT = 4096
"""Offsets of external tensors are multiples of this, so that runtimes can map them (ONNX IR)."""

_INSIDE = 1024
"""Bytes up to which a tensor stays in the model file, as with `onnx.save`."""

_STORAGE = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def tensors(model: ModelProto) -> list[TensorProto]:
    """Find the tensors whose data lies elsewhere, in inner graphs and functions too."""
    found = [*_tensors(model.graph)]
    for function in model.functions:
        found += _node_tensors(function.node)
    return [tensor for tensor in found if tensor.data_location == TensorProto.EXTERNAL]


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for subgraph in (attribute.g, *attribute.graphs):
            yield from _tensors(subgraph)


def load(model: ModelProto, folder: str) -> None:
    """Read all external data into the message.

    Raises:
        ModelError: a file is gone, too short or outside `folder`.
    """
    for tensor in tensors(model):
        tensor.CopyFrom(with_data(tensor, folder))


def stored_bytes(model: ModelProto) -> int:
    """Count the bytes of weights that lie elsewhere."""
    return sum(map(_stored_bytes, tensors(model)))


def check(model: ModelProto, path: Path) -> None:
    """Check that the data of the model at `path` is where the model says.

    Raises:
        ModelError: a file that is missing, too short or outside the model's folder, which is not
            followed.
    """
    for tensor in tensors(model):
        _check(tensor, path)


def _check(tensor: TensorProto, model: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = model.parent.resolve()
    file = (folder / location).resolve()
    inside = file.is_relative_to(folder) and not Path(location).is_absolute()
    if not location or not inside:
        raise ModelError(
            f"{model}: weight '{tensor.name}' points outside the model's folder ('{location}'), "
            "which is not followed; put its data beside the model"
        )
    if not file.is_file():
        raise ModelError(
            f"{model}: the file '{location}' with weight '{tensor.name}' is missing; "
            "put it beside the model"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        offset = length = -1
    if min(offset, length) < 0:
        raise ModelError(
            f"{model}: weight '{tensor.name}' has no valid place in '{location}'; "
            "export the model again"
        )
    if offset + max(length, _stored_bytes(tensor)) > file.stat().st_size:
        raise ModelError(
            f"{model}: the file '{location}' is too short for weight '{tensor.name}'; copy it again"
        )


def _stored_bytes(tensor: TensorProto) -> int:
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        return 0  # no such type; the checker says so
    return tensor_bytes(math.prod(tensor.dims), dtype)


@contextlib.contextmanager
def moved_out(model: ModelProto, folder: str, path: Path) -> Iterator[None]:
    """Move the large weights of `model` to a file beside `path`, and write the model meanwhile.

    The file is `NAME.HASH.data`: named by content, so that the model that was there before keeps
    its own weights. If the block fails, a file that is new is deleted; nothing else ever is, since
    another model may refer to it.

    Args:
        model: The message to edit: one tensor at a time is held in memory beside it.
        folder: Where its external data lies so far.
        path: The model file to come.

    Raises:
        ModelError: external data that cannot be read.
        PwoptError: the file cannot be written.
    """
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.data")
    digest = hashlib.sha256()
    moved = []
    with atomic_write(scratch, called=path) as file:
        for tensor in (*tensors(model), *inside):
            loaded = with_data(tensor, folder)
            data = _raw_data(loaded)
            if len(data) <= _INSIDE:
                tensor.CopyFrom(loaded)
                continue
            padded = b"\0" * (-file.tell() % _ALIGNMENT) + data
            file.write(padded)
            digest.update(padded)
            moved.append((tensor, file.tell() - len(data), len(data)))
    if not moved:
        scratch.unlink()
        yield
        return
    target = path.with_name(f"{path.name}.{digest.hexdigest()[:12]}.data")
    is_new = not target.exists()
    scratch.replace(target)
    try:
        for tensor, offset, length in moved:
            _refer(tensor, target.name, offset, length)
        yield
    except BaseException:
        if is_new:
            target.unlink()
        raise


def _raw_data(tensor: TensorProto) -> bytes:
    """Return the values as raw bytes, however they are stored; strings have no such form."""
    if tensor.HasField("raw_data") or tensor.data_type == TensorProto.STRING:
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    for storage in _STORAGE:
        tensor.ClearField(storage)
    tensor.raw_data = b""  # which set_external_data insists on
    external_data_helper.set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")
