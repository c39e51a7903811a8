"""DenseNet-121 (Huang et al. 2017, "Densely Connected Convolutional Networks", the BC variant).

Every layer reads all maps before it through a 1×1 to four times the growth; 1×1 transitions halve
the maps between blocks. BatchNormalization and Relu come before each convolution. 7,978,856
parameters (83,648 more with the running statistics), 2.83 G MACs at 224×224.
"""

import onnx

from .layers import Net, Tensor

_BLOCKS = (6, 12, 24, 16)


def densenet121(
    *, size: int = 224, growth: int = 32, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """DenseNet-121; the stem has twice the growth's maps."""
    net = Net("densenet121", seed=seed)
    x = net.input("images", 3, size, size)
    x = net.conv_bn_relu(x, 2 * growth, 7, name="stem", stride=2)
    x = net.max_pool(x, 3, 2, name="pool", pad=1)
    for block, layers in enumerate(_BLOCKS, start=1):
        for layer in range(1, layers + 1):
            x = _dense_layer(net, x, growth, f"block{block}.layer{layer}")
        if block < len(_BLOCKS):
            x = _transition(net, x, f"transition{block}")
    x = net.batch_norm(x, name="last.bn")
    x = net.relu(x, name="last.relu")
    x = net.global_average_pool(x, name="average")
    x = net.flatten(x, name="flatten")
    return net.model(net.gemm(x, classes, name="classifier"), "logits")


def _bn_relu_conv(net: Net, x: Tensor, channels: int, kernel: int, name: str) -> Tensor:
    x = net.batch_norm(x, name=f"{name}.bn")
    x = net.relu(x, name=f"{name}.relu")
    return net.conv(x, channels, kernel, name=f"{name}.conv", bias=False)


def _dense_layer(net: Net, x: Tensor, growth: int, name: str) -> Tensor:
    narrow = _bn_relu_conv(net, x, 4 * growth, 1, f"{name}.reduce")
    new = _bn_relu_conv(net, narrow, growth, 3, f"{name}.grow")
    return net.concat([x, new], name=f"{name}.concat")


def _transition(net: Net, x: Tensor, name: str) -> Tensor:
    x = _bn_relu_conv(net, x, x.shape[0] // 2, 1, name)
    return net.average_pool(x, 2, 2, name=f"{name}.pool")
