"""Teacher and student walk through a network together, from the first layer to the last.

The teacher is the network as it is. The student is the same network, but for the layers that were
replaced on the way; it is what later layers have to cope with (asymmetric reconstruction; Zhang et
al. 2015, "Accelerating Very Deep Convolutional Networks").

The graph is cut, in its own order, before and behind each layer. What lies between two cuts runs
as a model of its own, on the teacher's values and on the student's. Values that are needed further
on are kept for all batches: in memory up to `MEMORY` bytes, else in files of a temporary folder
(see `tempfile.gettempdir`). What the student has in common with the teacher is computed and kept
once. Constants, and what is computed from them alone, belong to every model that reads them.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from pwopt import runtime
from pwopt.calibration.samples import real
from pwopt.data import Batch
from pwopt.data.samples import fed_rows
from pwopt.files import ScratchFolder
from pwopt.linear import Linear
from pwopt.model import Model
from pwopt.runtime import Array
from pwopt.shapes import inputs

MEMORY = 1 << 29
"""Bytes of values that are kept in memory."""

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike")


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """One batch: what teacher and student have computed and somebody still reads."""

    rows: int
    samples: int
    teacher: "dict[str, _Value]"
    student: "dict[str, _Value]"

    def differs(self, names: Iterable[str]) -> bool:
        return any(self.teacher[name] is not self.student[name] for name in names)

    def arrays(self, names: Iterable[str]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the teacher's and the student's arrays; what is the same, is the same array."""
        teacher = {name: self.teacher[name].array() for name in names}
        student = {
            name: self.student[name].array() if self.differs([name]) else array
            for name, array in teacher.items()
        }
        return teacher, student

    def real(self, array: Array) -> Array:
        return real(array, self.rows, self.samples)

    def keep(self, names: set[str]) -> None:
        for values in (self.teacher, self.student):
            for name in values.keys() - names:
                del values[name]


@dataclass(eq=False, slots=True)
class Stop:
    """A layer that teacher and student have reached.

    Attributes:
        layer: The layer.
        input: The tensor that it reads.
        frontier: The tensors computed so far that it or later nodes read.
        behind: The tensors that nodes behind the layer read, its output among them.
    """

    layer: Linear
    input: str
    frontier: tuple[str, ...]
    behind: tuple[str, ...]
    _states: Sequence[_State]
    _outputs: "Sequence[_Value]"
    _make_tail: Callable[[], Model]
    _run: Callable[[Array], Array] | None = None

    def pairs(self) -> Iterator[tuple[Array, Array, Array]]:
        """Yield for each batch the teacher's input of the layer, the student's, and its output.

        The output is the teacher's. Rows that only fill up a batch are left away.
        """
        for values, state, output in zip(
            self.values(self.input), self._states, self._outputs, strict=True
        ):
            yield *values, state.real(output.array())

    def values(self, name: str) -> Iterator[tuple[Array, Array]]:
        """Yield for each batch what teacher and student have for a tensor of the frontier.

        Both are one array where they have the same. Rows that only fill up a batch are left away.
        """
        for state in self._states:
            teacher, student = (arrays[name] for arrays in state.arrays([name]))
            ours = state.real(teacher)
            yield ours, ours if student is teacher else state.real(student)

    def feeds(self) -> Iterator[tuple[Array, dict[str, Array]]]:
        """Yield for each batch what the teacher's layer reads, and all that its tail reads.

        Rows that only fill up a batch are among them.
        """
        for state, output in zip(self._states, self._outputs, strict=True):
            known = {**state.teacher, self.layer.where: output}
            yield known[self.input].array(), {name: known[name].array() for name in self.behind}

    def replace(self, run: Callable[[Array], Array]) -> None:
        """Let the student compute the layer's output by `run` from its own input, batch by batch.

        Else it runs the layer as it is. `run` is given all rows, and called after the stop.
        """
        self._run = run

    def tail(self) -> Model:
        """Make the network behind this layer: its inputs are `behind`.

        Its outputs are those of the network that are not computed before.
        """
        return self._make_tail()


