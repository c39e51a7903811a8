"""``pwopt rewrite --bottleneck auto`` from the outside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from helpers import ASSETS, Array, needs_assets, parse, run
from made_up import images, network, time_by_macs
from PIL import Image

from pwopt import runtime, tuning, workflow
from pwopt.analysis import size
from pwopt.cli import main
from pwopt.data import open_data
from pwopt.errors import BoundError
from pwopt.model import Model
from pwopt.report.front import from_json
from pwopt.search.search import Bounds

MODEL = network()
FRESH, FRESH_CLASSES = images(512, seed=4)


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    time_by_macs(monkeypatch)
    monkeypatch.setenv("PWOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    MODEL.save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path, 64)


def samples(folder: Path, count: int) -> Path:
    x, classes = images(count, seed=3)
    path = folder / "calib.npz"
    np.savez(path, x=x, labels=classes)
    return path


def rewrite(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rewrite", *map(str, arguments)])


def auto(net: Path, data: Path, *arguments: object) -> Result:
    """Tune without measuring anything."""
    return rewrite(net, "--bottleneck", "auto", "--data", data, "--gate", "macs", *arguments)


def found(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def failed(result: Result, code: int, message: str) -> None:
    """Assert one line on stderr, without a traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert message in result.stderr, result.stderr
    if code != 2:
        assert result.stderr.startswith("pwopt: ")
        assert result.stderr.count("\n") == 1


def top1(model: Model, x: Array = FRESH, classes: Array = FRESH_CLASSES) -> float:
    return 100 * float((run(model, {"x": x})[0].argmax(axis=1) == classes).mean())


# -- wrong usage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bottleneck auto", "add --data"),
        ("--bottleneck auto --max-drop 1", "add --data"),
        ("--bottleneck 8 --init calibrated", "add --data"),
        ("--bottleneck auto --data DATA --sides both", "--sides goes with a rank"),
        ("--bottleneck auto --data DATA --init svd", "leave --init svd out"),
        ("--bottleneck 8 --speedup 2", "--speedup goes with --bottleneck auto"),
        ("--bottleneck 8 --max-drop 2", "--max-drop goes with --bottleneck auto"),
        ("--bottleneck 8 --max-macs 2", "--max-macs goes with --bottleneck auto"),
        ("--bottleneck 8 --max-params 2", "--max-params goes with --bottleneck auto"),
        ("--bottleneck 8 --confident", "--confident goes with --bottleneck auto"),
        ("--bottleneck 8 --cost macs", "--cost goes with --bottleneck auto"),
        ("--exact --pareto c.json", "--pareto goes with --bottleneck auto"),
        ("--bottleneck 8 --samples 64", "--samples goes with --data"),
        ("--bottleneck 8 --seed 1", "--seed goes with --data"),
        ("--bottleneck 8 --preprocess unit", "--preprocess goes with --data"),
        ("--bottleneck 8 --gate macs", "--gate goes with --exact"),
        ("--bottleneck 0", "'0' is neither a rank from 1 nor auto"),
        ("--bottleneck -3", "'-3' is neither a rank from 1 nor auto"),
        ("--bottleneck wide", "'wide' is neither a rank from 1 nor auto"),
        ("--bottleneck AUTO", "'AUTO' is neither a rank from 1 nor auto"),
        ("--bottleneck 8.5", "'8.5' is neither a rank from 1 nor auto"),
        ("--bottleneck auto --pipeline fold-affine", "or else --pipeline"),
        ("--bottleneck auto --data DATA --speedup 0.5", "0.5 is not in the range x>=1"),
        ("--bottleneck auto --data DATA --max-drop -1", "-1.0 is not in the range x>=0"),
        ("--bottleneck auto --data DATA --speedup nan", "a speed-up of nan"),
        ("--bottleneck auto --data DATA --max-drop nan", "a drop of nan"),
        ("--bottleneck auto --data DATA --speedup inf", "a speed-up of inf"),
        ("--bottleneck auto --data DATA --max-drop inf", "a drop of inf"),
        ("--bottleneck auto --data DATA --max-macs 0", "0 is not in the range x>=1"),
        ("--bottleneck auto --data DATA --samples 7", "7 is not in the range x>=8"),
        ("--bottleneck auto --data DATA --pareto net.onnx", "files of their own"),
        ("--bottleneck auto --data DATA --pareto out.onnx", "files of their own"),
        ("--bottleneck auto --data DATA --pareto curve.png", "files of their own"),
        ("--bottleneck auto --data DATA -o ./net.onnx", "-o is the model itself"),
        ("--bottleneck auto --data DATA --preprocess unit", "holds no 8-bit images"),
        ("--pipeline bottleneck{rank=8,init=calibrated}", "needs samples; add --data"),
        ("--pipeline bottleneck{rank=auto,init=calibrated}", "rank"),
    ],
)
def test_wrong_usage(
    net: Path, data: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(net.parent)
    before = sorted(net.parent.iterdir())
    chosen = [str(data) if word == "DATA" else word for word in options.split()]
    output = [] if "-o" in chosen else ["-o", "out.onnx"]
    failed(rewrite("net.onnx", *chosen, *output), 2, message)
    assert sorted(net.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((32, 3, 8, 8), np.float32)}, "but the model takes [N, 3, 16, 16]"),
        ({"z": np.zeros((32, 3, 16, 16), np.float32)}, "name the arrays like the model's inputs"),
        ({"x": np.zeros((7, 3, 16, 16), np.float32)}, "7 samples are too few to calibrate on"),
        ({"x": np.full((32, 3, 16, 16), np.nan, np.float32)}, "holds NaN or infinity"),
        (
            {"x": np.zeros((32, 3, 16, 16), np.float32), "labels": np.zeros(31, int)},
            "31 labels for 32 samples",
        ),
    ],
)
def test_samples_that_do_not_fit(net: Path, arrays: dict[str, Array], message: str) -> None:
    path = net.with_name("other.npz")
    np.savez(path, **arrays)
    failed(auto(net, path), 1, message)
    assert not (net.parent / "net.pwopt.onnx").exists()


