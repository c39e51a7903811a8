"""Pipelines as text, there and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwopt.errors import SpecError
from pwopt.model import Model
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.fold_affine import FoldAffine
from pwopt.registry import passes
from pwopt.rewriting import Context, Event, Pass, Pipeline
from pwopt.spec import parse_pipeline


@dataclass(frozen=True, kw_only=True)
class Everything(Pass):
    """Has an option of every type."""

    name: ClassVar[str] = "every-thing"
    exact: ClassVar[bool] = True

    count: int
    ratio: float = 0.5
    label: str = "a"
    loud: bool = False
    choice: Literal["one", "two"] = "one"
    level: Literal[1, 2] = 1
    limit: int | None = None
    scale: Optional[float] = 1.0  # noqa: UP045  # plug-ins may write it so
    mode: Literal["fast", "slow"] | None = None

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        yield from ()


KNOWN = {kind.name: kind for kind in (Everything, FoldAffine, Bottleneck)}


def parse(text: str) -> Pipeline:
    return parse_pipeline(text, KNOWN)


words = st.from_regex(r"[A-Za-z0-9_.=\-/:äß]([A-Za-z0-9_ .=\-/:äß]*[A-Za-z0-9_.])?", fullmatch=True)
everything = st.builds(
    Everything,
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    label=words,
    loud=st.booleans(),
    choice=st.sampled_from(["one", "two"]),
    level=st.sampled_from([1, 2]),
    limit=st.none() | st.integers(),
    scale=st.none() | st.floats(allow_nan=False),
    mode=st.none() | st.sampled_from(["fast", "slow"]),
)
bottleneck = st.builds(
    Bottleneck,
    rank=st.integers(min_value=1),
    sides=st.sampled_from(["auto", "input", "output", "both"]),
    min_channels=st.integers(min_value=1),
)
pipelines = st.lists(
    st.one_of(everything, bottleneck, st.just(FoldAffine())), min_size=1, max_size=4
).map(lambda steps: Pipeline(tuple(steps)))


@given(pipelines)
def test_every_pipeline_survives_being_written(pipeline: Pipeline) -> None:
    assert parse(str(pipeline)) == pipeline


@given(pipelines, st.sampled_from([" ", "\t", "\n  "]))
def test_white_space_between_the_parts_is_free(pipeline: Pipeline, space: str) -> None:
    text = str(pipeline)
    for mark in ",{}":
        text = text.replace(mark, f"{space}{mark}{space}")
    assert parse(space + text + space) == pipeline


def test_every_built_in_pass_survives() -> None:
    for kind in passes().values():
        step = kind(rank=3) if kind is Bottleneck else kind()
        assert parse_pipeline(str(step), passes()).passes == (step,)


def test_only_what_differs_from_the_default_is_written() -> None:
    assert str(Pipeline((FoldAffine(), Bottleneck(rank=64)))) == "fold-affine,bottleneck{rank=64}"
    step = Everything(count=1, loud=True, limit=3, scale=None, mode="slow")
    assert str(step) == "every-thing{count=1,loud=true,limit=3,scale=None,mode=slow}"
    assert parse("fold-affine{}") == Pipeline((FoldAffine(),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read ''; write passes as in"),
        ("  ", "cannot read '"),
        (",", "cannot read ','"),
        ("fold-affine,", "cannot read ''"),
        ("fold-affine,,fold-affine", "cannot read ',fold-affine'"),
        ("fold-affine fold-affine", "cannot read"),
        ("fold-affine;", "cannot read"),
        ("bottleneck{rank=8", "cannot read"),
        ("bottleneck{rank={8}}", "cannot read"),
        ("bottleneck rank=8", "cannot read"),
        ("nonsense", "unknown pass 'nonsense'; there are bottleneck, every-thing, fold-affine"),
        ("Fold-Affine", "unknown pass 'Fold-Affine'"),
        ("bottleneck", "bottleneck: option 'rank' is missing"),
        ("bottleneck{sides=both}", "bottleneck: option 'rank' is missing"),
        ("bottleneck{rang=8}", "bottleneck: unknown option 'rang'; it has rank, sides, min_ch"),
        ("fold-affine{x=1}", "fold-affine: unknown option 'x'; it has none"),
        ("bottleneck{rank=8,rank=9}", "bottleneck: option 'rank' is given twice"),
        ("bottleneck{rank}", "bottleneck: 'rank' is no option; write bottleneck{name=value}"),
        ("bottleneck{rank=}", "bottleneck: 'rank=' is no option"),
        ("bottleneck{=8}", "bottleneck: '=8' is no option"),
        ("bottleneck{rank=8,}", "bottleneck: '' is no option"),
        ("bottleneck{rank=8.5}", "bottleneck: rank must be a whole number, not '8.5'"),
        ("bottleneck{rank=none}", "bottleneck: rank must be a whole number, not 'none'"),
        ("bottleneck{rank=0}", "bottleneck: rank must be at least 1, not 0"),
        ("bottleneck{rank=-4}", "bottleneck: rank must be at least 1, not -4"),
        ("bottleneck{rank=4,min_channels=0}", "min_channels must be at least 1, not 0"),
        ("bottleneck{rank=4,sides=left}", "sides must be one of auto, input, output, both, not"),
        ("every-thing{count=1,ratio=half}", "ratio must be a number, not 'half'"),
        ("every-thing{count=1,loud=yes}", "loud must be true or false, not 'yes'"),
        ("every-thing{count=1,level=3}", "level must be one of 1, 2, not '3'"),
        ("every-thing{count=1,limit=few}", "limit must be a whole number, not 'few'"),
        ("every-thing{count=1,mode=medium}", "mode must be one of fast, slow, not 'medium'"),
    ],
)
def test_what_is_wrong_is_told(text: str, reason: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="fold-afine,bottlck{}rank=8 \n", max_size=40))
def test_any_text_is_a_pipeline_or_a_spec_error(text: str) -> None:
    try:
        pipeline = parse(text)
    except SpecError:
        return
    assert parse(str(pipeline)) == pipeline
