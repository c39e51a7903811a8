"""The front of speed against accuracy: which points are on it, as JSON, table and picture."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pwopt.errors import PwoptError
from pwopt.report.front import draw, from_json, require_picture, table, to_json
from pwopt.report.style import plain
from pwopt.search.front import Front, Point, pareto


def point(speedup: float, drop: float | None, **fields: object) -> Point:
    values: dict[str, object] = {
        "speedup": speedup,
        "speedup_ci95": (speedup - 0.05, speedup + 0.05),
        "predicted_ms": 9.5 / speedup,
        "measured_ms": 10 / speedup,
        "macs": 300_000_000,
        "params": 15_000_000,
        "drop_points": drop,
        "drop_ci95": None if drop is None else (drop - 0.3, drop + 0.4),
        "agreement": 0.97,
        "agreement_ci95": (0.96, 0.98),
        "foretold_points": None,
        "error": 0.01 * speedup,
        "other_error": 0.0,
        "ranks": {"conv3": "both 64"},
    }
    return Point(**{**values, **fields})  # type: ignore[arg-type]


def front(*points: Point, chosen: int | None = 1) -> Front:
    original = point(
        1, 0.0, speedup_ci95=(1.0, 1.0), drop_ci95=(0.0, 0.0), agreement=1.0, error=0.0, ranks={}
    )
    if points and points[0].drop_points is None:
        original = replace(
            original, drop_points=None, drop_ci95=None, agreement=points[0].agreement and 1.0
        )
    return Front(
        model="net.onnx",
        original=original,
        points=points,
        chosen=chosen,
        threads=1,
        batch=1,
        samples=1000,
    )


EXAMPLE = front(point(3.0, 0.92), point(2.0, 0.4), point(1.8, 0.7), point(1.5, -0.1))


def without(example: Front, *names: str) -> Front:
    """Leave fields of all points unknown."""
    unknown = dict.fromkeys(names)
    return replace(
        example,
        original=replace(example.original, **unknown),  # type: ignore[arg-type]
        points=tuple(replace(p, **unknown) for p in example.points),  # type: ignore[arg-type]
    )


AGREEMENT = without(EXAMPLE, "drop_points", "drop_ci95", "macs", "predicted_ms")
_ERROR = without(AGREEMENT, "agreement", "agreement_ci95")
ERROR = replace(_ERROR, points=tuple(replace(p, other_error=p.error) for p in _ERROR.points))


def test_pareto() -> None:
    a, b, c, d = point(1.5, 0.1), point(2, 0.5), point(1.8, 0.5), point(1.5, 0.2)
    assert pareto([b, d, a, c]) == [a, b]
    assert pareto([a, replace(a, params=1)]) == [a]
    assert pareto([]) == []


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12))
def test_pareto_holds_exactly_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    beaten = {
        (s, d) for s, d in pairs if any(t >= s and e <= d and (t, e) != (s, d) for t, e in pairs)
    }
    best = [(p.speedup, p.drop_points) for p in pareto(point(*pair) for pair in pairs)]
    assert best == sorted({*pairs} - beaten)


def test_loss_is_by_the_first_measure_that_is_known() -> None:
    labelled, unlabelled = point(2, 0.4), point(2, None)
    other = point(2, None, agreement=None, agreement_ci95=None, other_error=0.02)
    assert (labelled.measure, labelled.loss) == ("top-1", 0.4)
    assert (unlabelled.measure, unlabelled.loss) == ("agreement", pytest.approx(3))
    assert (other.measure, other.loss) == ("error", pytest.approx(2))
    with pytest.raises(ValueError, match="same measure"):
        front(labelled, other)


@pytest.mark.parametrize("example", [EXAMPLE, AGREEMENT, ERROR, front(chosen=None)])
def test_json_both_ways(example: Front) -> None:
    assert from_json(to_json(example)) == example


def test_other_outputs_count_where_they_are_further_off() -> None:
    for drop, lost, worst in ((0.4, 0.4, 0.8), (None, 3, 4)):
        both = point(2, drop, other_error=0.05)
        assert (both.loss, both.worst_loss) == (pytest.approx(5), pytest.approx(5))
        both = point(2, drop, other_error=0.001)
        assert (both.loss, both.worst_loss) == (pytest.approx(lost), pytest.approx(worst))


def test_what_is_foretold_counts_where_it_is_more_than_what_is_counted() -> None:
    for drop, lost, worst in ((0.4, 0.4, 0.8), (None, 3, 4)):
        lucky = point(2, drop, foretold_points=5.0)
        assert (lucky.loss, lucky.worst_loss) == (5, 5)
        unlucky = point(2, drop, foretold_points=0.1)
        assert (unlucky.loss, unlucky.worst_loss) == (pytest.approx(lost), pytest.approx(worst))


def test_what_is_foretold_is_shown_where_it_is_known() -> None:
    assert "foretold" not in plain(table(EXAMPLE))
    foretold = front(point(3.0, 0.92, foretold_points=0.81))
    foretold = replace(
        foretold, original=replace(foretold.original, foretold_points=0.0), chosen=None
    )
    lines = plain(table(foretold)).splitlines()
    assert "foretold" in lines[1]
    assert "top-1, points" in lines[1]
    assert "−0.92 [−1.32, −0.62]     −0.81" in lines[3]


def test_what_is_shown_is_what_a_front_goes_by() -> None:
    lucky, honest = point(2.0, 0.2, foretold_points=1.0), point(2.1, 0.9, foretold_points=0.9)
    assert pareto([lucky, honest]) == [lucky, honest]


def test_the_table_fits_on_a_page() -> None:
    poor = point(
        13.52,
        33.71,
        drop_ci95=(15.4, 51.3),
        foretold_points=24.42,
        error=0.0652,
        predicted_ms=12.25,
        macs=313_463_808,
        params=1_953_866,
    )
    found = front(poor, chosen=0)
    original = replace(found.original, foretold_points=0.0)
    _, heading, _, row, _ = plain(table(replace(found, original=original))).splitlines()
    assert heading.split()[-5:] == ["foretold", "error", "MACs", "params", "split"]
    assert row.split()[-7:] == ["−24.42", "0.0652", "313", "M", "1.95", "M", "1"]


def test_json_names_the_front() -> None:
    result = json.loads(to_json(EXAMPLE))
    assert next(iter(result)) == "schema"
    assert (result["schema"], result["chosen"], result["front"]) == (1, 1, [3, 1, 0])
    assert result["points"][1]["ranks"] == {"conv3": "both 64"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', to_json(EXAMPLE).replace("1", "2", 1)]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PwoptError, match=r"^curve.json: is not the JSON of a front"):
        from_json(text, name="curve.json")


def test_table() -> None:
    lines = plain(table(EXAMPLE)).splitlines()
    assert lines[0] == "net.onnx: speed against accuracy"
    assert [line.split("×")[0].split() for line in lines[2:6]] == [
        ["original", "1.00"],
        ["1.50"],
        ["chosen", "2.00"],
        ["3.00"],
    ]
    assert "−0.40 [−0.80, −0.10]" in lines[4]
    assert "2.00× [1.95, 2.05]     5 ms    4.75 ms" in lines[4]
    assert "+0.10 [−0.30, +0.40]" in lines[3]
    assert "1 more were tried" in lines[-1]


def test_table_shows_the_chosen_point_though_it_is_beaten() -> None:
    lines = plain(table(replace(EXAMPLE, chosen=2))).splitlines()
    starts = [line.split("×")[0].split() for line in lines[3:7]]
    assert starts == [["1.50"], ["chosen", "1.80"], ["2.00"], ["3.00"]]


def test_table_without_labels() -> None:
    text = plain(table(AGREEMENT))
    assert "agreement, %" in text
    assert "97.00 [96.00, 98.00]" in text
    assert "points" not in text
    assert "agreement" not in plain(table(ERROR))


@pytest.mark.parametrize("example", [EXAMPLE, AGREEMENT, ERROR, front(chosen=None)])
def test_picture(example: Front, tmp_path: Path) -> None:
    file = tmp_path / "front.png"
    draw(example, file)
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert image.width >= 800
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    vermilion = (0xD5, 0x5E, 0x00) in {colour for _, colour in colours}
    assert vermilion == (example.chosen is not None)


def test_picture_as_svg(tmp_path: Path) -> None:
    file = tmp_path / "front.SVG"
    draw(EXAMPLE, file)
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["$x_$^^ $.onnx", "模型\n.onnx", "long " * 60])
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    draw(replace(EXAMPLE, model=name), tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size


def test_pictures_of_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PwoptError, match=r"front\.gif: a picture must end in \.png or \.svg"):
        draw(EXAMPLE, tmp_path / "front.gif")
    assert not any(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PwoptError, match=r"pip install pwopt\[plots\]"):
        require_picture(tmp_path / "front.png")


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PwoptError, match="cannot be written"):
        draw(EXAMPLE, tmp_path / "missing" / "front.png")