def test_no_such_data(net: Path) -> None:
    failed(auto(net, net.with_name("nothing.npz")), 1, "no such file or folder")


# -- what it writes ---------------------------------------------------------------------------


def test_json_has_what_was_done_and_judged(net: Path, data: Path) -> None:
    told = found(auto(net, data, "--max-drop", 1, "--json"))
    assert told.keys() == {
        "schema", "output", "pipeline", "events", "before", "after", "calibrated"
    }  # fmt: skip
    assert "bottleneck{rank=auto,init=calibrated}" in told["pipeline"]
    for event in told["events"]:
        assert event.keys() == {"pass", "kind", "where", "reason", "data"}
        assert event["reason"]
    bottlenecks = {e["where"]: e for e in told["events"] if e["pass"] == "bottleneck"}
    assert [*bottlenecks] == ["a", "b", "c", "y"]
    for where in ("b", "c"):
        assert bottlenecks[where]["kind"] == "rewrote"
        assert bottlenecks[where]["data"].keys() == {
            "sides", "rank", "macs", "params", "predicted_speedup", "before", "after", "unit",
            "harm",
        }  # fmt: skip
    calibrated = told["calibrated"]
    assert calibrated.keys() == {"original", "chosen", "threads", "batch", "samples"}
    assert (calibrated["threads"], calibrated["batch"], calibrated["samples"]) == (1, 1, 16)
    chosen = calibrated["chosen"]
    assert chosen["drop_points"] <= 1
    assert chosen["drop_ci95"][0] <= chosen["drop_points"] <= chosen["drop_ci95"][1]
    assert chosen["ranks"].keys() >= {"b", "c"}
    assert calibrated["original"]["drop_points"] == 0

    written = Model.load(told["output"])
    onnx.checker.check_model(written.to_proto(), full_check=True)
    assert (told["after"]["macs"], told["after"]["params"]) == (
        size(written).macs,
        size(written).params,
    )
    assert told["before"]["macs"] > 2 * told["after"]["macs"]
    assert (chosen["macs"], chosen["params"]) == (told["after"]["macs"], told["after"]["params"])
    assert top1(MODEL) - top1(written) < 2
    notes = {entry.key: entry.value for entry in written.proto.metadata_props}
    assert "bottleneck{rank=auto,init=calibrated}" in notes["pwopt.pipeline"]


