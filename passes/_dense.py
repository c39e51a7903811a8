"""Dense: a network made fully convolutional; the conditions stand in `gemm_to_conv`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import shapes
from pwopt.editing import Edit
from pwopt.errors import ModelError
from pwopt.graph import constant, is_only_reader, is_op, is_output, producer, replace
from pwopt.model import Model
from pwopt.operators import BROADCASTING, UNARY, is_over_space, is_same, is_training
from pwopt.rewriting import Context, Event
from pwopt.shapes import Binding, Shape

from ._heads import LAYERS, POOLS, SOFTMAX, VIEWS, Lifting, window


def make_dense(model: Model, context: Context) -> Iterator[Event]:
    """Make the network fully convolutional, or say why that is not possible."""
    graph, given = model.graph, context.shapes or {}
    fed = {i.name for i in shapes.inputs(model)}
    images = [t for t in graph.inputs if t.name in fed and t.outputs]
    where = graph.nodes[-1].outputs[0].name if graph.nodes else ""
    if not images or not where:
        return
    for image in images:
        if not 3 <= len(image.shape) <= 5:
            yield Event("skipped", where, f"input '{image.name}' is no map")
            return
    sizes = {t.name: [t.shape[axis] for axis in _space(t)] for t in images}
    fixed = any(isinstance(size, int) for space in sizes.values() for size in space)
    unknown = [name for name, space in sizes.items() if name not in given and not _are_ints(space)]
    if unknown:
        if fixed or any(is_op(node, *VIEWS, *LAYERS, *POOLS) for node in graph.nodes):
            reason = f"the size of input '{unknown[0]}' is open; give that of a crop with --shape"
            yield Event("skipped", where, reason)
        return

    crop = shapes.bind(model, given)
    if len({tuple(crop.shapes[t.name][axis] for axis in _space(t)) for t in images}) > 1:
        yield Event("skipped", where, "the inputs differ in size")
        return
    lifting = Lifting(model, shapes.infer(model, crop), dense=True)
    edits = [
        Edit(graph, [node], [window(node, node.outputs[0], lifting.known)])
        for node in list(graph.nodes)
        if _pools_all(node, lifting.known)
    ]
    for head in lifting.heads():
        old, new = lifting.build(head)
        if old:
            edits.append(Edit(graph, old, new))
    if not (fixed or edits):
        return
    survey: _Survey | str
    try:
        survey = _survey(model, images, crop, lifting)
    except ModelError as error:
        survey = f"maps no longer fit together on a larger image ({error})"
    if isinstance(survey, str):
        for edit in reversed(edits):
            edit.undo()
        yield Event("skipped", where, survey)
        return
    for edit in edits:
        edit.settle()
        for node in edit.new:
            _bypass(graph, node)
    _open_axes(images, survey)
    size = "×".join(str(crop.shapes[images[0].name][axis]) for axis in _space(images[0]))
    step = "×".join(str(stride) for stride in survey.stride)
    reason = f"made fully convolutional: a prediction every {step} pixels"
    if survey.padded:
        reason += "; layers pad, so predictions differ from those for crops"
    yield Event("rewrote", where, reason, {"crop": size, "stride": step, "padded": survey.padded})


def _space(image: gs.Tensor) -> range:
    """Return the axes of an input that are space: the last ones, unless it is turned at once."""
    rank = len(image.shape)
    turned = [0, rank - 1, *range(1, rank - 1)]
    if all(is_op(node, "Transpose") and node.attrs.get("perm") == turned for node in image.outputs):
        return range(1, rank - 1)
    return range(2, rank)


def _are_ints(sizes: Iterable[object]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _pools_all(node: gs.Node, known: Mapping[str, Shape]) -> bool:
    """Tell whether `node` pools a whole map, of known size, to one pixel."""
    if not is_op(node, *POOLS):
        return False
    shape = known.get(node.inputs[0].name, ())
    if node.op == "ReduceMean" and not (
        node.attrs.get("keepdims", 1) and is_over_space(node, len(shape))
    ):
        return False
    return 3 <= len(shape) <= 5 and _are_ints(shape[2:])


@dataclass
class _Survey:
    """What is known of a network that carries over to larger images."""

    shapes: Mapping[str, Shape]
    """Shapes for one crop."""

    maps: list[gs.Tensor] = field(default_factory=list)
    """All that is computed from the images."""

    stride: tuple[int, ...] = ()
    """Pixels of the image from one prediction to the next, per axis of space."""

    padded: int = 0
    """How many layers look beyond the border."""


def _survey(
    model: Model, images: list[gs.Tensor], crop: Binding, lifting: Lifting
) -> _Survey | str:
    """Look through a network whose heads are convolutions; or say what ties it to one size.

    Raises:
        ModelError: on an image twice as large, shapes do not fit together.
    """
    graph = model.graph
    survey = _Survey(shapes.infer(model, crop))
    strides = {id(image): (1,) * len(_space(image)) for image in images}
    for node in _live(graph):
        read = [strides[id(tensor)] for tensor in node.inputs if id(tensor) in strides]
        if not read and not any(node.subgraphs()):
            continue
        if not _is_local(node, images, strides, survey.shapes, graph.opset):
            return _why_not_dense(node, lifting)
        own = node.attrs.get("strides", [1] * len(read[0]))
        steps = tuple(np.max(read, axis=0) * own)
        strides |= {id(tensor): steps for tensor in node.outputs}
        survey.maps += node.outputs
        survey.padded += _is_padded(node)
        survey.stride = max(survey.stride, steps)
    shapes.infer(model, Binding({t.name: _doubled(t, crop) for t in images}, {}))
    return survey


def _why_not_dense(node: gs.Node, lifting: Lifting) -> str:
    if is_op(node, "Flatten") and node.outputs[0].outputs:
        node = node.outputs[0].outputs[0]  # who wants rows is to blame
    why = lifting.why_not(node) if is_op(node, *LAYERS) else None
    text = f"{node.op} '{node.outputs[0].name}' does not carry over to larger images"
    return f"{text}: {why}" if why else text


def _live(graph: gs.Graph) -> list[gs.Node]:
    """List the nodes that outputs are computed from, in order."""
    dead: set[int] = set()
    for node in reversed(graph.nodes):
        read = any(id(reader) not in dead for tensor in node.outputs for reader in tensor.outputs)
        if not read and not any(is_output(graph, tensor) for tensor in node.outputs):
            dead.add(id(node))
    return [node for node in graph.nodes if id(node) not in dead]


def _doubled(image: gs.Tensor, crop: Binding) -> tuple[int, ...]:
    space, sizes = _space(image), crop.shapes[image.name]
    return tuple(size * (2 if axis in space else 1) for axis, size in enumerate(sizes))


def _is_local(
    node: gs.Node,
    images: list[gs.Tensor],
    maps: Mapping[int, Any],
    known: Mapping[str, Shape],
    opset: int,
) -> bool:
    """Tell whether `node` does the same at every place of its maps, however large they are."""
    first, *others = node.inputs
    rank = len(known.get(node.outputs[0].name, ()))
    if is_op(node, *BROADCASTING):
        constants = [constant(tensor) for tensor in node.inputs if id(tensor) not in maps]
        uniform = all(c is not None and prod(c.shape[-(rank - 2) :]) == 1 for c in constants)
        return uniform and rank > 2 and "axis" not in node.attrs
    if is_op(node, "Concat", "Split", *SOFTMAX):
        default = {"Concat": 1, "Split": 0}.get(node.op, -1)
        by_channel = rank > 2 and node.attrs.get("axis", default) % rank == 1
        return by_channel and (opset >= 13 or not is_op(node, *SOFTMAX))
    if id(first) not in maps or any(id(tensor) in maps for tensor in others):
        return False
    if is_op(node, "MaxPool"):
        return len(node.outputs) == 1  # indices count through one map
    if is_op(node, "BatchNormalization"):
        return not is_training(node, opset) and len(node.outputs) == 1
    if is_op(node, "Transpose"):
        return any(first is image for image in images) and _space(first).start == 1
    return is_op(node, *UNARY, "Dropout", "Conv", "AveragePool", "LpPool", "LRN", "Pad")


def _is_padded(node: gs.Node) -> bool:
    attrs = node.attrs
    if is_same(node) or attrs.get("ceil_mode", 0):
        return True
    return is_op(node, "Pad") or any(attrs.get("pads", ()))


def _bypass(graph: gs.Graph, node: gs.Node) -> None:
    """Let the node before an Identity write what that writes, if nobody else reads it."""
    source = node.inputs[0]
    before = producer(source)
    if not is_op(node, "Identity") or before is None or not is_only_reader(graph, node, source):
        return
    target = node.outputs[0]
    node.outputs.clear()
    before.outputs[next(i for i, t in enumerate(before.outputs) if t is source)] = target
    replace(graph, node, [])


def _open_axes(images: list[gs.Tensor], survey: _Survey) -> None:
    """Let inputs and all maps say that their height and width are open."""
    for image in images:
        space = _space(image)
        for axis, symbol in zip(space, ("D", "H", "W")[-len(space) :], strict=True):
            if isinstance(image.shape[axis], int):
                image.shape[axis] = symbol
    for tensor in survey.maps:
        shape = survey.shapes.get(tensor.name)
        if tensor.shape is not None and shape is not None:
            batch = tensor.shape[0] if tensor.shape else None
            tensor.shape = [batch, shape[1], *[None] * (len(shape) - 2)]
