"""Drop-identity: let the readers of an Identity read what it copies.

Before → after::

    x → Identity → y → …      ⇒      x → …

Conditions: nobody outside the graph sees y.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pwopt import Context, Event, Model, Pass
from pwopt.graph import is_op, is_output, replace


@dataclass(frozen=True, kw_only=True)
class DropIdentity(Pass):
    """Remove Identity operators.

    Options:
        keep: leave the ones alone whose output has this name
    """

    name: ClassVar[str] = "drop-identity"
    exact: ClassVar[bool] = True

    keep: str | None = None

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        graph = model.graph
        for node in [node for node in graph.nodes if is_op(node, "Identity")]:
            source, copy = node.inputs[0], node.outputs[0]
            if is_output(graph, copy):
                yield Event("skipped", copy.name, "is an output of the model")
                continue
            if copy.name == self.keep:
                yield Event("skipped", copy.name, "is to be kept")
                continue
            for reader in list(copy.outputs):
                reader.inputs = [source if tensor is copy else tensor for tensor in reader.inputs]
            replace(graph, node, [])
            yield Event("rewrote", copy.name, f"its readers read {source.name}")
