"""Network in Network (Lin, Chen, Yan 2014): a small perceptron slides over the image.

An mlpconv layer is a k×k convolution followed by two 1×1 convolutions, each with its Relu. The
CIFAR-10 network has three of them and averages each class's last map: 966,986 parameters,
222,486,528 MACs at 32×32.
"""

import onnx

from .layers import Net, Tensor


def mlpconv(
    *,
    size: int = 32,
    in_channels: int = 3,
    channels: tuple[int, int, int] = (192, 160, 96),
    kernel: int = 5,
    seed: int = 0,
) -> onnx.ModelProto:
    """One mlpconv layer, by default the first of the CIFAR-10 network."""
    net = Net("mlpconv", seed=seed)
    x = net.input("features", in_channels, size, size)
    return net.model(_mlpconv(net, x, channels, kernel, "mlpconv"))


def network_in_network(
    *, size: int = 32, width: int = 192, classes: int = 10, seed: int = 0
) -> onnx.ModelProto:
    """The CIFAR-10 network, without the dropout that only training uses."""
    net = Net("network_in_network", seed=seed)
    x = net.input("images", 3, size, size)
    x = _mlpconv(net, x, (width, width * 5 // 6, width // 2), 5, "mlpconv1")
    x = net.max_pool(x, 3, 2, name="pool1", ceil=True)
    x = _mlpconv(net, x, (width, width, width), 5, "mlpconv2")
    x = net.max_pool(x, 3, 2, name="pool2", ceil=True)
    x = _mlpconv(net, x, (width, width, classes), 3, "mlpconv3")
    x = net.global_average_pool(x, name="average")
    return net.model(net.flatten(x, name="flatten"), "logits")


def _mlpconv(net: Net, x: Tensor, channels: tuple[int, int, int], kernel: int, name: str) -> Tensor:
    x = net.conv_relu(x, channels[0], kernel, name=f"{name}.conv")
    x = net.conv_relu(x, channels[1], 1, name=f"{name}.pointwise1")
    return net.conv_relu(x, channels[2], 1, name=f"{name}.pointwise2")
