"""A small pencil for drawing convolutional networks as ONNX graphs, layer by layer.

Names follow PyTorch: a convolution called ``stem.conv`` owns the initializers ``stem.conv.weight``
and ``stem.conv.bias``; its node and its output tensor are both called ``stem.conv``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
_BIAS_STD = 0.1


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value in the graph; `shape` leaves the batch out, so a map is (channels, height, width)."""

    name: str
    shape: tuple[int, ...]


class Net:
    """Collects nodes and seeded weights; `model` makes the ModelProto.

    Weights are He-normal (He et al. 2015), biases small normals, and the statistics of
    BatchNormalization lie around those of a standardised signal. All come from one generator in the
    order of the calls, so the same calls with the same seed give the same bytes.
    """

    def __init__(self, name: str, *, seed: int = 0, batch: int | str = "N") -> None:
        self._name = name
        self._batch = batch
        self._random = np.random.default_rng(seed)
        self._inputs: list[Tensor] = []
        self._nodes: dict[str, onnx.NodeProto] = {}
        self._initializers: list[TensorProto] = []

    def input(self, name: str, *shape: int) -> Tensor:
        """A float32 graph input of this shape behind the batch axis."""
        x = Tensor(name, shape)
        self._inputs.append(x)
        return x

    def conv(
        self,
        x: Tensor,
        channels: int,
        kernel: int,
        *,
        name: str,
        stride: int = 1,
        pad: int | None = None,
        bias: bool = True,
    ) -> Tensor:
        """A square convolution; without `pad`, the padding that keeps the size at stride 1."""
        pad = kernel // 2 if pad is None else pad
        in_channels, *size = x.shape
        weight = self._he_normal(channels, in_channels, kernel, kernel)
        weights = [self._initializer(f"{name}.weight", weight)]
        if bias:
            weights.append(self._initializer(f"{name}.bias", self._bias(channels)))
        return self._node(
            "Conv",
            [x.name, *weights],
            name,
            (channels, *_slid(size, kernel, stride, pad)),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
        )

    def conv_relu(
        self,
        x: Tensor,
        channels: int,
        kernel: int,
        *,
        name: str,
        stride: int = 1,
        pad: int | None = None,
    ) -> Tensor:
        """Conv with bias → Relu."""
        x = self.conv(x, channels, kernel, name=name, stride=stride, pad=pad)
        return self.relu(x, name=f"{name}.relu")

    def conv_bn_relu(
        self, x: Tensor, channels: int, kernel: int, *, name: str, stride: int = 1
    ) -> Tensor:
        """Conv without bias → BatchNormalization → Relu."""
        x = self.conv(x, channels, kernel, name=f"{name}.conv", stride=stride, bias=False)
        x = self.batch_norm(x, name=f"{name}.bn")
        return self.relu(x, name=f"{name}.relu")

    def batch_norm(self, x: Tensor, *, name: str, gain: float = 1.0) -> Tensor:
        """BatchNormalization with its scale drawn around `gain`."""
        channels = x.shape[0]
        weights = {
            "weight": gain * self._random.uniform(0.5, 1.5, channels),
            "bias": self._random.normal(0, 0.1, channels),
            "running_mean": self._random.normal(0, 0.1, channels),
            "running_var": self._random.uniform(0.5, 1.5, channels),
        }
        names = [self._initializer(f"{name}.{k}", w) for k, w in weights.items()]
        return self._node("BatchNormalization", [x.name, *names], name, x.shape)

    def relu(self, x: Tensor, *, name: str) -> Tensor:
        """Relu."""
        return self._node("Relu", [x.name], name, x.shape)

    def max_pool(
        self, x: Tensor, kernel: int, stride: int, *, name: str, pad: int = 0, ceil: bool = False
    ) -> Tensor:
        """Square max pooling; `ceil` keeps a last window that sticks out, as Caffe does."""
        channels, *size = x.shape
        return self._node(
            "MaxPool",
            [x.name],
            name,
            (channels, *_slid(size, kernel, stride, pad, ceil)),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            ceil_mode=int(ceil),
        )

    def average_pool(self, x: Tensor, kernel: int, stride: int, *, name: str) -> Tensor:
        """Square average pooling without padding."""
        channels, *size = x.shape
        return self._node(
            "AveragePool",
            [x.name],
            name,
            (channels, *_slid(size, kernel, stride, 0)),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
        )

    def global_average_pool(self, x: Tensor, *, name: str) -> Tensor:
        """The mean of each map, as a map of one pixel."""
        return self._node("GlobalAveragePool", [x.name], name, (x.shape[0], 1, 1))

    def lrn(self, x: Tensor, *, name: str) -> Tensor:
        """Local response normalisation over 5 channels with the constants of AlexNet."""
        return self._node("LRN", [x.name], name, x.shape, size=5, alpha=1e-4, beta=0.75, bias=1.0)

    def concat(self, xs: Sequence[Tensor], *, name: str) -> Tensor:
        """Concatenation of maps along the channels."""
        shape = (sum(x.shape[0] for x in xs), *xs[0].shape[1:])
        return self._node("Concat", [x.name for x in xs], name, shape, axis=1)

    def add(self, a: Tensor, b: Tensor, *, name: str) -> Tensor:
        """The sum of two values of one shape."""
        return self._node("Add", [a.name, b.name], name, a.shape)

    def flatten(self, x: Tensor, *, name: str) -> Tensor:
        """All axes but the batch as one."""
        return self._node("Flatten", [x.name], name, (prod(x.shape),))

    def to_channels_first(self, x: Tensor, *, name: str) -> Tensor:
        """NHWC to NCHW."""
        height, width, channels = x.shape
        shape = (channels, height, width)
        return self._node("Transpose", [x.name], name, shape, perm=[0, 3, 1, 2])

    def to_channels_last(self, x: Tensor, *, name: str) -> Tensor:
        """NCHW to NHWC."""
        channels, height, width = x.shape
        shape = (height, width, channels)
        return self._node("Transpose", [x.name], name, shape, perm=[0, 2, 3, 1])

    def gemm(self, x: Tensor, features: int, *, name: str) -> Tensor:
        """A fully connected layer, its weight [features out, features in]."""
        weight = self._initializer(f"{name}.weight", self._he_normal(features, x.shape[0]))
        bias = self._initializer(f"{name}.bias", self._bias(features))
        return self._node("Gemm", [x.name, weight, bias], name, (features,), transB=1)

    def gemm_relu(self, x: Tensor, features: int, *, name: str) -> Tensor:
        """Gemm → Relu."""
        return self.relu(self.gemm(x, features, name=name), name=f"{name}.relu")

    def model(self, y: Tensor, output: str = "output") -> onnx.ModelProto:
        """The finished model, whose only output is `y`, called `output`."""
        last = self._nodes[y.name]
        last.output[0] = output
        graph = helper.make_graph(
            list(self._nodes.values()),
            self._name,
            [self._value_info(x.name, x.shape) for x in self._inputs],
            [self._value_info(output, y.shape)],
            self._initializers,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="pwopt.models"
        )

    def _node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        shape: tuple[int, ...],
        **attributes: Any,
    ) -> Tensor:
        if name in self._nodes:
            raise ValueError(f"two layers are called {name!r}")
        self._nodes[name] = helper.make_node(op, inputs, [name], name=name, **attributes)
        return Tensor(name, shape)

    def _initializer(self, name: str, weight: NDArray[np.floating]) -> str:
        self._initializers.append(
            numpy_helper.from_array(weight.astype(np.float32, copy=False), name)
        )
        return name

    def _he_normal(self, *shape: int) -> NDArray[np.float32]:
        weight = self._random.standard_normal(shape, dtype=np.float32)
        weight *= np.float32(sqrt(2 / prod(shape[1:])))
        return weight

    def _bias(self, channels: int) -> NDArray[np.float32]:
        return self._random.standard_normal(channels, dtype=np.float32) * np.float32(_BIAS_STD)

    def _value_info(self, name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [self._batch, *shape])


def _slid(
    size: Sequence[int], kernel: int, stride: int, pad: int, ceil: bool = False
) -> tuple[int, ...]:
    """How many places a window takes along each axis."""
    spare = stride - 1 if ceil else 0
    return tuple((n + 2 * pad - kernel + spare) // stride + 1 for n in size)
