"""Network: an ONNX graph that torch runs, so that its weights can be trained and put back.

The graph stays the truth. Nothing is exported again: initialisers that are weights become
parameters, and their values go back into the same model under the same names.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx import numpy_helper
from torch import Tensor

from pwopt.errors import LearnError
from pwopt.graph import constant, is_op, label
from pwopt.learn.operators import LIMITS, OLDEST, OPERATORS, Node
from pwopt.learn.operators.node import DTYPES, tensor, widened
from pwopt.model import Model
from pwopt.operators import BROADCASTING, is_training
from pwopt.roundtrip import SMALL, with_data

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})

_WEIGHTS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "Add": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
}
"""Which inputs of a layer are weights, if they are constants of floating point."""

_GIVES_ON = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators between a weight and its layer: their first input is the weight."""

_SETTINGS = ("Clip", "Pad", "Resize", "Upsample")
"""Operators whose inputs but the first are settings, which are read on the CPU."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One node to run: what it reads and writes, and what nobody needs after it."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    node: Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...] = ()

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name."""
        inputs = [values[name] if name else None for name in self.inputs]
        result = self.function(self.node, *inputs)
        results = result if isinstance(result, tuple) else (result,)
        named = zip(self.outputs, results, strict=False)  # TopK may give more than is asked for
        return {name: value for name, value in named if name}


class Network(torch.nn.Module):
    """An ONNX graph run by torch; its weights are parameters.

    Computed in float32, half-precision models too, or in float64 where the graph does, unless the
    caller uses `torch.autocast`. As at inference: Dropout drops nothing, BatchNormalization takes
    the mean and variance it has.

    Attributes:
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.

    Raises:
        LearnError: operators that are missing here, all in one line, before anything is run.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        missing = unsupported(model)
        if missing:
            raise LearnError(
                f"{model.name}: cannot be learned, for learning does not know "
                f"{', '.join(missing)}; replace them, or rewrite without learning"
            )
        self._original = model.copy()
        graph = self._original.beside(self._original.proto).graph
        defaults = _defaults(self._original)
        self.inputs = [t.name for t in graph.inputs if t.name not in defaults]
        self.outputs = [t.name for t in graph.outputs]
        weights = _weights(graph)
        self._weights = {name: f"weight{index}" for index, name in enumerate(weights)}
        for name, weight in weights.items():
            parameter = torch.nn.Parameter(tensor(weight.values))
            self.register_parameter(self._weights[name], parameter)
        constants = {
            t.name: tensor(t.values)
            for t in _read(graph)
            if isinstance(t, gs.Constant) and t.name not in weights
        }
        self._steps = _with_last(_steps(graph, constants, weights))
        self._keep_constants(constants | defaults, graph)

    def _keep_constants(self, constants: Mapping[str, Tensor], graph: gs.Graph) -> None:
        """Keep the constants that are still read: sizes on the CPU, data as buffers."""
        read = {name for step in self._steps for name in step.inputs} | {*self.outputs}
        settings = _settings(graph)
        self._settings: dict[str, Tensor] = {}
        self._constants: dict[str, str] = {}
        for name, value in constants.items():
            if name not in read:
                continue
            if name in settings or (not value.is_floating_point() and value.numel() <= SMALL):
                self._settings[name] = value
                continue
            self._constants[name] = f"constant{len(self._constants)}"
            self.register_buffer(self._constants[name], value, persistent=False)

    @property
    def weights(self) -> Mapping[str, torch.nn.Parameter]:
        """Initialiser name → parameter; one that several layers read is one parameter."""
        return {name: self.get_parameter(key) for name, key in self._weights.items()}

    def forward(
        self,
        feeds: Mapping[str, Tensor],
        *,
        also: Collection[str] = (),
        given: Mapping[str, Tensor] = _NOTHING,
    ) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            feeds: Input name → value.
            also: Inner tensors to return beside the outputs.
            given: Tensor name → what the nodes that read it get to see instead of what was
                computed. With the values of another network, every part between them learns on
                its own, all in one run.

        Returns:
            The outputs, and the tensors named in `also`, as they were computed.
        """
        values: dict[str, Tensor] = dict(self._settings)
        for name, key in self._constants.items():
            values[name] = self._buffers[key]  # type: ignore[assignment]  # none is None
        for name, key in self._weights.items():
            values[name] = self._parameters[key]  # type: ignore[assignment]  # likewise
        for name, value in feeds.items():
            values[name] = widened(value)
        wanted = {*self.outputs, *also}
        found = {name: values[name] for name in wanted if name in values}
        values.update(given)
        for step in self._steps:
            for name, value in step.run(values).items():
                if name in wanted:
                    found[name] = value
                if name not in given:
                    values[name] = value
            for name in step.last:
                del values[name]
        return {name: found[name] for name in (*self.outputs, *also)}

    def trained(self) -> Model:
        """Return the model with the weights as they are now; everything else is the same."""
        model = self._original.copy()
        weights = self.weights
        for t in _read(model.graph):
            if t.name in weights:
                known = constant(t)
                assert known is not None
                values = weights[t.name].detach().cpu().numpy()
                known.values = values.astype(known.dtype)
        return model


