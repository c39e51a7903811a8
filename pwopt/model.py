"""Model: an ONNX file that can be edited and written back with everything it held."""

import functools
import re
from pathlib import Path

import onnx
import onnx.checker
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto

from pwopt import external, roundtrip
from pwopt.errors import ModelError
from pwopt.files import ScratchFolder, atomic_write, mapped
from pwopt.skeleton import drop_untrue_value_info, without_weights

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one protobuf message may take; larger models keep their weights outside."""


class Model:
    """A model, as loaded (`proto`) and as a graph to edit (`graph`).

    Weights are decoded only where somebody reads them. Whatever is not edited is written back as
    the very message it came from.
    """

    def __init__(
        self, proto: ModelProto, *, path: Path | None = None, folder: str | None = None
    ) -> None:
        """Take a message.

        Args:
            proto: The message; it is not copied.
            path: The file that it came from.
            folder: Where external weights lie; that of the file, if there is one.
        """
        self.proto = proto
        self.path = path
        self.folder = folder if folder is not None else str(path.absolute().parent) if path else ""

    @classmethod
    def open(cls, model: "Model | ModelProto | str | Path") -> "Model":
        """Return the model itself, the model of a message, or the one in a file.

        Raises:
            ModelError: the file cannot be read, see `load`.
        """
        if isinstance(model, Model):
            return model
        return cls(model) if isinstance(model, ModelProto) else cls.load(model)

    @classmethod
    def load(cls, path: str | Path) -> "Model":
        """Read and check a model file; external weights stay where they are until asked for.

        Raises:
            ModelError: no such file, not an ONNX model, an invalid graph, or external data that
                is missing, too short or outside the model's folder.
        """
        path = Path(path)
        proto = _parse(path)
        external.check(proto, path)
        model = cls(proto, path=path)
        try:
            skeleton = model.skeleton()
        except UnicodeDecodeError as error:
            raise ModelError(f"{path}: holds text that is not UTF-8; export it again") from error
        _check(skeleton, str(path), advice="; export it again")
        return model

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.path.name if self.path else self.proto.graph.name or "model"

    @functools.cached_property
    def _origins(self) -> roundtrip.Origins:
        try:
            return roundtrip.read(self.proto, folder=self.folder, name=self.name)
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from error

    @property
    def graph(self) -> gs.Graph:
        """The graph to edit. `gs.Constant.values` decodes on demand; `.shape`, `.dtype` do not.

        What is the model's rather than the graph's (opset, metadata, functions) is edited in
        `proto`.
        """
        return self._origins.graph

    @property
    def _is_imported(self) -> bool:
        """Whether somebody asked for the graph, and may have edited it."""
        return "_origins" in self.__dict__

    def to_proto(self) -> ModelProto:
        """Write the model as it is now; external weights still refer to their files.

        Equal to `proto`, field by field, if nothing was edited. Entries of value_info that an
        edit made untrue are left out.
        """
        if not self._is_imported:
            return _copied(self.proto)
        proto = roundtrip.write(self._origins)
        if proto.graph.value_info:
            now = self.skeleton()
            if now != without_weights(self.proto, self.folder):
                drop_untrue_value_info(proto.graph, now)
        return proto

    def skeleton(self) -> ModelProto:
        """Return the model as it is now without its large weights, which become inputs.

        Enough to check it and to infer shapes: small tensors stay, since shapes may be computed
        from them. Costs no copy of the weights, those in subgraphs left aside.
        """
        if not self._is_imported:
            return without_weights(self.proto, self.folder)
        return without_weights(roundtrip.write(self._origins, weights=False), self.folder)

    def serialized(self) -> bytes | None:
        """Return the model as `to_proto` writes it, in bytes; None if that is more than 2 GB.

        Without a copy of the message where nobody asked for the graph.
        """
        return _serialized(self.to_proto() if self._is_imported else self.proto)

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
        return self.beside(self.to_proto())

    def beside(self, proto: ModelProto) -> "Model":
        """Return the model of another message, whose external weights lie where this one's do."""
        return Model(proto, path=self.path, folder=self.folder)

    def moved_out(self) -> "Model":
        """Return a copy whose large weights lie in a temporary file, so that its copies are small.

        onnxruntime maps the file. A model that has weights in files already keeps them there.

        Raises:
            PwoptError: the file cannot be written.
        """
        proto = self.to_proto()
        if external.tensors(proto):
            return self.beside(proto)
        folder = ScratchFolder()
        with external.moved_out(proto, self.folder, Path(folder) / "model"):
            # A message keeps the memory of what was taken out of it; a copy does not.
            return Model(_copied(proto), path=self.path, folder=folder)

    def moved_in(self) -> "Model":
        """Return a copy that holds all its weights.

        Raises:
            ModelError: a file with weights is gone.
        """
        proto = self.to_proto()
        external.load(proto, self.folder)
        return Model(proto, path=self.path)

    def check(self, when: str = "") -> None:
        """Check that the graph, as it is now, is a valid model.

        Raises:
            ModelError: it is not; the message says what is wrong where, and `when`.
        """
        _check(self.skeleton(), f"{self.name} {when}".strip())

    def save(self, path: str | Path) -> None:
        """Write the model, whole or not at all; weights go outside if they were or must be.

        External weights go to `NAME.HASH.data` beside the model; see `external.moved_out`.

        Raises:
            ModelError: the edited graph is not valid, or too large for one file.
            PwoptError: the file cannot be written.
        """
        self.check()
        self.write(Path(path))

    def write(self, path: Path) -> None:
        """Write the model as `save` does, valid or not: outputs may lack their types, say.

        Raises:
            ModelError: too large for one file.
            PwoptError: the file cannot be written.
        """
        data = None if external.tensors(self.proto) else self.serialized()
        if data is not None:
            _write(data, path)
            return
        proto = self.to_proto()
        with external.moved_out(proto, self.folder, path):
            data = _serialized(proto)
            if data is None:
                raise ModelError(f"{path}: larger than 2 GB even without its weights")
            _write(data, path)