class Walk:
    """Teacher and student between the layers of a network.

    Iterating gives the stops, in the order of the graph; each is of use until the next one is asked
    for. A layer that reads constants alone, or that nobody reads, is passed by.
    """

    def __init__(
        self, model: Model, layers: Sequence[Linear], batches: Sequence[Batch], *, threads: int = 1
    ) -> None:
        """Cut the network.

        Args:
            model: The network; stays as it is. Its weights are written to a temporary file,
                unless they lie in files already.
            layers: Layers of its graph, in any order.
            batches: What to feed.
            threads: Threads within one operator.
        """
        self._network = _Network(model)
        self._steps = _steps(self._network, {layer.where: layer for layer in layers})
        self._name = model.name
        self._batches = batches
        self._rows = [fed_rows(batch.feeds, inputs(model)) for batch in batches]
        self._threads = threads
        self._ends: list[_State] = []

    def __iter__(self) -> Iterator[Stop]:
        """Walk, and stop before each of the layers.

        Raises:
            ModelError: onnxruntime cannot run a part of the network.
            ValueError: a replacement's output has another shape than the layer's.
        """
        store, states = _Store(), []
        for batch, rows in zip(self._batches, self._rows, strict=True):
            values = {name: _Value(array) for name, array in batch.feeds.items()}
            states.append(_State(rows, batch.samples, values, dict(values)))
        for index, step in enumerate(self._steps):
            run = self._runner(step, states, store)
            taught = [run(state.teacher) for state in states]
            replacement = None
            if step.layer is not None:
                stop = self._stop(index, step.layer, states, taught)
                yield stop
                replacement = stop._run
            for state, written in zip(states, taught, strict=True):
                learnt = written
                if replacement is not None:
                    learnt = _replaced(replacement, step, state, written, store)
                elif state.differs(step.reads):
                    learnt = run(state.student)
                state.teacher.update(written)
                state.student.update(learnt)
                state.keep(step.needed)
        self._ends = states

    def outputs(self) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Yield for each batch the network's outputs, the teacher's and the student's.

        Rows that only fill up a batch are left away. There are none before the walk's end.
        """
        for state in self._ends:
            teacher, student = state.arrays(self._network.outputs)
            yield (
                {name: state.real(array) for name, array in teacher.items()},
                {name: state.real(array) for name, array in student.items()},
            )

    def _runner(
        self, step: "_Step", states: Sequence[_State], store: "_Store"
    ) -> Callable[[Mapping[str, "_Value"]], dict[str, "_Value"]]:
        """Load the model of a step; return what runs it on one batch's values."""
        read = [_describe(name, [s.teacher[name] for s in states]) for name in step.reads]
        part = self._network.part(step.nodes, read, step.writes)
        session = runtime.session(part, threads=self._threads)

        def run(values: Mapping[str, _Value]) -> dict[str, _Value]:
            feeds = {name: values[name].array() for name in step.reads}
            outputs = runtime.run(session, feeds, name=self._name)
            return {name: store.put(array) for name, array in outputs.items()}

        return run

    def _stop(
        self,
        index: int,
        layer: Linear,
        states: Sequence[_State],
        taught: Sequence[dict[str, "_Value"]],
    ) -> Stop:
        later = {name for step in self._steps[index:] for name in step.reads}
        outputs = [written[layer.where] for written in taught]
        behind = self._read_behind(index)
        known = [
            {**state.teacher, layer.where: output}
            for state, output in zip(states, outputs, strict=True)
        ]
        return Stop(
            layer,
            self._steps[index].reads[0],
            tuple(name for name in states[0].teacher if name in later),
            tuple(behind),
            states,
            outputs,
            lambda: self._tail(index, [_describe(n, [v[n] for v in known]) for n in behind]),
        )

    def _read_behind(self, index: int) -> list[str]:
        """List what is computed by a step or before it, and read behind it; its output first."""
        steps = self._steps[index + 1 :]
        written = {name for step in steps for name in step.writes}
        read = (name for step in steps for name in step.reads if name not in written)
        return list(dict.fromkeys([*self._steps[index].writes, *read]))

    def _tail(self, index: int, read: Sequence[ValueInfoProto]) -> Model:
        """Make the network behind a step; an output that the step writes is passed on."""
        steps = self._steps[index:]
        nodes = [node for step in steps[1:] for node in step.nodes]
        written = {name for step in steps for name in step.writes}
        outputs = [name for name in self._network.outputs if name in written]
        return self._network.part(nodes, read, outputs)


def _replaced(
    run: Callable[[Array], Array],
    step: "_Step",
    state: _State,
    written: Mapping[str, "_Value"],
    store: "_Store",
) -> dict[str, "_Value"]:
    """Run the replacement of a layer on the student's input."""
    learnt = {}
    for name, output in written.items():
        array = np.asarray(run(state.student[step.reads[0]].array()), output.dtype)
        if array.shape != output.shape:
            raise ValueError(f"'{name}': {array.shape} cannot replace {output.shape}")
        learnt[name] = store.put(array)
    return learnt


