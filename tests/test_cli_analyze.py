"""``pwopt analyze`` from the outside: what it prints, writes and refuses."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from pwopt.cli import main


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Write net.onnx: four like 1×1 convs, a wide and a narrow 3×3 conv, a head; open batch."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.standard_normal((64, 3, 3, 3)),
        "wide": rng.standard_normal((64, 64, 3, 3)),
        "head": rng.standard_normal((64, 10)),
    } | {f"p{i}": rng.standard_normal((64, 64, 1, 1)) for i in range(4)}
    nodes, x = [], "image"
    for name in ("stem", "wide", "p0", "p1", "p2", "p3"):
        pads = [1] * 4 if name in ("stem", "wide") else [0] * 4
        nodes += [
            helper.make_node("Conv", [x, name], [f"{name}.y"], name=f"[{name}]", pads=pads),
            helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"]),
        ]
        x = f"{name}.r"
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    return path


PARAMS = 64 * 27 + 64 * 64 * 9 + 4 * 64 * 64 + 640
MACS = 256 * (PARAMS - 640) + 640


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["analyze", *map(str, arguments)])


def test_the_table_names_the_candidate_first_and_sums_up_the_rest(net: Path) -> None:
    result = run(net, "--bottleneck", 16)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"net.onnx: {PARAMS:,} parameters (0.2 MB), {MACS:,} MACs"
    assert lines[1] == "for image 1×3×16×16 (assumed: N=1; --shape sets another)"
    header = "layer kernel channels output params MACs share split, or why not"
    assert " ".join(lines[2].split()) == header
    assert lines[3].split()[:7] == ["[wide]", "3×3", "64", "→", "64", "16×16", "36.9"]
    assert "×, keeps " in lines[3]
    assert any(line.startswith("[p0] + 3 more ") and "1×1 already" in line for line in lines)
    assert any(line.startswith("[stem] ") and "only 3 input channels" in line for line in lines)
    assert any(line.split()[:2] == ["logits", "MatMul"] for line in lines)
    assert lines[-1].startswith("Splitting the one candidate would save ")
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in result.stdout
    assert result.stderr == f"Next: pwopt rewrite {net} --bottleneck 16\n"


def test_json_holds_the_contract(net: Path) -> None:
    result = run(net, "--json", "--bottleneck", 16)
    found = json.loads(result.stdout)
    assert (found["schema"], found["model"], found["bottleneck"]) == (1, "net.onnx", 16)
    assert (found["totals"]["params"], found["totals"]["macs"]) == (PARAMS, MACS)
    assert found["totals"]["weight_bytes"] == 4 * PARAMS
    assert (found["inputs"], found["assumed"]) == ({"image": [1, 3, 16, 16]}, {"N": 1})
    first, *rest = found["layers"]
    assert set(first) >= {
        *("name", "op", "kernel", "stride", "groups", "in_channels", "out_channels"),
        *("input_shape", "output_shape", "params", "macs", "mac_share", "time_ms"),
        *("candidate", "why_not"),
    }
    assert (first["name"], first["why_not"], first["time_ms"]) == ("[wide]", None, None)
    assert set(first["candidate"]) == {
        *("sides", "rank", "macs", "params", "predicted_speedup", "kept_energy"),
    }
    assert [layer["candidate"] for layer in rest] == [None] * 6
    assert all(layer["why_not"] for layer in rest)


def test_csv_has_a_row_for_each_layer(net: Path) -> None:
    result = run(net, "--format", "csv", "--bottleneck", 16)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["name"] for row in rows][:2] == ["[wide]", "[stem]"]
    assert len(rows) == 7
    assert (rows[0]["output_shape"], rows[0]["candidate_rank"]) == ("1x64x16x16", "16")
    assert (rows[1]["candidate_rank"], rows[1]["kernel"]) == ("", "3x3")


@pytest.mark.parametrize("style", ["table", "json", "csv"])
def test_a_file_gets_what_the_terminal_would(net: Path, style: str, tmp_path: Path) -> None:
    target = tmp_path / "result"
    result = run(net, "--format", style, "-o", target)
    assert (result.exit_code, result.stdout) == (0, "")
    assert target.read_text(encoding="utf-8") == run(net, "--format", style).stdout


def test_measured_times_get_a_column(net: Path) -> None:
    lines = run(net, "--measure").stdout.splitlines()
    assert lines[2].startswith("one run takes ")
    assert " ms  split" in lines[3]


def test_shapes_bind_open_axes(net: Path) -> None:
    found = json.loads(run(net, "--json", "--shape", "image=3,3,16,16").stdout)
    assert (found["totals"]["macs"], found["assumed"]) == (3 * MACS, {})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bottleneck", "0"], 2, "x>=1"),
        (["--bottleneck", "-4"], 2, "x>=1"),
        (["--bottleneck", "65"], 2, "rank 65 is larger than the channels of every convolution"),
        (["--shape", "picture=1,3,16,16"], 2, "has no input 'picture'"),
        (["--shape", "image=1,4,16,16"], 2, "wants image=N,3,16,16, not 1,4,16,16"),
        (["--shape", "image=1,3"], 2, "wants image=N,3,16,16, not 1,3"),
        (["--shape", "image"], 2, "not of the form NAME=1,3,224,224"),
        (["--shape", "image=1,a"], 2, "not of the form NAME=1,3,224,224"),
        (["--shape", "image=0,3,16,16"], 2, "not of the form NAME=1,3,224,224"),
        (["--threads", "0"], 2, "1<=x<="),
        (["--format", "html"], 2, "'html' is not one of"),
        (["-o", "nowhere/result.json"], 1, "cannot be written"),
    ],
)
def test_wrong_usage_is_one_line(
    net: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(net.parent)
    result = run(net, *arguments)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
    assert not result.stdout
    assert [path.name for path in net.parent.iterdir()] == ["net.onnx"]


def test_the_model_itself_is_never_overwritten(net: Path) -> None:
    before = net.read_bytes()
    result = run(net, "-o", net.parent / "." / "net.onnx")
    assert result.exit_code == 2
    assert "is the model itself" in result.stderr
    assert net.read_bytes() == before


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "gone.onnx")
    assert result.exit_code == 1
    assert result.stderr == f"pwopt: {tmp_path}/gone.onnx: no such file; check the path\n"
