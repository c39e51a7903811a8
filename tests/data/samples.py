"""What the tests of pwopt.data share."""

import numpy as np
from onnx import parser

from pwopt.data import Batch, Samples
from pwopt.model import Model

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(5, 6, 8, 3), dtype=np.uint8)
GRAY = RNG.integers(256, size=(5, 6, 8), dtype=np.uint8)


def model(inputs: str) -> Model:
    """A model with these inputs, of which it uses nothing."""
    return Model(
        parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g ({inputs}) => (float y) {{ y = Constant <value = float {{1.0}}> () }}"""
        )
    )


NCHW = model("float[N, 3, 6, 8] x")


def only(samples: Samples) -> Batch:
    (batch,) = samples
    return batch