def test_the_table(net: Path, data: Path) -> None:
    result = auto(net, data)
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        f"Wrote {net.with_name('net.pwopt.onnx')}\n"
        f"Next: pwopt check {net} {net.with_name('net.pwopt.onnx')}\n"
    )
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "layer split before after faster" in lines
    assert any(line.startswith("b ") and line.endswith("×") for line in lines)
    assert any(line.startswith("net.onnx: speed against accuracy") for line in lines)
    assert sum(line.startswith("chosen ") for line in lines) == 1
    assert any("top-1, points foretold error" in line for line in lines)
    assert any("too narrow: no split is foretold to save time" in line for line in lines)
    *_, conditions, caution = lines
    assert conditions.startswith("16 samples, 1 thread, batch 1; [95 % intervals]")
    assert caution == "Caution: one of 16 samples is 6.2 points: give more of them"


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ("", Bounds(max_drop=1.0)),
        ("--confident", Bounds(max_drop=1.0, confident=True)),
        ("--max-drop 0", Bounds(max_drop=0)),
        ("--max-drop 2.5 --confident", Bounds(max_drop=2.5, confident=True)),
        ("--speedup 2", Bounds(speedup=2)),
        ("--max-macs 5000", Bounds(max_macs=5000)),
        ("--max-params 5 --speedup 1.5", Bounds(max_params=5, speedup=1.5)),
    ],
)
def test_one_point_is_allowed_where_nothing_else_is_said(
    net: Path, data: Path, monkeypatch: pytest.MonkeyPatch, options: str, bounds: Bounds
) -> None:
    def stop(*_: Any, **given: Any) -> None:
        asked.append(given["bounds"])
        raise BoundError("enough")

    asked: list[Bounds] = []
    monkeypatch.setattr(workflow, "rewrite", stop)
    failed(auto(net, data, *options.split()), 3, "enough")
    assert asked == [bounds]


def test_another_bound_takes_the_place_of_the_default(net: Path, data: Path) -> None:
    """A speed that costs more than one point is still given."""
    chosen = found(auto(net, data, "--speedup", 2, "--json"))["calibrated"]["chosen"]
    assert chosen["speedup"] >= 2
    limit = size(MODEL).params // 4
    told = found(auto(net, data, "--max-params", limit, "--json"))
    assert 0 < told["after"]["params"] <= limit


def test_confident_is_more_careful(net: Path, tmp_path: Path) -> None:
    data, bounds = samples(tmp_path, 400), ("--max-drop", 2, "--json")
    chosen, careful = (
        found(auto(net, data, *bounds, *extra))["calibrated"]["chosen"]
        for extra in ((), ("--confident",))
    )
    assert careful["drop_ci95"][1] <= 2 < chosen["drop_ci95"][1]
    assert chosen["drop_points"] <= 2
    assert careful["speedup"] < chosen["speedup"]
    # 16 samples cannot tell that no more than one point are lost, whatever is done.
    said = "no allocation found that is at most 1 points lost"
    failed(auto(net, samples(tmp_path, 64), "--max-drop", 1, "--confident"), 3, said)


def test_without_labels_agreement_counts(net: Path) -> None:
    path = net.with_name("unlabelled.npz")
    np.savez(path, x=images(64, seed=3)[0])
    told = found(auto(net, path, "--max-drop", 2, "--json"))
    chosen = told["calibrated"]["chosen"]
    assert (chosen["drop_points"], chosen["drop_ci95"]) == (None, None)
    assert chosen["agreement"] >= 0.98
    assert chosen["speedup"] > 2
    table = auto(net, path, "--max-drop", 2).stdout
    assert "agreement" in table
    assert "points" not in table.partition("Caution")[0]


