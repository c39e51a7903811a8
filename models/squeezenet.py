"""SqueezeNet 1.0 (Iandola et al. 2016): 1,248,424 parameters, 819 M MACs at 224×224.

A fire module squeezes its maps by a 1×1 and expands them by 1×1 and 3×3 convolutions side by side.
"""

import onnx

from .layers import Net, Tensor


def squeezenet(*, size: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """SqueezeNet 1.0 without bypass; its classifier is a 1×1 convolution averaged over the map."""
    net = Net("squeezenet", seed=seed)
    x = net.input("images", 3, size, size)
    x = net.conv_relu(x, 96, 7, name="conv1", stride=2, pad=0)
    x = net.max_pool(x, 3, 2, name="pool1", ceil=True)
    x = _fire(net, x, 16, 64, "fire2")
    x = _fire(net, x, 16, 64, "fire3")
    x = _fire(net, x, 32, 128, "fire4")
    x = net.max_pool(x, 3, 2, name="pool4", ceil=True)
    x = _fire(net, x, 32, 128, "fire5")
    x = _fire(net, x, 48, 192, "fire6")
    x = _fire(net, x, 48, 192, "fire7")
    x = _fire(net, x, 64, 256, "fire8")
    x = net.max_pool(x, 3, 2, name="pool8", ceil=True)
    x = _fire(net, x, 64, 256, "fire9")
    x = net.conv_relu(x, classes, 1, name="conv10")
    x = net.global_average_pool(x, name="average")
    return net.model(net.flatten(x, name="flatten"), "logits")


def _fire(net: Net, x: Tensor, squeeze: int, expand: int, name: str) -> Tensor:
    x = net.conv_relu(x, squeeze, 1, name=f"{name}.squeeze")
    expanded = [
        net.conv_relu(x, expand, 1, name=f"{name}.expand1x1"),
        net.conv_relu(x, expand, 3, name=f"{name}.expand3x3"),
    ]
    return net.concat(expanded, name=f"{name}.concat")
