"""What the same speed-up costs: TensorLy's `partial_tucker`, plain SVD, and calibrated bottlenecks.

usage: OPENBLAS_NUM_THREADS=1 python benchmarks/equal_speedup.py ASSETS [RATIO]... > table.md

ASSETS holds ``models/vgg16_cifar10.onnx`` and ``data/cifar10_{calib,val}.npz``. TensorLy is
installed into a temporary folder. It gets the convolutions of at least 64 input channels at a
uniform RATIO of their channels, 0.625, 0.5 and 0.375 unless told otherwise; plain SVD likewise, on
the input side. pwopt is asked for the speed-up that TensorLy was measured to have, and calibrates
on 1,024 images without labels.

All are judged on the same 5,000 images. One thread, batch 1; a model and the original are timed in
turn, run by run. Intervals are 95 % bootstraps.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pwopt
from pwopt import lowrank
from pwopt.checking import Verdict
from pwopt.comparing import Accuracy
from pwopt.data import open_data
from pwopt.linear import Linear, linear
from pwopt.search.search import Bounds, split_model
from pwopt.shapes import bind, infer
from pwopt.tuning import tune

Array = npt.NDArray[Any]
Method = Callable[[Array, float], lowrank.Factors]

CHANNELS = 64  # input channels from which a convolution is split
CALIBRATION = 1024  # images
TUCKER_RATIOS = (0.625, 0.5, 0.375)
SVD_RATIOS = (0.75, 0.625, 0.5, 0.375, 0.25, 0.1875)


def main(assets: Path, *ratios: float) -> None:
    model = pwopt.Model.load(assets / "models" / "vgg16_cifar10.onnx")
    with tempfile.TemporaryDirectory() as folder:
        tensorly = install("tensorly", folder)
        images = Path(folder) / "images.npz"
        np.savez(images, images=np.load(assets / "data" / "cifar10_calib.npz")["images"])

        def judged(method: str, setting: str, result: pwopt.Model) -> Verdict:
            data = assets / "data" / "cifar10_val.npz"
            verdict = pwopt.check(model, result, data=data, preprocess="unit")
            print(f"| {method} | {setting} | {cells(verdict)} |", flush=True)
            return verdict

        print("| method | setting | MACs ÷ | speed-up | top-1 change |")
        print("|---|---|---|---|---|")
        name, tucker = f"TensorLy {tensorly.__version__}", partial_tucker(tensorly)
        rivals = [
            judged(name, f"{ratio:.2%}", uniform(model, ratio, tucker))
            for ratio in ratios or TUCKER_RATIOS
        ]
        svds = [
            judged("plain SVD", f"{ratio:.2%}", uniform(model, ratio, input_svd))
            for ratio in SVD_RATIOS
        ]
        own = []
        for rival in rivals:
            bounds, samples = Bounds(speedup=rival.latency.speedup), open_data(images, model)
            found = tune(model, model, samples, bounds, limit=CALIBRATION).model
            own.append(judged("pwopt", f"--speedup {rival.latency.speedup:.2f}", found))
    print()
    print("| speed-up of TensorLy, pwopt | loss of TensorLy, SVD, pwopt | ÷ TensorLy | ÷ SVD |")
    print("|---|---|---|---|")
    for rival, ours in zip(rivals, own, strict=True):
        print(compared(rival, svds, ours))


def install(package: str, folder: str) -> Any:
    """Install a package alone, for what it needs is here already, and import it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, package], check=True)
    sys.path.append(folder)
    return importlib.import_module(package)


def uniform(model: pwopt.Model, ratio: float, method: Method) -> pwopt.Model:
    """Split all wide convolutions at ranks that are `ratio` of their channels."""
    known = infer(model, bind(model))
    found = [linear(node, known) for node in model.graph.nodes if node.op == "Conv"]
    layers = [
        layer
        for layer in found
        if isinstance(layer, Linear)
        and not layer.is_pointwise
        and layer.size.in_channels >= CHANNELS
    ]
    return split_model(model, layers, {x.where: method(x.weight(), ratio) for x in layers})


def partial_tucker(tensorly: Any) -> Method:
    """Return TensorLy's Tucker-2, with the options that it has by itself."""
    decomposition = importlib.import_module(f"{tensorly.__name__}.decomposition")

    def method(weight: Array, ratio: float) -> lowrank.Factors:
        out_channels, in_channels, *kernel = weight.shape
        ranks = [round(ratio * out_channels), round(ratio * in_channels)]
        (core, (left, right)), _ = decomposition.partial_tucker(weight, rank=ranks, modes=[0, 1])
        ones = [1] * len(kernel)
        reduce = right.T.reshape(ranks[1], in_channels, *ones)
        return lowrank.Factors(core, reduce, left.reshape(out_channels, ranks[0], *ones))

    return method


def input_svd(weight: Array, ratio: float) -> lowrank.Factors:
    return lowrank.Splitter(weight).split("input", round(ratio * weight.shape[1]))


def cells(verdict: Verdict) -> str:
    """Return the cells MACs ÷, speed-up and top-1 change."""
    latency, drop, cost = verdict.latency, accuracy(verdict), verdict.cost
    assert cost is not None and cost.original.macs and cost.rewritten.macs
    return (
        f"{cost.original.macs / cost.rewritten.macs:.2f} "
        f"| {latency.speedup:.2f}× [{latency.speedup_ci95[0]:.2f}, {latency.speedup_ci95[1]:.2f}] "
        f"| {-drop.drop_points:+.2f} [{-drop.drop_ci95[1]:+.2f}, {-drop.drop_ci95[0]:+.2f}]"
    )


def compared(rival: Verdict, svds: list[Verdict], ours: Verdict) -> str:
    """Compare losses; that of SVD is taken on the line between its points, at pwopt's speed-up."""
    svds = sorted(svds, key=lambda verdict: verdict.latency.speedup)
    speeds, losses = zip(*((v.latency.speedup, loss(v)) for v in svds), strict=True)
    svd = float(np.interp(ours.latency.speedup, speeds, losses))
    return (
        f"| {rival.latency.speedup:.2f}×, {ours.latency.speedup:.2f}× "
        f"| {loss(rival):.2f}, {svd:.2f}, {loss(ours):.2f} "
        f"| {loss(ours) / loss(rival):.2f} | {loss(ours) / svd:.2f} |"
    )


def loss(verdict: Verdict) -> float:
    return accuracy(verdict).drop_points


def accuracy(verdict: Verdict) -> Accuracy:
    assert verdict.accuracy is not None  # the data has labels
    return verdict.accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
