"""What plain SVD bottlenecks buy and cost: speed-up and accuracy of pretrained networks.

usage: python benchmarks/plain_svd.py ASSETS [NETWORK]... > table.md

ASSETS holds ``models/`` and ``data/`` with pretrained networks and evaluation data. One thread,
batch 1; both models of a row are timed in turn, run by run; the interval of the speed-up is a 95 %
bootstrap. The drop is in points of top-1, with a paired bootstrap interval.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pwopt


@dataclass(frozen=True)
class Case:
    """A network, its evaluation data and the ranks to try."""

    model: str
    data: str
    preprocess: str
    ranks: tuple[int, ...]


CASES = (
    Case("vgg16_cifar10.onnx", "cifar10_val.npz", "unit", (192, 128, 96, 64, 32)),
    Case("smallvgg_cifar10.onnx", "cifar10_val.npz", "raw", (64, 48, 32)),
    Case("resnet50_imagenet.onnx", "imagenet_sample", "caffe", (192, 128, 64)),
    Case("resnet56_cifar10.onnx", "cifar10_val.npz", "unit", (32, 16)),
)


def main(assets: Path, *names: str) -> None:
    print("| network | rank | split | MACs ÷ | speed-up | top-1 | change |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if names and case.model.removesuffix(".onnx") not in names:
            continue
        model = pwopt.Model.load(assets / "models" / case.model)
        for rank in case.ranks:
            print(row(model, case, rank, assets / "data" / case.data), flush=True)


def row(model: pwopt.Model, case: Case, rank: int, data: Path) -> str:
    result = pwopt.rewrite(model, bottleneck=rank)
    verdict = pwopt.check(model, result.model, data=data, preprocess=case.preprocess)
    accuracy, latency = verdict.accuracy, verdict.latency
    assert accuracy is not None  # the data has labels
    cells = (
        case.model.removesuffix(".onnx"),
        rank,
        f"{result.reports[-1].rewrote} convs",
        f"{result.before.macs / result.after.macs:.2f}",
        f"{latency.speedup:.2f}× [{latency.speedup_ci95[0]:.2f}, {latency.speedup_ci95[1]:.2f}]",
        f"{accuracy.original:.2f} → {accuracy.rewritten:.2f}",
        f"{-accuracy.drop_points:+.2f} "
        f"[{-accuracy.drop_ci95[1]:+.2f}, {-accuracy.drop_ci95[0]:+.2f}]",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