# -- the network in parts ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """Nodes that run as one model: a layer, or those between two layers.

    `reads` and `writes` are its inputs, and those of its tensors that are read later on; `needed`
    is all that is read later on.
    """

    layer: Linear | None
    nodes: list[NodeProto]
    reads: list[str]
    writes: list[str]
    needed: set[str]


class _Network:
    """The messages of a model: nodes that depend on inputs, and all that does not.

    Its weights lie in a file, which all parts share.
    """

    def __init__(self, model: Model) -> None:
        self._model = model.moved_out()
        proto = self._model.proto
        self._head = ModelProto(ir_version=max(proto.ir_version, 4), functions=proto.functions)
        self._head.opset_import.extend(proto.opset_import)
        self._head.graph.name = "part"
        self._tensors = proto.graph.initializer
        self._sparse_tensors = proto.graph.sparse_initializer
        self._sources: list[NodeProto] = []
        self.nodes: list[NodeProto] = []
        self.outputs = [output.name for output in proto.graph.output]
        self.constants = {t.name for t in self._tensors}
        self.constants |= {t.values.name for t in self._sparse_tensors}
        for node in proto.graph.node:
            may_be = node.input and node.op_type not in _RANDOM
            if node.op_type == "Constant" or (may_be and _reads(node) <= self.constants):
                self._sources.append(node)
                self.constants.update(filter(None, node.output))
            else:
                self.nodes.append(node)

    def part(
        self, nodes: Sequence[NodeProto], read: Sequence[ValueInfoProto], outputs: Sequence[str]
    ) -> Model:
        """Make a model of some nodes, with the constants that they read."""
        wanted = {name for node in nodes for name in _reads(node)} | set(outputs)
        sources = []
        for node in reversed(self._sources):
            if wanted & set(node.output):
                sources.append(node)
                wanted |= _reads(node)
        proto = ModelProto()
        proto.CopyFrom(self._head)
        proto.graph.node.extend([*reversed(sources), *nodes])
        proto.graph.input.extend(read)
        proto.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
        proto.graph.initializer.extend(t for t in self._tensors if t.name in wanted)
        proto.graph.sparse_initializer.extend(
            t for t in self._sparse_tensors if t.values.name in wanted
        )
        return self._model.beside(proto)


def _steps(network: _Network, layers: Mapping[str, Linear]) -> list[_Step]:
    """Cut a network before and behind each layer."""
    groups: list[tuple[Linear | None, list[NodeProto]]] = [(None, [])]
    for node in network.nodes:
        layer = layers.get(node.output[0])
        if layer is None:
            groups[-1][1].append(node)
        else:
            groups += [(layer, [node]), (None, [])]
    needed = set(network.outputs)
    steps: list[_Step] = []
    for layer, nodes in reversed(groups):
        written = [name for node in nodes for name in node.output if name]
        # Outputs that are constants are written at the end.
        fixed = network.constants & set(network.outputs) if not steps else set()
        writes = [name for name in (*written, *sorted(fixed)) if name in needed]
        read = dict.fromkeys(name for node in nodes for name in _ordered_reads(node))
        reads = [n for n in read if n not in written and n not in network.constants]
        if writes:  # else nobody reads what the nodes compute
            steps.append(_Step(layer, nodes, reads, writes, needed))
            needed = needed.difference(writes).union(reads)
    return steps[::-1]


def _reads(node: NodeProto) -> set[str]:
    return set(_ordered_reads(node))


def _ordered_reads(node: NodeProto) -> Iterator[str]:
    """Yield the tensors that a node reads, those that graphs inside it read too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            yield from _taken(graph)


def _taken(graph: GraphProto) -> Iterator[str]:
    own = {info.name for info in graph.input} | {t.name for t in graph.initializer}
    own |= {t.values.name for t in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    read = [name for node in graph.node for name in _ordered_reads(node)]
    yield from (n for n in (*read, *(o.name for o in graph.output)) if n not in own)


# -- values -----------------------------------------------------------------------------------


class _Value:
    """An array in memory."""

    def __init__(self, array: Array) -> None:
        self.dtype, self.shape = array.dtype, array.shape
        self._array = array

    def array(self) -> Array:
        return self._array


class _Stored(_Value):
    """An array in a file; the store that owns the folder lives as long."""

    def __init__(self, array: Array, path: Path, store: "_Store") -> None:
        self.dtype, self.shape = array.dtype, array.shape
        self._path, self._store = path, store
        np.save(path, array)
        weakref.finalize(self, path.unlink, missing_ok=True)

    def array(self) -> Array:
        array: Array = np.load(self._path)
        return array


class _Store:
    """Keeps values in memory while there is room, else in files; frees them when unreferenced."""

    def __init__(self) -> None:
        self._free = MEMORY
        self._numbers = count()
        self._folder: ScratchFolder | None = None

    def put(self, array: Array) -> _Value:
        if array.nbytes <= self._free:
            self._free -= array.nbytes
            value = _Value(array)
            weakref.finalize(value, self._give_back, array.nbytes)
            return value
        if self._folder is None:
            self._folder = ScratchFolder()
        return _Stored(array, Path(self._folder) / f"{next(self._numbers)}.npy", self)

    def _give_back(self, size: int) -> None:
        self._free += size


def _describe(name: str, values: Sequence[_Value]) -> ValueInfoProto:
    """Declare an input of a part; axes whose size changes from batch to batch are open."""
    kind = helper.np_dtype_to_tensor_dtype(values[0].dtype)
    shapes = [value.shape for value in values]
    if len({len(shape) for shape in shapes}) > 1:
        return helper.make_tensor_value_info(name, kind, None)
    sizes: list[Any] = [
        axis[0] if len(set(axis)) == 1 else None for axis in zip(*shapes, strict=True)
    ]
    return helper.make_tensor_value_info(name, kind, sizes)
