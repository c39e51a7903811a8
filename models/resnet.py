"""Bottleneck residual networks (He et al. 2016, "Deep Residual Learning for Image Recognition").

A block narrows its maps by a 1×1, convolves the narrow ones 3×3 and widens them by another 1×1. As
in the paper (v1), the stride of a block sits in its first 1×1 and in the 1×1 of the shortcut.
ResNet-50: 25,557,032 parameters (53,120 more with the running statistics), 3.86 G MACs at 224×224.
"""

import onnx

from .layers import Net, Tensor

# Near zero, as residual branches are usually initialised: a deep sum of them keeps its size.
_RESIDUAL_GAIN = 0.2


def resnet_bottleneck(
    *, size: int = 56, in_channels: int = 256, width: int = 64, seed: int = 0
) -> onnx.ModelProto:
    """A bottleneck block whose shortcut is the identity: 256 → 64 → 64 → 256."""
    net = Net("resnet_bottleneck", seed=seed)
    x = net.input("features", in_channels, size, size)
    residual = _residual(net, x, width, in_channels, 1, "block")
    x = net.add(residual, x, name="block.add")
    return net.model(net.relu(x, name="block.relu"))


def resnet_projection(
    *, size: int = 56, in_channels: int = 256, width: int = 128, seed: int = 0
) -> onnx.ModelProto:
    """A block that halves the map: its shortcut is a 1×1 convolution of stride 2."""
    net = Net("resnet_projection", seed=seed)
    x = net.input("features", in_channels, size, size)
    return net.model(_projected_block(net, x, width, 2, "block"))


def resnet50(
    *, size: int = 224, width: int = 64, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """ResNet-50 v1."""
    net = Net("resnet50", seed=seed)
    x = net.input("images", 3, size, size)
    x = net.conv_bn_relu(x, width, 7, name="stem", stride=2)
    x = net.max_pool(x, 3, 2, name="pool", pad=1)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        stage_width = width * 2 ** (stage - 1)
        x = _projected_block(net, x, stage_width, 1 if stage == 1 else 2, f"layer{stage}.0")
        for block in range(1, blocks):
            name = f"layer{stage}.{block}"
            residual = _residual(net, x, stage_width, x.shape[0], 1, name)
            x = net.add(residual, x, name=f"{name}.add")
            x = net.relu(x, name=f"{name}.relu")
    x = net.global_average_pool(x, name="average")
    x = net.flatten(x, name="flatten")
    return net.model(net.gemm(x, classes, name="classifier"), "logits")


def _residual(net: Net, x: Tensor, width: int, channels: int, stride: int, name: str) -> Tensor:
    x = net.conv_bn_relu(x, width, 1, name=f"{name}.reduce", stride=stride)
    x = net.conv_bn_relu(x, width, 3, name=f"{name}.conv")
    x = net.conv(x, channels, 1, name=f"{name}.expand.conv", bias=False)
    return net.batch_norm(x, name=f"{name}.expand.bn", gain=_RESIDUAL_GAIN)


def _projected_block(net: Net, x: Tensor, width: int, stride: int, name: str) -> Tensor:
    channels = 4 * width
    residual = _residual(net, x, width, channels, stride, name)
    x = net.conv(x, channels, 1, name=f"{name}.shortcut.conv", stride=stride, bias=False)
    x = net.batch_norm(x, name=f"{name}.shortcut.bn")
    x = net.add(residual, x, name=f"{name}.add")
    return net.relu(x, name=f"{name}.relu")
