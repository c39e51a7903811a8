"""One layer of a network, as it is or split, as a model of its own."""

from collections.abc import Callable
from dataclasses import replace

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto

from pwopt import runtime
from pwopt.graph import Names, known_constant, like
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.runtime import Array

Run = Callable[[Array], Array]


def runner(model: Model, layer: Linear, factors: Factors | None, threads: int) -> Run:
    """Load a layer, as it is or split, as a model of its own when it is first run.

    Args:
        model: The network; stays as it is.
        layer: A layer of its graph.
        factors: What it is split into; None for the layer as it is.
        threads: Threads within one operator.

    Returns:
        What runs it: its input, with the axes that it has in the network, to its output. A
        ModelError says that onnxruntime cannot.
    """
    session = None

    def run(x: Array) -> Array:
        nonlocal session
        if session is None:
            session = runtime.session(_alone(model, layer, factors, x), threads=threads)
        return runtime.run(session, {"x": x}, name=model.name)["y"]

    return run


def _alone(model: Model, layer: Linear, factors: Factors | None, like_this: Array) -> Model:
    proto = ModelProto(ir_version=max(model.proto.ir_version, 4), graph=GraphProto(name="layer"))
    proto.opset_import.extend(model.proto.opset_import)
    alone = model.beside(proto)
    axes = [f"axis{number}" for number in range(like_this.ndim)]
    x, y = (gs.Variable(name, like_this.dtype, axes) for name in ("x", "y"))
    tensors = [known_constant(t) for t in layer.node.inputs[1:] if not t.is_empty()]
    # `_values` rather than `values`: they need not be decoded.
    own = [gs.Constant(f"constant{number}", t._values) for number, t in enumerate(tensors)]
    node = like(layer.node, [x, *own], y)
    alone.graph.inputs.append(x)
    alone.graph.outputs.append(y)
    split = replace(layer, node=node).split(factors, Names(alone)) if factors else [node]
    alone.graph.nodes.extend(split)
    return alone
