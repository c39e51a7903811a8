"""The exact passes over every model of onnx.backend.test, against the outputs stored there."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

from pwopt import runtime
from pwopt.errors import ModelError, PwoptError
from pwopt.model import Model
from pwopt.registry import pipeline
from pwopt.rewriting import Context
from pwopt.workflow import EXACT, rewrite

KINDS = {"node": 1700, "simple": 20, "pytorch-converted": 80, "pytorch-operator": 30, "real": 9}
"""The collections, and how many models each has at least; `real` are whole networks."""

LARGE = 30_000_000
"""Networks with more weights (AlexNet, VGG-19, ZFNet) are not given theirs; half a gigabyte."""

Array = Any  # numpy's, or a list of them where a model reads or writes sequences


@dataclass(frozen=True)
class Case:
    """A model, its inputs and outputs in order, and how near the outputs must come."""

    name: str
    proto: ModelProto
    inputs: Sequence[Array]
    outputs: Sequence[Array]
    rtol: float
    atol: float

    @property
    def open_inputs(self) -> list[onnx.ValueInfoProto]:
        fixed = {tensor.name for tensor in self.proto.graph.initializer}
        return [info for info in self.proto.graph.input if info.name not in fixed]

    def assert_reproduced_by(self, proto: ModelProto) -> None:
        """Assert that `proto` gives the stored outputs, as the suite's own runner does."""
        actual = run(proto, dict(zip((i.name for i in self.open_inputs), self.inputs, strict=True)))
        for ours, stored in zip(actual, self.outputs, strict=True):
            assert ours.dtype == stored.dtype, self.name
            assert ours.shape == stored.shape, self.name
            np.testing.assert_allclose(
                ours, stored, rtol=self.rtol, atol=self.atol, err_msg=self.name
            )


