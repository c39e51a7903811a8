"""What the same speed-up costs: TensorLy's `partial_tucker`, plain SVD, and calibrated bottlenecks.

usage: OPENBLAS_NUM_THREADS=1 python benchmarks/equal_speedup.py ASSETS [RATIO]... > table.md

ASSETS holds ``models/vgg16_cifar10.onnx`` and ``data/cifar10_{calib,val}.npz``. TensorLy is
installed into a temporary folder. It gets the convolutions of at least 64 input channels at a
uniform RATIO of their channels, 0.625, 0.5 and 0.375 unless told otherwise; plain SVD likewise, on
the input side. pwopt is asked for the speed-up that TensorLy was measured to have, and calibrates
on 1,024 images without labels.

All are judged on the same 5,000 images. One thread, batch 1; at the end all models and the original
are timed in turn, run by run. Intervals are 95 % bootstraps. The machine must have a core free for
it: where processes share one, a short run slips through between two preemptions and a long one does
not, so that speed-ups come out too large.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pwopt
from pwopt import analysis, lowrank, runtime
from pwopt.comparing import Accuracy, Flags, compare_hits
from pwopt.data import open_data, random_data
from pwopt.linear import Linear, linear
from pwopt.runtime import Timing
from pwopt.search.search import Bounds, split_model
from pwopt.shapes import bind, infer
from pwopt.tuning import tune

Array = npt.NDArray[Any]
Method = Callable[[Array, float], lowrank.Factors]

CHANNELS = 64  # input channels from which a convolution is split
CALIBRATION = 1024  # images
SECONDS = 60.0  # for the timing of all models
TUCKER_RATIOS = (0.625, 0.5, 0.375)
SVD_RATIOS = (0.625, 0.5, 0.375, 0.25, 0.1875)


@dataclass(frozen=True)
class Row:
    """A model and what it costs: speed-up and accuracy against the original."""

    method: str
    setting: str
    model: pwopt.Model
    speedup: float
    speedup_ci95: tuple[float, float]
    accuracy: Accuracy

    @property
    def loss(self) -> float:
        """Points of top-1."""
        return self.accuracy.drop_points


def main(assets: Path, *ratios: float) -> None:
    model, data = pwopt.Model.load(assets / "models" / "vgg16_cifar10.onnx"), assets / "data"
    with tempfile.TemporaryDirectory() as folder:
        tensorly = install("tensorly", folder)
        tucker = partial_tucker(importlib.import_module("tensorly.decomposition"))
        rivals = [
            (f"TensorLy {tensorly.__version__}", f"{ratio:.2%}", uniform(model, ratio, tucker))
            for ratio in ratios or TUCKER_RATIOS
        ]
        images = Path(folder) / "images.npz"
        np.savez(images, images=np.load(data / "cifar10_calib.npz")["images"])
        aims = timed(model, [split for *_, split in rivals])
        own = [
            ("pwopt", f"--speedup {aim:.2f}", tuned(model, images, aim))
            for aim in (aims.speedup(0, index).ratio for index in range(1, len(rivals) + 1))
        ]
    svds = [("plain SVD", f"{ratio:.2%}", uniform(model, ratio, input_svd)) for ratio in SVD_RATIOS]
    print("| method | setting | MACs ÷ | speed-up | top-1 change |")
    print("|---|---|---|---|---|")
    rows = []
    for row in judged(model, [*rivals, *own, *svds], data / "cifar10_val.npz"):
        rows.append(row)
        print(line(model, row), flush=True)
    print()
    print("| speed-up of TensorLy, pwopt | loss of TensorLy, SVD, pwopt | ÷ TensorLy | ÷ SVD |")
    print("|---|---|---|---|")
    count = len(rivals)
    for rival, ours in zip(rows[:count], rows[count : 2 * count], strict=True):
        print(compared(rival, rows[2 * count :], ours))


def install(package: str, folder: str) -> Any:
    """Install a package alone, for what it needs is here already, and import it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, package], check=True)
    sys.path.append(folder)
    return importlib.import_module(package)


# -- methods ----------------------------------------------------------------------------------


def uniform(model: pwopt.Model, ratio: float, method: Method) -> pwopt.Model:
    """Split all wide convolutions at ranks that are `ratio` of their channels."""
    known = infer(model, bind(model))
    found = [linear(node, known) for node in model.graph.nodes if node.op == "Conv"]
    layers = [
        layer for layer in found if isinstance(layer, Linear) and layer.size.in_channels >= CHANNELS
    ]
    return split_model(model, layers, {x.where: method(x.weight(), ratio) for x in layers})


def partial_tucker(decomposition: Any) -> Method:
    """Return TensorLy's Tucker-2, with the options that it has by itself."""

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


def tuned(model: pwopt.Model, images: Path, speedup: float) -> pwopt.Model:
    samples = open_data(images, model, preprocess="unit")
    return tune(model, model, samples, Bounds(speedup=speedup), limit=CALIBRATION).model


# -- measures ---------------------------------------------------------------------------------


def timed(model: pwopt.Model, others: Sequence[pwopt.Model]) -> Timing:
    sessions = [runtime.session(each, threads=1) for each in (model, *others)]
    feeds = next(iter(random_data(model, batch=1))).feeds
    return runtime.interleave(sessions, feeds, seconds=SECONDS)


def judged(
    model: pwopt.Model, splits: Sequence[tuple[str, str, pwopt.Model]], data: Path
) -> Iterator[Row]:
    timing, before = timed(model, [split for *_, split in splits]), hits(model, data)
    for index, (method, setting, split) in enumerate(splits, 1):
        speed = timing.speedup(0, index)
        accuracy = compare_hits("top-1", before, hits(split, data))
        yield Row(method, setting, split, speed.ratio, speed.ci95, accuracy)


def hits(model: pwopt.Model, data: Path) -> Flags:
    """Tell for each sample whether the model has its class first."""
    session = runtime.session(model, threads=os.cpu_count() or 1)
    right = []
    for batch in open_data(data, model, preprocess="unit"):
        (scores,) = runtime.run(session, batch.feeds, name=model.name).values()
        right.append(scores.argmax(axis=1) == batch.labels)
    return np.concatenate(right)


def line(model: pwopt.Model, row: Row) -> str:
    accuracy = row.accuracy
    before, after = analysis.size(model).macs, analysis.size(row.model).macs
    assert before is not None
    assert after is not None
    return (
        f"| {row.method} | {row.setting} | {before / after:.2f} "
        f"| {row.speedup:.2f}× [{row.speedup_ci95[0]:.2f}, {row.speedup_ci95[1]:.2f}] "
        f"| {-row.loss:+.2f} [{-accuracy.drop_ci95[1]:+.2f}, {-accuracy.drop_ci95[0]:+.2f}] |"
    )


def compared(rival: Row, svds: Sequence[Row], ours: Row) -> str:
    """Compare losses; that of SVD is taken on the line between its points, at pwopt's speed-up."""
    speeds, losses = np.array(sorted((row.speedup, row.loss) for row in svds)).T
    svd = float(np.interp(ours.speedup, speeds, losses))
    return (
        f"| {rival.speedup:.2f}×, {ours.speedup:.2f}× "
        f"| {rival.loss:.2f}, {svd:.2f}, {ours.loss:.2f} "
        f"| {ours.loss / rival.loss:.2f} | {ours.loss / svd:.2f} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