def unsupported(model: Model) -> list[str]:
    """Name what a network of `model` would miss: operators, and what is asked of known ones."""
    graph = model.graph
    opset = graph.opset
    if opset is None or opset < OLDEST:
        return [f"opset {opset} (the oldest is {OLDEST})"]
    missing = [_missing(node, opset) for node in graph.nodes]
    missing += [
        f"the type {t.dtype} ('{t.name}')"
        for t in (*graph.inputs, *_read(graph))
        if t.dtype is not None and np.dtype(t.dtype).name not in DTYPES
    ]
    return list(dict.fromkeys(text for text in missing if text))


def _missing(node: gs.Node, opset: int) -> str | None:
    if not is_op(node, node.op):
        return f"{node.domain}.{node.op}"
    if node.op not in OPERATORS:
        return f"{node.op} (opset {opset})"
    if opset < 7 and is_op(node, *BROADCASTING) and "axis" in node.attrs:
        return f"{node.op} with axis (opset {opset})"  # broadcast as numpy does not
    if node.op in ("BatchNormalization", "Dropout") and is_training(node, opset):
        return f"{node.op} that trains ('{label(node)}')"
    values = [v for v in node.attrs.values() if isinstance(v, gs.Constant)]
    odd = next((v.dtype.name for v in values if v.dtype.name not in DTYPES), None)
    if odd is not None:
        return f"{node.op} of {odd}"
    limit = LIMITS[node.op](_node(node, opset)) if node.op in LIMITS else None
    return f"{node.op} {limit} ('{label(node)}')" if limit else None


def _node(node: gs.Node, opset: int) -> Node:
    attributes = {
        name: tensor(value.values) if isinstance(value, gs.Constant) else value
        for name, value in node.attrs.items()
    }
    outputs = [index for index, t in enumerate(node.outputs, 1) if not t.is_empty()]
    return Node(node.op, label(node), opset, attributes, max(outputs))


def _read(graph: gs.Graph) -> list[gs.Tensor]:
    """List the tensors that nodes read or that the caller gets, each once."""
    tensors = [t for node in graph.nodes for t in node.inputs if not t.is_empty()]
    return list({id(t): t for t in (*tensors, *graph.outputs)}.values())


def _readers(graph: gs.Graph) -> dict[str, list[tuple[gs.Node, int]]]:
    """Return who reads a tensor, and as which input, by its name."""
    readers: dict[str, list[tuple[gs.Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        for index, t in enumerate(node.inputs):
            readers[t.name].append((node, index))
    return readers


def _weights(graph: gs.Graph) -> dict[str, gs.Constant]:
    """Find what is trained: constants that everybody who reads them reads as a weight."""
    readers, data = _readers(graph), _data(graph)
    outputs = {t.name for t in graph.outputs}

    def is_weight(name: str, *, is_single: bool) -> bool:
        def reads(node: gs.Node, index: int) -> bool:
            if is_op(node, *_GIVES_ON):
                return index == 0 and is_weight(node.outputs[0].name, is_single=is_single)
            if is_single and is_op(node, "Add", "Mul"):
                return False
            is_layer = is_op(node, *_WEIGHTS) and any(t.name in data for t in node.inputs)
            return is_layer and index in _WEIGHTS[node.op]

        return name not in outputs and all(reads(*reader) for reader in readers[name])

    found = {}
    for t in _read(graph):
        known = constant(t)
        if known is None or not DTYPES[known.dtype.name].is_floating_point or not readers[t.name]:
            continue
        if is_weight(t.name, is_single=math.prod(known.shape) <= 1):
            found[t.name] = known
    return found


def _data(graph: gs.Graph) -> set[str]:
    """Find what is computed from the values of the inputs, not from constants and sizes alone."""
    found = {t.name for t in graph.inputs}
    for node in graph.nodes:
        if not is_op(node, "Shape", "Size") and any(t.name in found for t in node.inputs):
            found |= {t.name for t in node.outputs}
    return found


def _settings(graph: gs.Graph) -> set[str]:
    """Find the tensors that are read as settings only."""
    return {
        name
        for name, readers in _readers(graph).items()
        if all(index > 0 and is_op(node, *_SETTINGS) for node, index in readers)
    }


def _defaults(model: Model) -> dict[str, Tensor]:
    """Return the values of inputs that a caller may leave out (ONNX IR.md)."""
    if model.proto.ir_version < 4:
        return {}
    inputs = {info.name for info in model.proto.graph.input}
    return {
        t.name: tensor(numpy_helper.to_array(with_data(t, model.folder)))
        for t in model.proto.graph.initializer
        if t.name in inputs
    }


def _steps(graph: gs.Graph, constants: dict[str, Tensor], weights: Collection[str]) -> list[_Step]:
    """List the nodes to run; what follows from constants alone is computed now, into these."""
    assert graph.opset is not None
    steps = []
    for node in graph.nodes:
        about = _node(node, graph.opset)
        outputs = tuple(t.name for t in node.outputs[: about.outputs])
        inputs = tuple(t.name for t in node.inputs)
        if outputs[0] in weights:  # a Constant
            continue
        step = _Step(OPERATORS[node.op], about, inputs, outputs)
        if all(name in constants for name in inputs if name):
            constants.update(step.run(constants))
        else:
            steps.append(step)
    return steps


def _with_last(steps: Sequence[_Step]) -> list[_Step]:
    """Note at each step which tensors nobody reads later."""
    seen: set[str] = set()
    noted = []
    for step in reversed(steps):
        last = {name for name in (*step.inputs, *step.outputs) if name} - seen
        seen |= last
        noted.append(replace(step, last=tuple(last)))
    return noted[::-1]
