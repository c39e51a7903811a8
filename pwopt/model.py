"""Model: an ONNX file that can be edited and written back with everything it held."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import onnx
import onnx.checker
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    numpy_helper,
)

from pwopt.errors import ModelError
from pwopt.files import atomic_write
from pwopt.roundtrip import SMALL, RoundTrip, with_data

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may take; larger models keep their weights outside."""

_ALIGNMENT = 4096
"""Offsets of external tensors are multiples of this, so that runtimes can map them (ONNX IR)."""

_INSIDE = 1024
"""Bytes up to which a tensor stays in the model file, as with `onnx.save`."""

_STORAGE = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


class Model:
    """A model, as loaded (`proto`) and as a graph to edit (`graph`).

    Weights are decoded only where somebody reads them. Whatever is not edited is written back as
    the very message it came from.
    """

    def __init__(self, proto: ModelProto, *, path: Path | None = None) -> None:
        self.proto = proto
        self.path = path
        self.folder = str(path.absolute().parent) if path else ""
        """Where external weights lie."""

    @classmethod
    def load(cls, path: str | Path) -> "Model":
        """Read and check a model file; external weights stay where they are until asked for.

        Raises:
            ModelError: no such file, not an ONNX model, an invalid graph, or external data that
                is missing, too short or outside the model's folder.
        """
        path = Path(path)
        proto = _parse(path)
        for tensor in _external_tensors(proto):
            _check_external(tensor, path)
        model = cls(proto, path=path)
        _check(model.skeleton(), str(path), advice="; export it again")
        return model

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.path.name if self.path else self.proto.graph.name or "model"

    @functools.cached_property
    def _round_trip(self) -> RoundTrip:
        try:
            return RoundTrip(self.proto, folder=self.folder, name=self.name)
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from error

    @property
    def graph(self) -> gs.Graph:
        """The graph to edit. `gs.Constant.values` decodes on demand; `.shape`, `.dtype` do not.

        What is the model's rather than the graph's (opset, metadata, functions) is edited in
        `proto`.
        """
        return self._round_trip.graph

    def to_proto(self) -> ModelProto:
        """Write the model as it is now; external weights still refer to their files.

        Equal to `proto`, field by field, if nothing was edited. Entries of value_info that an
        edit made untrue are left out.
        """
        proto = self._write(weights=True)
        if proto.graph.value_info:
            now = self.skeleton()
            if now != _skeleton(self.proto, self.folder):
                _drop_untrue_value_info(proto.graph, now)
        return proto

    def _write(self, *, weights: bool) -> ModelProto:
        proto = ModelProto()
        _copy_fields(self.proto, proto, without={"graph"})
        self._round_trip.write(proto.graph, weights=weights)
        return proto

    def skeleton(self) -> ModelProto:
        """The model as it is now without its large weights, which become inputs.

        Enough to check it and to infer shapes: small tensors stay, since shapes may be computed
        from them. Costs no copy of the weights, those in subgraphs left aside.
        """
        edited = "_round_trip" in self.__dict__
        return _skeleton(self._write(weights=False) if edited else self.proto, self.folder)

    def metadata(self) -> dict[str, str]:
        """Return the entries of the model's metadata (`metadata_props`)."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    def annotate(self, key: str, value: str) -> None:
        """Set an entry of the model's metadata (`metadata_props`)."""
        for entry in self.proto.metadata_props:
            if entry.key == key:
                entry.value = value
                return
        self.proto.metadata_props.add(key=key, value=value)

    def copy(self) -> "Model":
        """Return an independent model with the edits made so far."""
        return Model(self.to_proto(), path=self.path)

    def check(self, when: str = "") -> None:
        """Check that the graph, as it is now, is a valid model.

        Raises:
            ModelError: it is not; the message says what is wrong where, and `when`.
        """
        _check(self.skeleton(), f"{self.name} {when}".strip())

    def save(self, path: str | Path) -> None:
        """Write the model, whole or not at all; weights go outside if they were or must be.

        External weights go to `NAME.HASH.data` beside the model: named by content, so that the
        model that was there before keeps its own weights. Nothing is ever deleted, since another
        model may refer to it.

        Raises:
            ModelError: the edited graph is not valid, or too large for one file.
            PwoptError: the file cannot be written.
        """
        path = Path(path)
        proto = self.to_proto()
        self.check()
        with ExitStack() as undo:
            data = None if _external_tensors(self.proto) else _serialized(proto)
            if data is None:
                _write_external(proto, self.folder, path, undo)
                data = _serialized(proto)
            if data is None:
                raise ModelError(f"{path}: larger than 2 GB even without its weights")
            with atomic_write(path) as file:
                file.write(data)
            undo.pop_all()

    def to_memory(self) -> ModelProto:
        """Like `to_proto`, with external weights read into the message.

        Raises:
            ModelError: the whole is larger than one protobuf message may be.
        """
        proto = self.to_proto()
        for tensor in _external_tensors(proto):
            tensor.CopyFrom(with_data(tensor, self.folder))
        if _serialized(proto) is None:
            raise ModelError(f"{self.name}: larger than 2 GB; save it and use the file")
        return proto


def _serialized(proto: ModelProto) -> bytes | None:
    """Return the bytes of a model file; None if that is more than one message may be."""
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return data if len(data) <= PROTOBUF_LIMIT else None


