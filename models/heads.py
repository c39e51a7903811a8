"""A perceptron on pooled features, and the same as 1×1 convolutions.

On a map of one pixel a fully connected layer and a 1×1 convolution are the same sum (LeCun 2015:
"there is no such thing as fully connected layers"). Equal seeds draw equal weights.
"""

import onnx

from .layers import Net


def mlp_head(
    *,
    size: int = 7,
    in_channels: int = 512,
    hidden: int = 256,
    classes: int = 10,
    seed: int = 0,
) -> onnx.ModelProto:
    """Global average, then Gemm → Relu → Gemm."""
    net = Net("mlp_head", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.global_average_pool(x, name="average")
    x = net.flatten(x, name="flatten")
    x = net.gemm_relu(x, hidden, name="hidden")
    return net.model(net.gemm(x, classes, name="classifier"), "logits")


def conv_head(
    *,
    size: int = 7,
    in_channels: int = 512,
    hidden: int = 256,
    classes: int = 10,
    seed: int = 0,
) -> onnx.ModelProto:
    """Global average, then 1×1 → Relu → 1×1; the numbers of `mlp_head`."""
    net = Net("conv_head", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.global_average_pool(x, name="average")
    x = net.conv_relu(x, hidden, 1, name="hidden")
    x = net.conv(x, classes, 1, name="classifier")
    return net.model(net.flatten(x, name="flatten"), "logits")
