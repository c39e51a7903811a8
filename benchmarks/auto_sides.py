"""Which rule should choose the sides of a split: four rules, on trained networks.

usage: python benchmarks/auto_sides.py ASSETS > table.md

A cell is MACs ÷ (points of top-1 lost). The networks for CIFAR-10 are judged on the first 1,000
evaluation images.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

import pwopt
from pwopt.candidates import Candidate
from pwopt.cost import ConvSize
from pwopt.models import DEMO_EVALUATION, DEMO_MODEL

Rule = Callable[[ConvSize, Candidate], tuple[float, ...]]

RULES: dict[str, Rule] = {  # the form with the lowest value is taken
    "least energy lost per MAC saved": lambda conv, c: (
        (1 - c.kept_energy) / (conv.macs - c.macs),
    ),
    "least energy lost": lambda conv, c: (-c.kept_energy,),
    "least energy lost × MACs left": lambda conv, c: ((1 - c.kept_energy) * c.macs,),
    "≥ 1.5× faster, then least energy lost": lambda conv, c: (
        c.predicted_speedup < 1.5,
        -c.kept_energy,
    ),
}


def main(assets: Path) -> None:
    models, cifar = assets / "models", np.load(assets / "data" / "cifar10_val.npz")
    print(f"| network, rank | {' | '.join(RULES)} |")
    print("|---|" + "---|" * len(RULES))
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.npz"
        np.savez(few, **{name: values[:1000] for name, values in cifar.items()})
        for path, data, preprocess, ranks in (
            (DEMO_MODEL, DEMO_EVALUATION, "unit", (32, 48, 64)),
            (models / "smallvgg_cifar10.onnx", few, "raw", (32, 48, 64)),
            (models / "vgg16_cifar10.onnx", few, "unit", (64, 96, 128)),
        ):
            model = pwopt.Model.load(path)
            for rank in ranks:
                cells = [cell(model, rank, rule, data, preprocess) for rule in RULES.values()]
                print(f"| {path.stem}, {rank} | {' | '.join(cells)} |", flush=True)


def cell(model: pwopt.Model, rank: int, rule: Rule, data: Path, preprocess: str) -> str:
    with patch("pwopt.candidates._price", rule):
        result = pwopt.rewrite(model, bottleneck=rank)
    accuracy = pwopt.check(model, result.model, data=data, preprocess=preprocess).accuracy
    assert accuracy is not None  # the data has labels
    return f"{result.before.macs / result.after.macs:.2f} ({accuracy.drop_points:.1f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
