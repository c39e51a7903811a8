"""Inception modules and GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions").

The naive module puts 1×1, 3×3, 5×5 convolutions and a max pooling side by side. The other one first
reduces by 1×1 convolutions what the wide kernels read, and projects the pooled maps. GoogLeNet
without its auxiliary heads: 6,998,552 parameters, 1.58 G MACs at 224×224.
"""

from typing import NamedTuple

import onnx

from .layers import Net, Tensor


class Widths(NamedTuple):
    """A line of the paper's table 1, from "#1×1" to "pool proj"."""

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    project: int


INCEPTION_3A = Widths(64, 96, 128, 16, 32, 32)


def inception_naive(
    *, size: int = 28, in_channels: int = 192, widths: Widths = INCEPTION_3A, seed: int = 0
) -> onnx.ModelProto:
    """The naive module with the branches of inception 3a; the pooled maps pass through."""
    net = Net("inception_naive", seed=seed)
    x = net.input("features", in_channels, size, size)
    branches = [
        net.conv_relu(x, widths.conv1x1, 1, name="branch1x1"),
        net.conv_relu(x, widths.conv3x3, 3, name="branch3x3"),
        net.conv_relu(x, widths.conv5x5, 5, name="branch5x5"),
        net.max_pool(x, 3, 1, name="pool", pad=1),
    ]
    return net.model(net.concat(branches, name="concat"))


def inception_reduced(
    *, size: int = 28, in_channels: int = 192, widths: Widths = INCEPTION_3A, seed: int = 0
) -> onnx.ModelProto:
    """The module with reductions, by default inception 3a: 163,696 parameters."""
    net = Net("inception_reduced", seed=seed)
    x = net.input("features", in_channels, size, size)
    return net.model(_inception(net, x, widths, "inception"))


def pool_projection(
    *, size: int = 28, in_channels: int = 192, channels: int = 32, seed: int = 0
) -> onnx.ModelProto:
    """The fourth branch of inception 3a alone: a 1×1 convolution after max pooling."""
    net = Net("pool_projection", seed=seed)
    x = net.input("features", in_channels, size, size)
    x = net.max_pool(x, 3, 1, name="pool", pad=1)
    return net.model(net.conv_relu(x, channels, 1, name="project"))


def googlenet(*, size: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """GoogLeNet as it runs at inference."""
    net = Net("googlenet", seed=seed)
    x = net.input("images", 3, size, size)
    x = net.conv_relu(x, 64, 7, name="conv1", stride=2)
    x = net.max_pool(x, 3, 2, name="pool1", ceil=True)
    x = net.lrn(x, name="norm1")
    x = net.conv_relu(x, 64, 1, name="conv2.reduce")
    x = net.conv_relu(x, 192, 3, name="conv2")
    x = net.lrn(x, name="norm2")
    x = net.max_pool(x, 3, 2, name="pool2", ceil=True)
    x = _inception(net, x, INCEPTION_3A, "inception_3a")
    x = _inception(net, x, Widths(128, 128, 192, 32, 96, 64), "inception_3b")
    x = net.max_pool(x, 3, 2, name="pool3", ceil=True)
    x = _inception(net, x, Widths(192, 96, 208, 16, 48, 64), "inception_4a")
    x = _inception(net, x, Widths(160, 112, 224, 24, 64, 64), "inception_4b")
    x = _inception(net, x, Widths(128, 128, 256, 24, 64, 64), "inception_4c")
    x = _inception(net, x, Widths(112, 144, 288, 32, 64, 64), "inception_4d")
    x = _inception(net, x, Widths(256, 160, 320, 32, 128, 128), "inception_4e")
    x = net.max_pool(x, 3, 2, name="pool4", ceil=True)
    x = _inception(net, x, Widths(256, 160, 320, 32, 128, 128), "inception_5a")
    x = _inception(net, x, Widths(384, 192, 384, 48, 128, 128), "inception_5b")
    x = net.global_average_pool(x, name="average")
    x = net.flatten(x, name="flatten")
    return net.model(net.gemm(x, classes, name="classifier"), "logits")


def naive_inception_net(
    *, size: int = 28, in_channels: int = 1, classes: int = 10, seed: int = 0
) -> onnx.ModelProto:
    """The demo's network: two naive modules, on 192 and 384 maps of 7×7.

    1,057,898 parameters (1,216 more with the running statistics), 60 M MACs. Every convolution is
    followed by BatchNormalization and Relu.
    """
    net = Net("naive_inception_net", seed=seed)
    x = net.input("images", in_channels, size, size)
    x = net.conv_bn_relu(x, 32, 3, name="stem1")
    x = net.max_pool(x, 2, 2, name="pool1")
    x = net.conv_bn_relu(x, 192, 3, name="stem2")
    x = net.max_pool(x, 2, 2, name="pool2")
    for name in ("inception1", "inception2"):
        branches = [
            net.conv_bn_relu(x, 64, 1, name=f"{name}.branch1x1"),
            net.conv_bn_relu(x, 96, 3, name=f"{name}.branch3x3"),
            net.conv_bn_relu(x, 32, 5, name=f"{name}.branch5x5"),
            net.max_pool(x, 3, 1, name=f"{name}.pool", pad=1),
        ]
        x = net.concat(branches, name=f"{name}.concat")
    x = net.global_average_pool(x, name="average")
    x = net.flatten(x, name="flatten")
    return net.model(net.gemm(x, classes, name="classifier"), "logits")


def _inception(net: Net, x: Tensor, widths: Widths, name: str) -> Tensor:
    reduced3x3 = net.conv_relu(x, widths.reduce3x3, 1, name=f"{name}.reduce3x3")
    reduced5x5 = net.conv_relu(x, widths.reduce5x5, 1, name=f"{name}.reduce5x5")
    pooled = net.max_pool(x, 3, 1, name=f"{name}.pool", pad=1)
    branches = [
        net.conv_relu(x, widths.conv1x1, 1, name=f"{name}.branch1x1"),
        net.conv_relu(reduced3x3, widths.conv3x3, 3, name=f"{name}.branch3x3"),
        net.conv_relu(reduced5x5, widths.conv5x5, 5, name=f"{name}.branch5x5"),
        net.conv_relu(pooled, widths.project, 1, name=f"{name}.project"),
    ]
    return net.concat(branches, name=f"{name}.concat")
