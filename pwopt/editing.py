"""Edit: nodes of a graph replaced by others, in a way that can be taken back."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from pwopt.graph import producer, remove_if_unread


class Edit:
    """Puts `new` nodes in the place of `old` ones; call `settle` to keep it, `undo` not to.

    The new nodes come wired: they read what they need, and write the very tensors that the rest of
    the graph, or its caller, reads of the old ones. Each stands behind what it reads, the first
    not before the first old one.
    """

    def __init__(self, graph: gs.Graph, old: Sequence[gs.Node], new: Sequence[gs.Node]) -> None:
        self.graph = graph
        self.old = tuple(old)
        self.new = tuple(new)
        self._wires = {id(n): (list(n.inputs), list(n.outputs)) for n in (*old, *new)}
        self._before = list(graph.nodes)
        _unwire(self.old)
        self._after = _placed(self._before, self.old, self.new)
        graph.nodes[:] = self._after

    def undo(self) -> None:
        """Bring the old nodes back, as they were."""
        self._swap(self.new, self.old, self._before)

    def redo(self) -> None:
        """Put the new nodes in again."""
        self._swap(self.old, self.new, self._after)

    def settle(self) -> None:
        """Remove what only the old nodes needed. From here on there is no way back."""
        for node in self.old:
            for tensor in self._wires[id(node)][0]:
                remove_if_unread(self.graph, tensor)

    def _swap(self, out: Sequence[gs.Node], in_: Sequence[gs.Node], nodes: list[gs.Node]) -> None:
        _unwire(out)
        for node in in_:
            inputs, outputs = self._wires[id(node)]
            node.inputs.extend(inputs)
            node.outputs.extend(outputs)
        self.graph.nodes[:] = nodes


def _unwire(nodes: Sequence[gs.Node]) -> None:
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()


def _placed(
    nodes: Sequence[gs.Node], old: Sequence[gs.Node], new: Sequence[gs.Node]
) -> list[gs.Node]:
    gone = {id(node) for node in old}
    place = next(i for i, node in enumerate(nodes) if id(node) in gone)
    result = [node for node in nodes if id(node) not in gone]
    for node in new:
        writers = {id(producer(tensor)) for tensor in node.inputs}
        ready = max((i + 1 for i, other in enumerate(result) if id(other) in writers), default=0)
        place = max(place, ready)
        result.insert(place, node)
        place += 1
    return result
