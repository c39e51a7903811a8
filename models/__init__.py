"""Networks of the literature behind 1×1 convolutions, and a small trained one for the demo.

Every builder takes keywords only, returns an ONNX model with seeded weights, and defaults to the
sizes of its source. ``BUILDERS`` maps their names to them.
"""

from collections.abc import Callable
from pathlib import Path

import onnx

from .densenet import densenet121
from .heads import conv_head, mlp_head
from .inception import (
    googlenet,
    inception_naive,
    inception_reduced,
    naive_inception_net,
    pool_projection,
)
from .nin import mlpconv, network_in_network
from .resnet import resnet50, resnet_bottleneck, resnet_projection
from .squeezenet import squeezenet
from .tutorial import (
    decrease_features,
    increase_features,
    project_features,
    segmentation_head,
    seven_by_seven,
    seven_by_seven_reduced,
    strided_pointwise,
    twenty_filters,
    worked_example,
    worked_example_input,
)
from .vgg import vgg16

__all__ = ["BUILDERS", "DEMO_CALIBRATION", "DEMO_EVALUATION", "DEMO_MODEL", "worked_example_input"]

_BUILDERS: tuple[Callable[..., onnx.ModelProto], ...] = (
    project_features,
    decrease_features,
    increase_features,
    seven_by_seven,
    seven_by_seven_reduced,
    worked_example,
    twenty_filters,
    segmentation_head,
    strided_pointwise,
    mlpconv,
    network_in_network,
    inception_naive,
    inception_reduced,
    pool_projection,
    googlenet,
    naive_inception_net,
    resnet_bottleneck,
    resnet_projection,
    resnet50,
    squeezenet,
    densenet121,
    vgg16,
    mlp_head,
    conv_head,
)
BUILDERS = {builder.__name__: builder for builder in _BUILDERS}

_DEMO = Path(__file__).parent / "demo"
DEMO_MODEL = _DEMO / "naive_inception.onnx"
DEMO_CALIBRATION = _DEMO / "calib.npz"  # images uint8 [500, 28, 28, 1], labels int64 [500]
DEMO_EVALUATION = _DEMO / "eval.npz"  # images uint8 [2000, 28, 28, 1], labels int64 [2000]
