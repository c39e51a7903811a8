"""The whole job on networks that other people trained: analyze, rewrite, check."""

import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers import ASSETS, needs_assets

import pwopt as library
from pwopt import runtime
from pwopt.cli import main
from pwopt.models import BUILDERS

pytestmark = needs_assets

CIFAR_IMAGES = 200
IMAGENET_IMAGES = 50


@dataclass(frozen=True)
class Network:
    """A network, how it is judged, and what must come out."""

    name: str
    rank: int
    preprocess: str
    params: int
    macs: int
    split: int  # layers that the rank makes cheaper
    top1: float  # of the original on the images below, per cent; `slack` for a flipped image or two
    slack: float
    least: float  # what the rewritten one must still reach: far above chance

    @property
    def imagenet(self) -> bool:
        return self.name.endswith("imagenet")


NETWORKS = [
    Network("vgg16_cifar10", 64, "unit", 14_984_522, 313_463_808, 11, 89.5, 1, 75),
    Network("smallvgg_cifar10", 32, "raw", 969_418, 57_114_368, 5, 90, 1, 70),
    Network("resnet56_cifar10", 16, "unit", 853_642, 125_747_840, 35, 93.5, 1, 40),
    Network("resnet50_imagenet", 64, "caffe", 25_636_712, 3_857_973_248, 13, 86, 4, 40),
]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the latency for a moment only."""
    monkeypatch.setattr(
        runtime, "interleave", partial(runtime.interleave, seconds=0.1, min_rounds=3)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a part of the images, and room for models."""
    folder = tmp_path_factory.mktemp("networks")
    with np.load(ASSETS / "data" / "cifar10_val.npz") as whole:
        np.savez(folder / "cifar10", **{k: whole[k][:CIFAR_IMAGES] for k in whole.files})
    source = ASSETS / "data" / "imagenet_sample"
    header, *rows = (source / "labels.csv").read_text().splitlines()
    rows = rows[:: len(rows) // IMAGENET_IMAGES][:IMAGENET_IMAGES]
    (folder / "imagenet").mkdir()
    (folder / "imagenet" / "labels.csv").write_text("\n".join([header, *rows]))
    for row in rows:
        shutil.copy(source / row.split(",")[0], folder / "imagenet")
    return folder


def model_file(network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the network is; its own script unpacks the one that is stored in halves."""
    if not network.imagenet:
        return ASSETS / "models" / f"{network.name}.onnx"
    path = folder / f"{network.name}.onnx"
    if not path.exists():
        monkeypatch.setattr(sys, "argv", ["unpack.py", str(folder)])
        runpy.run_path(str(ASSETS / "unpack.py"), run_name="__main__")
    return path


def pwopt(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_the_three_commands(
    network: Network, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_file(network, files, monkeypatch)
    output = tmp_path / "rewritten.onnx"
    analysis = pwopt("analyze", model, "--bottleneck", network.rank)
    result = pwopt("rewrite", model, "--bottleneck", network.rank, "-o", output)
    data = files / ("imagenet" if network.imagenet else "cifar10.npz")
    verdict = pwopt("check", model, output, "--data", data, "--preprocess", network.preprocess)

    onnx.checker.check_model(output, full_check=True)
    totals = analysis["totals"]
    assert (totals["params"], totals["macs"]) == (network.params, network.macs)
    assert result["before"] == totals
    for name in ("params", "macs"):
        assert verdict["cost"]["original"][name] == totals[name]
        assert verdict["cost"]["rewritten"][name] == result["after"][name] < totals[name]

    split = [event for event in result["events"] if "rank" in event["data"]]
    candidates = [layer for layer in analysis["layers"] if layer["candidate"]]
    assert len(split) == len(candidates) == network.split

    accuracy = verdict["accuracy"]
    assert accuracy["samples"] == (IMAGENET_IMAGES if network.imagenet else CIFAR_IMAGES)
    assert accuracy["original"] == pytest.approx(network.top1, abs=network.slack)
    assert network.least < accuracy["rewritten"] < accuracy["original"]
    assert network.least < 100 * verdict["agreement"] < 100
    assert verdict["size"]["rewritten_bytes"] == output.stat().st_size
    assert verdict["passed"]


def test_vgg16_names_the_wide_convolutions() -> None:
    layers = pwopt("analyze", ASSETS / "models" / "vgg16_cifar10.onnx")["layers"]
    wide = {layer["name"] for layer in layers if layer["candidate"]}
    assert wide == {f"/features/features.{i}/Conv" for i in range(4, 52, 4)}
    first = next(layer for layer in layers if layer["name"] == "/features/features.0/Conv")
    assert first["why_not"] == "only 3 input channels (fewer than 32)"


# -- exact rewrites ---------------------------------------------------------------------------


def macs_left(result: Any) -> float:
    return float(result["after"]["macs"] / result["before"]["macs"])


def test_resnet50_without_its_strided_pointwise(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resnet50 = NETWORKS[-1]
    model = model_file(resnet50, files, monkeypatch)
    output = tmp_path / "exact.onnx"
    result = pwopt("rewrite", model, "--exact", "--gate", "macs", "-o", output)
    assert macs_left(result) <= 0.91
    data = files / "imagenet"
    verdict = pwopt("check", model, output, "--data", data, "--preprocess", "caffe")
    assert verdict["accuracy"]["samples"] == IMAGENET_IMAGES
    assert verdict["agreement"] == 1
    assert verdict["accuracy"]["rewritten"] == verdict["accuracy"]["original"]
    assert verdict["equivalence"]["max_rel"] <= 1e-4


def test_smallvgg_without_batch_normalization(tmp_path: Path) -> None:
    model = ASSETS / "models" / "smallvgg_cifar10.onnx"
    output = tmp_path / "exact.onnx"
    pwopt("rewrite", model, "--exact", "--gate", "macs", "-o", output)
    ops = {node.op_type for node in onnx.load(output).graph.node}
    assert "Conv" in ops
    assert "BatchNormalization" not in ops

    with np.load(ASSETS / "data" / "cifar10_val.npz") as whole:
        np.savez(tmp_path / "images", **{k: whole[k][:500] for k in whole.files})
    data = tmp_path / "images.npz"
    verdict = pwopt("check", model, output, "--data", data, "--preprocess", "raw")
    assert verdict["accuracy"]["samples"] == 500
    assert verdict["agreement"] == 1


def test_densenet121_pools_before_its_transitions() -> None:
    result = library.rewrite(
        library.Model(BUILDERS["densenet121"]()), pipeline="fold-affine,pool-before-pointwise"
    )
    before, after = result.before.macs, result.after.macs
    assert before is not None
    assert after is not None
    assert after / before <= 0.925