def _skeleton(proto: ModelProto, folder: str) -> ModelProto:
    result = ModelProto()
    _copy_fields(proto, result, without={"graph"})
    graph = result.graph
    _copy_fields(proto.graph, graph, without={"node", "initializer"})
    listed = {info.name for info in graph.input}
    for tensor in proto.graph.initializer:
        if not _is_large(tensor):
            graph.initializer.append(with_data(tensor, folder))
        elif tensor.name not in listed:
            graph.input.append(_describe(tensor, tensor.name))
    for node in proto.graph.node:
        value = node.attribute[0].t if _is_plain_constant(node) else None
        if value is not None and _is_large(value):
            graph.input.append(_describe(value, node.output[0]))
        else:
            graph.node.append(node)
    for tensor in _node_tensors(graph.node):
        tensor.CopyFrom(with_data(tensor, folder))
    return result


def _is_plain_constant(node: NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and node.domain in ("", "ai.onnx")
        and len(node.attribute) == 1
        and node.attribute[0].type == onnx.AttributeProto.TENSOR
    )


def _is_large(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) > SMALL


def _describe(tensor: TensorProto, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)


def _copy_fields(source: Message, target: Message, *, without: set[str]) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name in without:
            continue
        if isinstance(value, bytes):  # protobuf's way to return text that is not UTF-8
            raise ModelError(f"the model's {descriptor.name} is not UTF-8 text; export it again")
        if isinstance(value, (str, int)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).MergeFrom(value)


def _drop_untrue_value_info(graph: GraphProto, bare: ModelProto) -> None:
    """Drop the entries that shape inference, told nothing about inner tensors, contradicts.

    If it contradicts any, then those go too of which it knows nothing: they may follow from it.
    """
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare)
    types = {info.name: info.type.tensor_type for info in inferred.graph.value_info}
    known = [info for info in graph.value_info if info.name in types]
    true = [info for info in known if _agree(info.type.tensor_type, types[info.name])]
    if len(true) < len(known):
        del graph.value_info[:]
        graph.value_info.extend(true)


def _agree(one: onnx.TypeProto.Tensor, other: onnx.TypeProto.Tensor) -> bool:
    if one.elem_type != other.elem_type:
        return False
    if not (one.HasField("shape") and other.HasField("shape")):
        return True
    if len(one.shape.dim) != len(other.shape.dim):
        return False
    return all(
        not (a.HasField("dim_value") and b.HasField("dim_value")) or a.dim_value == b.dim_value
        for a, b in zip(one.shape.dim, other.shape.dim, strict=True)
    )


# -- reading and checking ---------------------------------------------------------------------


def _parse(path: Path) -> ModelProto:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; give the .onnx file inside it")
        if path.stat().st_size > PROTOBUF_LIMIT:
            raise ModelError(f"{path}: is larger than 2 GB; export it with external data")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise ModelError(f"{path}: is empty; export or download the model again")
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{path}: is not an ONNX model, or was cut off; export or download it again"
        ) from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: is not an ONNX model (no graph, or no opset in it)")
    return proto


def _check(bare: ModelProto, name: str, *, advice: str = "") -> None:
    newest = onnx.defs.onnx_opset_version()
    for opset in bare.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ModelError(
                f"{name}: uses opset {opset.version}, but the installed onnx knows up to {newest}; "
                "upgrade onnx, or export the model at an older opset"
            )
    try:
        onnx.checker.check_model(bare)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(
            f"{name}: is not a valid ONNX model ({_one_line(error)}){advice}"
        ) from error


def _one_line(error: Exception) -> str:
    """Join the telling lines of a checker message: what is wrong, then where."""
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    return re.sub(r"==> Context:", "in", text)


def _external_tensors(proto: ModelProto) -> list[TensorProto]:
    tensors = [*_tensors(proto.graph)]
    for function in proto.functions:
        tensors += _node_tensors(function.node)
    return [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]


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


def _check_external(tensor: TensorProto, model: Path) -> None:
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
    """How many bytes of data `tensor` has; types below one byte are packed (ONNX IR)."""
    try:
        itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return 0  # no such type; the checker says so
    name = TensorProto.DataType.Name(tensor.data_type)
    bits = next((n for n in (2, 4, 6) if re.match(rf"U?(INT|FLOAT){n}(E|$)", name)), None)
    if bits is None:
        bits = 8 * itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


# -- external data ----------------------------------------------------------------------------


def _write_external(proto: ModelProto, folder: str, path: Path, undo: ExitStack) -> None:
    """Move the large weights of `proto` to a data file beside `path`, one at a time."""
    inside = [t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    scratch = path.with_name(f".{path.name}.{os.getpid()}.data")
    digest = hashlib.sha256()
    moved = []
    with atomic_write(scratch) as file:
        for tensor in (*_external_tensors(proto), *inside):
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
        return
    target = path.with_name(f"{path.name}.{digest.hexdigest()[:12]}.data")
    if not target.exists():
        undo.callback(target.unlink)
    scratch.replace(target)
    for tensor, offset, length in moved:
        for storage in _STORAGE:
            tensor.ClearField(storage)
        tensor.raw_data = b""  # which set_external_data insists on
        external_data_helper.set_external_data(tensor, target.name, offset, length)
        tensor.ClearField("raw_data")


def _raw_data(tensor: TensorProto) -> bytes:
    """Return the values as raw bytes, however they are stored; strings have no such form."""
    if tensor.HasField("raw_data") or tensor.data_type == TensorProto.STRING:
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
