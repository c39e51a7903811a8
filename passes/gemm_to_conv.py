"""Gemm-to-conv: write fully connected layers behind a map as convolutions.

Before → after, for a map x [N, C, H, W] and a Gemm with K outputs::

    x [N,C,1,1] → Flatten → Gemm(W) → y     ⇒   x → Conv 1×1 (W') → Flatten → y
    x [N,C,H,W] → Flatten → Gemm(W) → y     ⇒   x → Conv H×W (W') → Flatten → y
    x → Flatten → Gemm → Relu → Gemm → y    ⇒   x → Conv H×W → Relu → Conv 1×1 → Flatten → y

Maths: Flatten lists a map row by row, channels first, so the [K, C·H·W] weight of a Gemm is the
[K, C, H, W] weight of a convolution that covers the whole map: the same sum ("there is no such
thing as fully connected layers", LeCun 2015). Behind a Transpose of the map the axes are listed in
another order, and the weight is transposed to match. α and β are multiplied in, in float64, if
they are not 1; else all values stay bit for bit.

Conditions: channels, height and width of the map are static, the batch may be open. What makes
rows of the map is a Flatten, Reshape, Squeeze, or ReduceMean over space without keepdims. The
layer is Gemm without transA, or MatMul with or without Add; its weight is constant and float32 or
float16 (onnxruntime has no Conv of doubles); its bias is constant and the same for all rows.
Elementwise operators, Dropout and BatchNormalization between the layers come along, as do
constants that vary along the features only. Rows that are read elsewhere, or are outputs, get a
Flatten of their own.

dense=true turns the whole network fully convolutional: the final Flatten goes, height and width of
the inputs become symbols, and a larger image gives a map of predictions [N, K, H', W']. A pool over
the whole map becomes a pool of the size that the map has for one crop, at stride 1::

    GlobalAveragePool of a k×k map → Flatten → Gemm → y   ⇒   AveragePool k×k → Conv 1×1 → y

On an image of the crop's size nothing changes but the shape, [N, K, 1, 1]. On a larger one, the
prediction at (i, j) is what the head says to the window of the last map that begins there. It
equals the prediction for the crop that begins at (i·s, j·s), s the product of all strides, if no
layer pads and no pool rounds up (OverFeat, Sermanet et al. 2014; FCN, Long et al. 2015). Else the
crop's own border is zeros where the large image has pixels, and they differ; the event says so. An
image whose size is open needs the crop's by --shape. Refused is what does not carry over to another
size: Reshape, Gemm that stays, constants that vary over space, squeeze-and-excitation, which would
meet a map of another size, and normalisation over the whole map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pwopt import shapes
from pwopt.editing import Edit
from pwopt.graph import is_op
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass
from pwopt.shapes import Binding

from ._dense import make_dense
from ._heads import LAYERS, Lifting


@dataclass(frozen=True, kw_only=True)
class GemmToConv(Pass):
    """Write fully connected layers behind a map as convolutions.

    Options:
        dense: make the network fully convolutional, so that a larger image gives a map of
            predictions
    """

    name: ClassVar[str] = "gemm-to-conv"
    exact: ClassVar[bool] = True

    dense: bool = False

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Rewrite head by head, a head being all layers behind one map; dense: all or nothing."""
        if self.dense:
            yield from make_dense(model, context)
            return
        layers = [node for node in model.graph.nodes if is_op(node, *LAYERS)]
        if not layers:
            return
        lifting = Lifting(model, shapes.infer(model, Binding({}, {})))
        done: set[int] = set()
        for head in lifting.heads():
            if not head.layers:
                continue
            done |= {id(layer.node) for layer in head.layers}
            replacement = lifting.build(head)
            edit = Edit(model.graph, replacement.old, replacement.new)
            count = len(head.layers)
            reason = f"{count} layer{'s' * (count > 1)} written as Conv"
            yield context.settle(model, edit, head.layers[0].output.name, reason, {"layers": count})
        for node in layers:
            if id(node) not in done:
                why = lifting.why_not(node)
                if why:
                    yield Event("skipped", node.outputs[0].name, why)
