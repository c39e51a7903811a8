"""TensorProto ↔ values: every ONNX type, decoded only when asked for."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from onnx.checker import ValidationError
from onnx_graphsurgeon.ir.tensor import LazyValues

from pwopt.errors import ModelError

SMALL = 256
"""Elements up to which a tensor is worth keeping where only shapes matter (axes, target shapes)."""


class TensorValues(LazyValues):  # type: ignore[misc]
    """The values of a TensorProto, decoded when asked for: every ONNX type, external data too."""

    def __init__(self, tensor: TensorProto, folder: str, model: str) -> None:
        self.tensor = tensor
        self.folder = folder
        self.model = model
        self.shape = list(tensor.dims)
        self.dtype = dtype(tensor.data_type)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize  # asked for by GraphSurgeon

    def load(self) -> npt.NDArray[Any]:
        """Decode the values. Types that numpy lacks come as ml_dtypes has them.

        Raises:
            ModelError: the tensor's data is damaged, or its file is gone.
        """
        tensor = with_data(self.tensor, self.folder)
        try:
            return np.array(numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{self.model}: weight '{tensor.name}' is damaged, export it again ({error})"
            ) from error

    def equal(self, values: npt.NDArray[Any]) -> bool:
        """Tell whether values, perhaps edited in place, are still what they were when read."""
        if (self.dtype, tuple(self.shape)) != (values.dtype, values.shape):
            return False
        before = self.load()
        if values.dtype == np.object_:  # strings
            return np.array_equal(before, values)
        return before.tobytes() == values.tobytes()  # NaN equals NaN, −0 differs from 0


def dtype(kind: int) -> np.dtype[Any]:
    """Return numpy's name for an ONNX element type.

    Raises:
        ModelError: the installed onnx does not know it.
    """
    try:
        return helper.tensor_dtype_to_np_dtype(kind)
    except KeyError:
        raise ModelError(f"the installed onnx knows no element type {kind}; upgrade it") from None


def with_data(tensor: TensorProto, folder: str) -> TensorProto:
    """Return the tensor itself, or a copy that holds the data which lies in another file.

    Raises:
        ModelError: that file is gone, too short or outside `folder`.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    loaded = TensorProto()
    loaded.CopyFrom(tensor)
    try:
        external_data_helper.load_external_data_for_tensor(loaded, folder)
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"weight '{tensor.name}' cannot be read: {reason}") from error
    loaded.ClearField("data_location")
    loaded.ClearField("external_data")
    return loaded


def named(tensor: TensorProto, name: str) -> TensorProto:
    """Return the tensor itself, or a copy of another name."""
    if tensor.name == name:
        return tensor
    renamed = TensorProto()
    renamed.CopyFrom(tensor)
    renamed.name = name
    return renamed


def encoded(
    values: npt.NDArray[Any], name: str, original: TensorProto | None = None
) -> TensorProto:
    """Encode values, with what `original` says about the tensor they replace."""
    tensor = numpy_helper.from_array(np.asarray(values, order="C"), name)
    if original is not None:
        tensor.doc_string = original.doc_string
        tensor.metadata_props.MergeFrom(original.metadata_props)
    return tensor
