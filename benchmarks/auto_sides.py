"""Which rule should choose the sides of a split: three rules, on trained networks.

usage: python benchmarks/auto_sides.py ASSETS > table.md

A cell is MACs ÷ (points of top-1 lost). VGG-16 is judged on its first 1,000 evaluation images.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

import pwopt
from pwopt.analysis import Candidate
from pwopt.models import DEMO_EVALUATION, DEMO_MODEL

Rule = Callable[[Candidate], tuple[float, ...]]

RULES: dict[str, Rule] = {
    "most energy kept": lambda c: (c.kept_energy,),
    "least energy lost × MACs left": lambda c: (-(1 - c.kept_energy) * c.macs,),
    "≥ 1.5× faster, then most energy kept": lambda c: (c.predicted_speedup >= 1.5, c.kept_energy),
    "≥ 2× faster, then most energy kept": lambda c: (c.predicted_speedup >= 2, c.kept_energy),
}


def main(assets: Path) -> None:
    cifar = np.load(assets / "data" / "cifar10_val.npz")
    few = {name: values[:1000] for name, values in cifar.items()}
    np.savez("auto_sides_1000.npz", **few)
    networks = (
        (DEMO_MODEL, DEMO_EVALUATION, "unit", (32, 48, 64)),
        (assets / "models" / "smallvgg_cifar10.onnx", "auto_sides_1000.npz", "raw", (32, 48, 64)),
        (assets / "models" / "vgg16_cifar10.onnx", "auto_sides_1000.npz", "unit", (64, 96, 128)),
    )
    print(f"| network, rank | {' | '.join(RULES)} |")
    print("|---|" + "---|" * len(RULES))
    for path, data, preprocess, ranks in networks:
        model = pwopt.Model.load(path)
        for rank in ranks:
            cells = [cell(model, rank, rule, data, preprocess) for rule in RULES.values()]
            print(f"| {path.stem}, {rank} | {' | '.join(cells)} |", flush=True)
    Path("auto_sides_1000.npz").unlink()


def cell(model: pwopt.Model, rank: int, rule: Rule, data: Path | str, preprocess: str) -> str:
    with patch("pwopt.analysis._merit", rule):
        result = pwopt.rewrite(model, bottleneck=rank)
    accuracy = pwopt.check(model, result.model, data=data, preprocess=preprocess).accuracy
    assert accuracy is not None  # the data has labels
    return f"{result.before.macs / result.after.macs:.2f} ({accuracy.drop_points:+.1f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