def run(proto: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """Run in onnxruntime, or in onnx's reference where onnxruntime lacks the operator."""
    try:
        return list(runtime.run(runtime.session(Model(proto)), feeds, name="case").values())
    except ModelError:
        return list(ReferenceEvaluator(proto).run(None, feeds))


# -- the cases --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes expected outputs with NaN
        return [case for kind in KINDS for case in read(kind)]


def read(kind: str) -> Iterator[Case]:
    found = load_model_tests(kind=kind)
    assert len(found) >= KINDS[kind]
    for case in found:
        if case.data_sets is not None:
            yield Case(case.name, case.model, *case.data_sets[0], case.rtol, case.atol)
        elif case.model_dir is not None:
            folder = Path(case.model_dir)
            proto = onnx.load(folder / "model.onnx")
            stored = [values(folder / "test_data_set_0", part) for part in ("input", "output")]
            yield Case(case.name, proto, *stored, case.rtol, case.atol)
        else:
            path = Path(onnx.__file__).parents[1] / case.url
            proto = onnx.load(path)
            case = Case(case.name, proto, [], values(path.parent, f"{path.stem}_output"), 1e-3, 0)
            yield replace(case, inputs=[ramp(info) for info in case.open_inputs])


def values(folder: Path, part: str) -> list[Array]:
    files = sorted(folder.glob(f"{part}_*.pb"), key=lambda file: int(file.stem.split("_")[-1]))
    return [value(file.read_bytes()) for file in files]


def value(data: bytes) -> Array:
    try:
        return numpy_helper.to_array(TensorProto.FromString(data))
    except Exception:  # a sequence, say, which no pass touches
        return None


def ramp(info: onnx.ValueInfoProto) -> Array:
    """What the suite feeds to its networks."""
    shape = [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]
    size = np.prod(shape)
    return (np.arange(size).reshape(shape) / size).astype(np.float32)


def frozen(case: Case) -> Case:
    """Make the stored values of all inputs but the first initialisers, and computed weights too."""
    proto = ModelProto()
    proto.CopyFrom(case.proto)
    proto.ir_version = max(proto.ir_version, 4)
    fixed = {tensor.name for tensor in proto.graph.initializer}
    infos = [info for info in proto.graph.input if info.name not in fixed]
    names = [info.name for info in infos[:1]]
    kept = list(case.inputs[:1])
    for info, array in list(zip(infos, case.inputs, strict=True))[1:]:
        if isinstance(array, np.ndarray) and info.type.HasField("tensor_type"):
            proto.graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            names.append(info.name)
            kept.append(array)
    opened = [info for info in proto.graph.input if info.name in names]
    del proto.graph.input[:]
    proto.graph.input.extend(opened)
    fill(proto)
    return replace(case, proto=proto, inputs=kept)


def fill(proto: ModelProto) -> None:
    """Put initialisers in the place of ConstantOfShape, as which the networks have weights."""
    shapes = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    filled = [
        node
        for node in proto.graph.node
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes
    ]
    weights = [np.full(shapes[node.input[0]], filler(node)) for node in filled]
    if sum(weight.size for weight in weights) > LARGE:
        return
    for node, weight in zip(filled, weights, strict=True):
        proto.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
        proto.graph.node.remove(node)


def filler(node: NodeProto) -> Array:
    """What a ConstantOfShape fills its output with."""
    tensors = [numpy_helper.to_array(attribute.t) for attribute in node.attribute]
    return tensors[0][0] if tensors else np.float32(0)


# -- the sweeps -------------------------------------------------------------------------------


@dataclass
class Tally:
    """Names of cases by what became of them."""

    rewritten: list[str]
    unchanged: list[str]
    refused: list[str]

    def __str__(self) -> str:
        return (
            f"{len(self.rewritten)} rewritten, {len(self.unchanged)} unchanged, "
            f"{len(self.refused)} refused"
        )


def sweep(cases: Sequence[Case], exactly: Callable[[ModelProto], Model | None]) -> Tally:
    """Rewrite every model, and check those that changed; `exactly` returns None for the others."""
    tally = Tally([], [], [])
    for case in cases:
        try:
            result = exactly(case.proto)
        except PwoptError as error:
            print(f"refused: {case.name}: {error}")
            tally.refused.append(case.name)
            continue
        if result is None:
            tally.unchanged.append(case.name)
            continue
        tally.rewritten.append(case.name)
        proto = result.to_proto()
        onnx.checker.check_model(proto, full_check=True)
        case.assert_reproduced_by(proto)
    print(tally)
    return tally


def by_passes(proto: ModelProto) -> Model | None:
    """Run the exact passes alone: every site that is legal, with no judge and no proof."""
    model = Model(proto)
    reports = pipeline(EXACT["always"]).run(model, Context(judge=None))
    if any(report.rewrote for report in reports):
        return model
    assert model.to_proto() == proto
    return None


def by_rewrite(proto: ModelProto) -> Model | None:
    """Do what `pwopt rewrite --exact --gate always` does."""
    result = rewrite(proto, exact=True, gate="always")
    return result.model if result.changed else None


@pytest.mark.parametrize("exactly", [by_passes, by_rewrite])
def test_no_backend_model_is_refused(
    cases: list[Case], exactly: Callable[[ModelProto], Model | None]
) -> None:
    tally = sweep(cases, exactly)
    assert tally.refused == []
    assert len(tally.unchanged) + len(tally.rewritten) == len(cases)


def test_backend_models_with_constant_weights_give_the_stored_outputs(cases: list[Case]) -> None:
    tally = sweep([frozen(case) for case in cases], by_passes)
    assert tally.refused == []
    networks = {"densenet121", "inception_v2", "resnet50", "shufflenet"}
    assert {f"test_{name}" for name in networks} <= {*tally.rewritten}


@pytest.mark.parametrize("name", ["test_shufflenet", "test_resnet50"])
def test_a_proven_network_gives_the_stored_outputs(cases: list[Case], name: str) -> None:
    tally = sweep([frozen(case) for case in cases if case.name == name], by_rewrite)
    assert tally.rewritten == [name]
