"""``pwopt rewrite`` from the outside: what it writes, prints and notes in the model."""

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from helpers import ASSETS, needs_assets

from pwopt.analysis import analyze
from pwopt.cli import main
from pwopt.models import BUILDERS

SMALL_VGG = {"size": 32, "width": 8, "classes": 10}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rewrite", *map(str, arguments)])


def rewrite(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """Write vgg.onnx: narrow, batch open, batch normalization not folded."""
    path = tmp_path / "vgg.onnx"
    onnx.save(BUILDERS["vgg16"](**SMALL_VGG), path)
    return path


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_output_lies_beside_the_model(vgg: Path) -> None:
    before = vgg.read_bytes()
    result = rewrite(vgg, "--bottleneck", 8)
    output = vgg.with_name("vgg.pwopt.onnx")
    assert f"Wrote {output}\nNext: pwopt check {vgg} {output}\n" == result.stderr
    assert vgg.read_bytes() == before
    assert sorted(file.name for file in vgg.parent.iterdir()) == ["vgg.onnx", "vgg.pwopt.onnx"]
    onnx.checker.check_model(output, full_check=True)


def test_o_names_the_output(vgg: Path) -> None:
    output = vgg.with_name("smaller")
    result = rewrite(vgg, "--bottleneck", 8, "-o", output)
    assert str(output) in result.stderr
    assert sorted(file.name for file in vgg.parent.iterdir()) == ["smaller", "vgg.onnx"]
    assert analyze(output).totals.macs < analyze(vgg).totals.macs


def test_json_is_one_object_with_the_promised_keys(vgg: Path) -> None:
    result = rewrite(vgg, "--bottleneck", 8, "--sides", "input", "--json")
    found = json.loads(result.stdout)
    assert found.keys() == {"schema", "output", "pipeline", "events", "before", "after"}
    assert found["schema"] == 1
    assert found["output"] == str(vgg.with_name("vgg.pwopt.onnx"))
    assert found["pipeline"] == "fold-affine,bottleneck{rank=8,sides=input}"
    for size in (found["before"], found["after"]):
        assert {"params", "macs", "nodes"} <= size.keys()
    for event in found["events"]:
        assert event.keys() == {"pass", "kind", "where", "reason", "data"}
        assert event["reason"]
    rewrote = [event for event in found["events"] if event["kind"] == "rewrote"]
    assert {event["data"]["sides"] for event in rewrote} == {"input"}
    assert {event["pass"] for event in found["events"]} == {"bottleneck"}

    written = analyze(found["output"]).totals
    assert (found["after"]["params"], found["after"]["macs"]) == (written.params, written.macs)
    original = analyze(vgg).totals
    assert (found["before"]["params"], found["before"]["macs"]) == (original.params, original.macs)


def test_the_table_says_what_was_done_where_and_why_not(vgg: Path) -> None:
    lines = [" ".join(line.split()) for line in rewrite(vgg, "--bottleneck", 8).stdout.splitlines()]
    assert lines[0] == "bottleneck: 8 rewritten, 5 left alone"
    assert lines[1] == "layer split predicted keeps"
    assert any(line.startswith("conv5_3 ") and "×" in line for line in lines)
    assert any(line.startswith("2 left: only 8 input channels") for line in lines)
    assert any(line.startswith("parameters ") for line in lines)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_sides_force_the_form(vgg: Path, sides: str) -> None:
    result = rewrite(vgg, "--bottleneck", 8, "--sides", sides, "--json")
    splits = [e["data"] for e in json.loads(result.stdout)["events"] if e["kind"] == "rewrote"]
    assert splits
    assert {(split["sides"], split["rank"]) for split in splits} == {(sides, 8)}


def test_a_pipeline_runs_as_written(vgg: Path) -> None:
    spec = "bottleneck{rank=8,sides=both,min_channels=64}"
    found = json.loads(rewrite(vgg, "--pipeline", spec, "--json").stdout)
    assert found["pipeline"] == spec
    as_option = rewrite(vgg, "--bottleneck", 8, "--sides", "both", "--json")
    assert 0 < count(found) < count(json.loads(as_option.stdout))


def count(found: dict[str, list[dict[str, str]]]) -> int:
    return sum(event["kind"] == "rewrote" for event in found["events"])


def test_passes_may_be_repeated(vgg: Path) -> None:
    one = vgg.with_name("one.onnx")
    two = vgg.with_name("two.onnx")
    rewrite(vgg, "--pipeline", "bottleneck{rank=8}", "-o", one)
    rewrite(vgg, "--pipeline", "bottleneck{rank=8},bottleneck{rank=8}", "-o", two)
    assert onnx.load(one).graph == onnx.load(two).graph


def test_what_was_done_is_noted_in_the_model(vgg: Path) -> None:
    first = vgg.with_name("first.onnx")
    second = vgg.with_name("second.onnx")
    rewrite(vgg, "--bottleneck", 8, "-o", first)
    notes = {entry.key: entry.value for entry in onnx.load(first).metadata_props}
    assert notes["pwopt.pipeline"] == "fold-affine,bottleneck{rank=8}"
    assert notes["pwopt.version"] == CliRunner().invoke(main, ["--version"]).output.split()[-1]

    rewrite(first, "--pipeline", "bottleneck{rank=4,min_channels=8}", "-o", second)
    notes = {entry.key: entry.value for entry in onnx.load(second).metadata_props}
    assert notes["pwopt.pipeline"] == (
        "fold-affine,bottleneck{rank=8},bottleneck{rank=4,min_channels=8}"
    )


def test_two_runs_write_the_same_bytes(vgg: Path) -> None:
    outputs = [vgg.with_name(name) for name in ("a.onnx", "b.onnx")]
    for output in outputs:
        rewrite(vgg, "--bottleneck", 8, "-o", output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_nothing_to_rewrite_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "pointwise.onnx"
    onnx.save(BUILDERS["twenty_filters"](size=8), path)
    result = rewrite(path, "--bottleneck", 8)
    assert "Nothing was rewritten; the model is written as it came." in result.stdout
    assert onnx.load(tmp_path / "pointwise.pwopt.onnx") == onnx.load(path)

    found = json.loads(rewrite(path, "--bottleneck", 8, "--json").stdout)
    assert found["before"] == found["after"]
    assert {event["kind"] for event in found["events"]} <= {"skipped"}


def test_the_tutorials_example_becomes_seven_times_cheaper(tmp_path: Path) -> None:
    path = tmp_path / "seven.onnx"
    onnx.save(BUILDERS["seven_by_seven"](), path)
    result = rewrite(path, "--bottleneck", 64, "--json")
    found = json.loads(result.stdout)
    before, after = found["before"], found["after"]
    assert (before["params"], after["params"]) == (1_605_696, 233_536)
    assert round(before["macs"] / after["macs"], 2) == 6.88
    assert nodes(tmp_path / "seven.pwopt.onnx") == ["Conv", "Conv", "Relu"]
    reduced = analyze(reduced_by_hand(tmp_path))
    assert after["macs"] == reduced.totals.macs

    table = rewrite(path, "--bottleneck", 64).stdout
    assert "1,605,696" in table
    assert "233,536" in table
    assert "6.88×" in table


def reduced_by_hand(folder: Path) -> Path:
    """The same with the 1×1 put there by hand, as the tutorial writes it."""
    path = folder / "reduced.onnx"
    onnx.save(BUILDERS["seven_by_seven_reduced"](), path)
    return path


def test_shape_fixes_what_the_model_leaves_open(tmp_path: Path) -> None:
    proto = BUILDERS["inception_naive"]()
    for axis, symbol in enumerate(("N", None, "H", "W")):
        for value in (proto.graph.input[0], proto.graph.output[0]):
            if symbol:
                value.type.tensor_type.shape.dim[axis].dim_param = symbol
    del proto.graph.value_info[:]
    path = tmp_path / "open.onnx"
    onnx.save(proto, path)
    name = proto.graph.input[0].name
    channels = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    macs = []
    for side in (14, 28):
        shape = f"{name}=1,{channels},{side},{side}"
        result = rewrite(path, "--bottleneck", 16, "--shape", shape, "--json")
        macs.append(json.loads(result.stdout)["after"]["macs"])
    assert macs[1] == 4 * macs[0]
    written = onnx.load(tmp_path / "open.pwopt.onnx")
    assert written.graph.input == proto.graph.input  # open as before


@needs_assets
def test_relu_before_batch_normalization_is_left_alone(tmp_path: Path) -> None:
    model = ASSETS / "models" / "smallvgg_cifar10.onnx"
    result = rewrite(model, "--pipeline", "fold-affine", "-o", tmp_path / "out.onnx", "--json")
    events = json.loads(result.stdout)["events"]
    assert {event["kind"] for event in events} == {"skipped"}
    assert {"Relu" in event["reason"] for event in events} == {True}