@pytest.mark.parametrize("extra", [("--seed", 3), ("--batch", 2)])
def test_the_same_twice(net: Path, data: Path, extra: tuple[object, ...]) -> None:
    outputs = [net.with_name(name) for name in ("first.onnx", "second.onnx")]
    for output in outputs:
        assert auto(net, data, *extra, "-o", output).exit_code == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_by_macs(net: Path, data: Path) -> None:
    """The gate of the exact rewrites goes by MACs as well then."""
    result = rewrite(
        net, "--bottleneck", "auto", "--data", data, "--cost", "macs", "--speedup", 3, "--json"
    )
    told = found(result)
    assert told["before"]["macs"] >= 3 * told["after"]["macs"]
    assert told["calibrated"]["chosen"]["predicted_ms"] is None
    assert {e["data"]["unit"] for e in told["events"] if e["kind"] == "rewrote"} == {"MACs"}
    assert "gemm-to-conv" not in told["pipeline"]


def test_fewer_samples(net: Path, data: Path) -> None:
    told = found(auto(net, data, "--samples", 16, "--json"))
    assert told["calibrated"]["samples"] == 4


def test_the_curve_and_its_picture(net: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CURVE", 4)
    curve = net.with_name("curve.json")
    result = auto(net, data, "--pareto", curve)
    assert result.exit_code == 0, result.output
    front = from_json(curve.read_text())
    assert front.model == "net.onnx"
    assert len(front.points) >= 3
    assert front.chosen is not None
    chosen = front.points[front.chosen]
    assert chosen.params == size(Model.load(net.with_name("net.pwopt.onnx"))).params
    with Image.open(net.with_name("curve.png")) as picture:
        assert picture.format == "PNG"
    assert f"Wrote {curve} and {net.with_name('curve.png')}\n" in result.stderr
    alone = net.with_name("alone.onnx")
    auto(net, data, "-o", alone)
    assert alone.read_bytes() == net.with_name("net.pwopt.onnx").read_bytes()


def test_a_folder_of_images(net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images(24, seed=3)[0]):
        pixels = np.clip(128 + 40 * image.transpose(1, 2, 0), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    told = found(auto(net, folder, "--preprocess", "scale=1/40,mean=128:128:128", "--json"))
    assert told["calibrated"]["chosen"]["agreement"] >= 0.99
    assert told["calibrated"]["samples"] == 6


# -- what cannot be had -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (("--speedup", 100), "no allocation found that is 100 times as fast"),
        (("--max-macs", 1000), "at most 1,000 MACs"),
        (("--max-params", 1000), "at most 1,000 parameters"),
        (("--speedup", 100, "--pareto", "curve.json"), "100 times as fast"),
        (("--speedup", 100, "--cost", "macs"), "100 times as fast"),
        (("--speedup", 100, "--json"), "100 times as fast"),
    ],
)
def test_out_of_reach(
    net: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.setattr(tuning, "CURVE", 1)
    monkeypatch.chdir(net.parent)
    result = auto(net, data, *bound)
    failed(result, 3, said)
    assert result.stderr.startswith("pwopt: net.onnx: ")
    assert not net.with_name("net.pwopt.onnx").exists()


MOBILENET = """
    net (float[N,3,16,16] x) => (float[N,8] y)
    <float[16,3,3,3] w1, float[16,1,3,3] w2, float[32,16,1,1] w3, float[32,1,3,3] w4,
     float[40,32,1,1] w5, float[8,40] w6>
    {
        a = Conv<strides = [2,2], pads = [1,1,1,1]>(x, w1)
        b = Conv<group = 16, pads = [1,1,1,1]>(a, w2)
        rb = Relu(b)
        c = Conv(rb, w3)
        rc = Relu(c)
        d = Conv<group = 32, pads = [1,1,1,1]>(rc, w4)
        rd = Relu(d)
        e = Conv(rd, w5)
        re = Relu(e)
        g = GlobalAveragePool(re)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, w6)
    }
"""


def test_what_cannot_gain_is_written_as_it_came(tmp_path: Path) -> None:
    net, data = tmp_path / "mobile.onnx", tmp_path / "unlabelled.npz"
    np.savez(data, x=images(64, seed=3)[0])
    parse(MOBILENET).save(net)
    result = auto(net, data, "--max-drop", 0)
    assert result.exit_code == 0, result.output
    assert onnx.load(net.with_name("mobile.pwopt.onnx")) == onnx.load(net)
    said = " ".join(result.stdout.split())
    assert "bottleneck: 0 rewritten, 6 left alone" in said
    assert "too narrow: no split is foretold to save time (a, c, e, …)" in said
    assert "depthwise" in said
    assert "chosen 1.00×" in said
    assert "Nothing was rewritten; the model is written as it came." in said

    told = found(auto(net, data, "--max-drop", 0, "--json"))
    assert {e["kind"] for e in told["events"]} == {"skipped"}
    assert told["calibrated"]["chosen"]["ranks"] == {}
    output = tmp_path / "no.onnx"
    failed(auto(net, data, "--speedup", 2, "-o", output), 3, "that is 2 times as fast")
    assert not output.exists()


# -- a rank given -----------------------------------------------------------------------------


def error(original: Model, other: Model) -> float:
    a, b = (run(model, {"x": FRESH})[0] for model in (original, other))
    return float(((a - b) ** 2).mean() / a.var())


def test_calibrated_at_a_given_rank_is_better_than_svd(net: Path, data: Path) -> None:
    errors = {}
    for init in ("svd", "calibrated", "auto"):
        output = net.with_name(f"{init}.onnx")
        told = found(
            rewrite(net, "--bottleneck", 8, "--init", init, "--data", data, "-o", output, "--json")
        )
        assert "calibrated" not in told
        assert ("init=calibrated" in told["pipeline"]) == (init != "svd")
        assert any(e["kind"] == "rewrote" for e in told["events"])
        errors[init] = error(MODEL, Model.load(output))
    assert errors["calibrated"] < 0.7 * errors["svd"]
    assert net.with_name("auto.onnx").read_bytes() == net.with_name("calibrated.onnx").read_bytes()
    rewrite(net, "--bottleneck", 8, "-o", net.with_name("plain.onnx"))
    assert error(MODEL, Model.load(net.with_name("plain.onnx"))) == errors["svd"]


def test_samples_bound_a_given_rank_as_well(net: Path, data: Path) -> None:
    """As many as --samples are used, and no more."""
    x, classes = images(64, seed=3)
    few = net.with_name("few.npz")
    np.savez(few, x=x[:7], labels=classes[:7])
    failed(rewrite(net, "--bottleneck", 8, "--data", few), 1, "7 samples are too few")
    outputs = [net.with_name(name) for name in ("all.onnx", "some.onnx")]
    for output, options in zip(outputs, ((), ("--samples", 16)), strict=True):
        result = rewrite(net, "--bottleneck", 8, "--data", data, "-o", output, *options)
        assert result.exit_code == 0, result.output
    assert outputs[0].read_bytes() != outputs[1].read_bytes()


# -- a real network ---------------------------------------------------------------------------


@needs_assets
def test_a_real_network_keeps_its_accuracy(tmp_path: Path) -> None:
    model, output = ASSETS / "models/smallvgg_cifar10.onnx", tmp_path / "out.onnx"
    calib, val = (np.load(ASSETS / f"data/cifar10_{name}.npz") for name in ("calib", "val"))
    data, unseen = tmp_path / "calib.npz", tmp_path / "val.npz"
    np.savez(data, images=calib["images"][:128])
    np.savez(unseen, images=val["images"][:500], labels=val["labels"][:500])
    bounds = ("--cost", "macs", "--speedup", 1.3, "-o", output, "--json")
    told = found(
        rewrite(model, "--bottleneck", "auto", "--data", data, "--preprocess", "raw", *bounds)
    )
    assert told["before"]["macs"] >= 1.3 * told["after"]["macs"]
    assert told["calibrated"]["chosen"]["ranks"]

    def accuracy(path: Path) -> float:
        network = Model.load(path)
        session = runtime.session(network)
        right = []
        for batch in open_data(unseen, network, preprocess="raw", batch=100):
            (logits,) = runtime.run(session, batch.feeds, name=network.name).values()
            right.append(logits.argmax(axis=1) == batch.labels)
        return 100 * float(np.mean(right))

    assert accuracy(model) - accuracy(output) < 3
