"""The proof lets pass what computes the same, and nothing else."""

from typing import Any

import numpy as np
import pytest
from helpers import parse

from pwopt import runtime
from pwopt.errors import DataError, ModelError
from pwopt.model import Model
from pwopt.proof import TOLERANCE, difference, prove

NET = """
    net (float[N,3,H,W] x) => (float[N,4,H2,W2] y)
    <float[4,3,3,3] w>
    { c = Conv<strides = [2,2]>(x, w)  y = Relu(c) }
"""
SHAPE = {"x": (1, 3, 9, 9)}


def changed(text: str, name: str, factor: float) -> tuple[Model, Model]:
    """Make a model, and one whose weight `name` is scaled."""
    model, other = parse(text), parse(text)
    weight = next(t for n in other.graph.nodes for t in n.inputs if t.name == name)
    weight.values = (weight.values * factor).astype(weight.values.dtype)
    return model, other.copy()


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes of what the models are run on."""
    shapes: list[tuple[int, ...]] = []
    run = runtime.run

    def recorded(session: Any, feeds: runtime.Feeds, *, name: str) -> dict[str, Any]:
        shape = next(iter(feeds.values())).shape
        if shape not in shapes:
            shapes.append(shape)
        return run(session, feeds, name=name)

    monkeypatch.setattr(runtime, "run", recorded)
    return shapes


def test_two_batches_and_sizes_even_and_odd(fed: list[tuple[int, ...]]) -> None:
    assert prove(parse(NET), parse(NET)) == 0
    assert fed == [(1, 3, 224, 224), (3, 3, 256, 256), (1, 3, 257, 257)]


@pytest.mark.parametrize(
    ("declared", "shapes", "expected"),
    [
        ("N,3,9,9", None, [(1, 3, 9, 9), (3, 3, 9, 9)]),
        ("2,3,9,9", None, [(2, 3, 9, 9)]),
        ("N,3,H,W", {"x": (2, 3, 9, 9)}, [(2, 3, 9, 9)]),
        ("1,3,9,W", None, [(1, 3, 9, 224), (1, 3, 9, 256), (1, 3, 9, 257)]),
    ],
)
def test_only_what_is_open_varies(
    fed: list[tuple[int, ...]],
    declared: str,
    shapes: dict[str, tuple[int, ...]] | None,
    expected: list[tuple[int, ...]],
) -> None:
    model = parse(NET.replace("N,3,H,W", declared))
    prove(model, model, shapes)
    assert fed == expected


def test_sizes_that_the_original_does_not_take_are_left_out() -> None:
    text = """
        net (float[N,3,H,W] x) => (float[1,4] y)
        <float[150528,4] w, int64[2] shape = {1, 150528}>
        { f = Reshape(x, shape)  y = Gemm(f, w) }
    """
    assert prove(*changed(text, "w", 1)) == 0
    with pytest.raises(ModelError, match="differs by"):
        prove(*changed(text, "w", 1.001))
    with pytest.raises(ModelError, match="cannot run it"):
        prove(parse(text), parse(text), {"x": (1, 3, 8, 8)})


def test_a_rewrite_that_takes_fewer_sizes_is_a_fault() -> None:
    text = NET.replace("{ c", "{ e = Identity(x) c")
    fixed = parse(
        text.replace("float[4,3,3,3] w", "float[4,3,3,3] w, int64[4] s = {1,3,224,224}").replace(
            "Identity(x)", "Reshape(x, s)"
        )
    )
    with pytest.raises(ModelError, match=r"\(rewritten\): onnxruntime cannot run it"):
        prove(parse(text), fixed)


@pytest.mark.parametrize(
    ("dtype", "limit", "held", "broken"),
    [
        ("float", TOLERANCE["float32"], 1 + 2e-5, 1 + 3e-4),
        ("float16", TOLERANCE["float16"], 1 + 5e-3, 1.05),
    ],
)
def test_tolerances_by_type(dtype: str, limit: float, held: float, broken: float) -> None:
    text = NET.replace("float[", f"{dtype}[")
    assert 0 < prove(*changed(text, "w", held), SHAPE) < limit
    with pytest.raises(ModelError, match=r"output 'y' differs by .* this is a fault"):
        prove(*changed(text, "w", broken), SHAPE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_tolerance_is_relative_to_the_largest_value(dtype: type[Any]) -> None:
    limit = TOLERANCE[np.dtype(dtype).name]
    before = np.array([100, 1], dtype)
    exact = before.astype(np.float64)
    assert difference("m", "y", exact.astype(dtype), before) == 0
    within = np.array([100, 1 + 50 * limit], dtype)
    assert difference("m", "y", before, within) == pytest.approx(limit / 2, rel=0.1)
    with pytest.raises(ModelError, match="m: output 'y' differs by"):
        difference("m", "y", before, np.array([100, 1 + 200 * limit], dtype))


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("values", [[NAN, 1], [INF, 1], [-INF, NAN], [], [0, 0]])
def test_nan_and_infinity_are_equal_to_themselves(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert difference("m", "y", array, array.copy()) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([NAN, 1], [1, 1]),
        ([1, 1], [NAN, 1]),
        ([INF, 1], [-INF, 1]),
        ([1, 1], [1, INF]),
        ([INF, 1], [NAN, 1]),
    ],
)
def test_nan_and_infinity_differ_from_all_else(before: list[float], after: list[float]) -> None:
    with pytest.raises(ModelError, match="differs by"):
        difference("m", "y", np.array(before, np.float32), np.array(after, np.float32))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.array([2**53, 0]), np.array([2**53 + 1, 0])),
        (np.array([100], np.uint8), np.array([101], np.uint8)),
        (np.array([True, False]), np.array([True, True])),
    ],
)
def test_integers_and_booleans_must_be_equal(before: Any, after: Any) -> None:
    assert difference("m", "y", before, before.copy()) == 0
    with pytest.raises(ModelError, match="differs"):
        difference("m", "y", before, after)


def test_shape_and_type_must_be_the_same() -> None:
    one = np.ones((2, 1), np.float32)
    with pytest.raises(ModelError, match=r"float32\[2\] after the rewrite, float32\[2, 1\] before"):
        difference("m", "y", one, one[:, 0])
    with pytest.raises(ModelError, match=r"int64.* after the rewrite, float32"):
        difference("m", "y", one, one.astype(np.int64))


def test_a_model_that_onnxruntime_cannot_run_cannot_be_proven() -> None:
    model = parse(NET.replace("float[", "double["))
    with pytest.raises(
        ModelError, match=r"^net: cannot be proven unchanged .*onnxruntime"
    ) as error:
        prove(model, model)
    assert "\n" not in str(error.value)


def test_a_model_that_takes_strings_cannot_be_proven() -> None:
    model = parse("net (string[N] x) => (string[N] y) { y = Identity(x) }")
    with pytest.raises(DataError, match="input 'x' takes strings"):
        prove(model, model)
