"""VGG-16 (Simonyan, Zisserman 2015, configuration D), with its fully connected head.

138,357,544 parameters, 15,470,264,320 MACs at 224×224.
"""

import onnx

from .layers import Net


def vgg16(
    *, size: int = 224, width: int = 64, classes: int = 1000, seed: int = 0
) -> onnx.ModelProto:
    """VGG-16; the head has 64 times `width` features, and `size` must be a multiple of 32."""
    net = Net("vgg16", seed=seed)
    x = net.input("images", 3, size, size)
    stages = ((width, 2), (2 * width, 2), (4 * width, 3), (8 * width, 3), (8 * width, 3))
    for stage, (channels, layers) in enumerate(stages, start=1):
        for layer in range(1, layers + 1):
            x = net.conv_relu(x, channels, 3, name=f"conv{stage}_{layer}")
        x = net.max_pool(x, 2, 2, name=f"pool{stage}")
    x = net.flatten(x, name="flatten")
    x = net.gemm_relu(x, 64 * width, name="fc6")
    x = net.gemm_relu(x, 64 * width, name="fc7")
    return net.model(net.gemm(x, classes, name="fc8"), "logits")