def _serialized(proto: ModelProto) -> bytes | None:
    """Return the bytes of a model file; None if that is more than one message may be."""
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return data if len(data) <= PROTOBUF_LIMIT else None


def _copied(proto: ModelProto) -> ModelProto:
    """Copy a message; a ModelError tells of text that is not UTF-8."""
    copy = ModelProto()
    roundtrip.copy_fields(proto, copy, without={"graph"})
    roundtrip.copy_fields(proto.graph, copy.graph, without=set())
    return copy


def _write(data: bytes, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(data)


def _parse(path: Path) -> ModelProto:
    proto = ModelProto()
    try:
        with mapped(path) as data:
            if not data:
                raise ModelError(f"{path}: is empty; export or download the model again")
            if len(data) > PROTOBUF_LIMIT:
                raise ModelError(f"{path}: is larger than 2 GB; export it with external data")
            proto.ParseFromString(data)  # type: ignore[arg-type]  # which types-protobuf omits
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder; give the .onnx file inside it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except DecodeError:
        raise ModelError(
            f"{path}: is not an ONNX model, or was cut off; export or download it again"
        ) from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: is not an ONNX model (no graph, or no opset in it)")
    return proto


def _check(skeleton: ModelProto, name: str, *, advice: str = "") -> None:
    newest = onnx.defs.onnx_opset_version()
    for opset in skeleton.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ModelError(
                f"{name}: uses opset {opset.version}, but the installed onnx knows up to {newest}; "
                "upgrade onnx, or export the model at an older opset"
            )
    try:
        onnx.checker.check_model(skeleton)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(
            f"{name}: is not a valid ONNX model ({_one_line(error)}){advice}"
        ) from error


def _one_line(error: Exception) -> str:
    """Join the telling lines of a checker message: what is wrong, then where."""
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    return re.sub(r"==> Context:", "in", text)
