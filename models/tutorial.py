"""The small networks with which tutorials explain 1×1 convolutions.

Feature maps grow with depth; a 1×1 convolution projects them, shrinks them before a costly layer or
widens them, one weight per pair of maps and position by position (Brownlee 2019, "A Gentle
Introduction to 1×1 Convolutions to Manage Model Complexity"; Ng 2017, "Networks in Networks and
1×1 Convolutions").
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .layers import Net


def project_features(*, size: int = 256, width: int = 512, seed: int = 0) -> onnx.ModelProto:
    """size×size×3 → 3×3 to `width` → 1×1 to as many; 276,992 parameters."""
    return _conv_then_pointwise("project_features", size, width, width, seed)


def decrease_features(
    *, size: int = 256, width: int = 512, projection: int = 64, seed: int = 0
) -> onnx.ModelProto:
    """size×size×3 → 3×3 to `width` → 1×1 to fewer maps; 47,168 parameters."""
    return _conv_then_pointwise("decrease_features", size, width, projection, seed)


def increase_features(
    *, size: int = 256, width: int = 512, projection: int = 1024, seed: int = 0
) -> onnx.ModelProto:
    """size×size×3 → 3×3 to `width` → 1×1 to more maps; 539,648 parameters."""
    return _conv_then_pointwise("increase_features", size, width, projection, seed)


def seven_by_seven(
    *, size: int = 28, in_channels: int = 512, channels: int = 64, seed: int = 0
) -> onnx.ModelProto:
    """A 7×7 convolution on 512 maps: 7·7·512·64 + 64 = 1,605,696 parameters."""
    net = Net("seven_by_seven", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.conv_relu(x, channels, 7, name="conv")
    return net.model(x)


def seven_by_seven_reduced(
    *,
    size: int = 28,
    in_channels: int = 512,
    bottleneck: int = 64,
    channels: int = 64,
    seed: int = 0,
) -> onnx.ModelProto:
    """The same behind a 1×1 to 64 maps: 32,832 + 200,768 = 233,600 parameters.

    The 1×1 is a layer of its own, with bias and Relu, as one would design it by hand.
    """
    net = Net("seven_by_seven_reduced", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.conv_relu(x, bottleneck, 1, name="reduce")
    x = net.conv_relu(x, channels, 7, name="conv")
    return net.model(x)


def worked_example() -> onnx.ModelProto:
    """A 3×3 image of two channels through one 1×1 filter [1, 2]: y = 1·x₀ + 2·x₁.

    On `worked_example_input` it gives 5, 11, 17, 23, 29, 35, 41, 47, 53.
    """
    net = Net("worked_example", batch=1)
    x = net.input("image", 2, 3, 3)
    model = net.model(net.conv(x, 1, 1, name="filter", bias=False))
    weight = np.array([1, 2], np.float32).reshape(1, 2, 1, 1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "filter.weight"))
    return model


def worked_example_input() -> NDArray[np.float32]:
    """The numbers 1..18, pixel by pixel with the channels innermost, as NCHW [1, 2, 3, 3]."""
    image = np.arange(1, 19, dtype=np.float32).reshape(1, 3, 3, 2)
    return np.ascontiguousarray(image.transpose(0, 3, 1, 2))


def twenty_filters(
    *, size: int = 200, in_channels: int = 50, filters: int = 20, seed: int = 0
) -> onnx.ModelProto:
    """A 200×200×50 image through twenty 1×1 filters: 200×200×20, 1,020 parameters."""
    net = Net("twenty_filters", seed=seed)
    x = net.input("image", in_channels, size, size)
    return net.model(net.conv(x, filters, 1, name="filters"))


def segmentation_head(
    *, height: int = 20, width: int = 72, in_channels: int = 256, classes: int = 2, seed: int = 0
) -> onnx.ModelProto:
    """Per-pixel classification (1, 20, 72, 256) → (1, 20, 72, 2): 514 parameters.

    Input and output have their channels last, as the frameworks that such heads come from write
    them; ONNX convolves channels first, hence the Transpose on either side.
    """
    net = Net("segmentation_head", seed=seed, batch=1)
    x = net.input("features", height, width, in_channels)
    x = net.to_channels_first(x, name="nchw")
    x = net.conv(x, classes, 1, name="classifier")
    x = net.to_channels_last(x, name="nhwc")
    return net.model(x, "logits")


def strided_pointwise(
    *, size: int = 56, in_channels: int = 64, channels: int = 128, seed: int = 0
) -> onnx.ModelProto:
    """A 3×3 convolution read by a 1×1 of stride 2, which drops three of four pixels."""
    net = Net("strided_pointwise", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.conv_relu(x, in_channels, 3, name="conv")
    x = net.conv_relu(x, channels, 1, name="pick", stride=2)
    return net.model(x)


def _conv_then_pointwise(
    name: str, size: int, width: int, projection: int, seed: int
) -> onnx.ModelProto:
    net = Net(name, seed=seed)
    x = net.input("image", 3, size, size)
    x = net.conv_relu(x, width, 3, name="conv")
    x = net.conv_relu(x, projection, 1, name="pointwise")
    return net.model(x)
