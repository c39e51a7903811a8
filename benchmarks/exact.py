"""What exact rewrites are worth: pretrained networks and all builders of `pwopt.models`.

usage: python benchmarks/exact.py ASSETS [NETWORK]... > table.md

ASSETS holds ``models/`` with pretrained networks. One thread, batch 1, random inputs; both models
of a row are timed in turn, run by run; the interval of the speed-up is a 95 % bootstrap. Nothing is
timed where nothing was rewritten, for then both models are the same.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pwopt
from pwopt.models import BUILDERS

ASSETS = ("vgg16_cifar10", "smallvgg_cifar10", "resnet56_cifar10", "resnet50_imagenet")

SMALLER = {"vgg16": {"size": 64, "width": 32}}
"""Builders not at the size of their source, which would be 553 MB."""


def main(assets: Path, *names: str) -> None:
    print("| network | rewritten | MACs | parameters | max_rel | speed-up | took |")
    print("|---|---|---|---|---|---|---|")
    for name, model in networks(assets, names):
        print(row(name, model), flush=True)


def networks(assets: Path, names: tuple[str, ...]) -> Iterator[tuple[str, pwopt.Model]]:
    for name in ASSETS:
        if not names or name in names:
            yield name, pwopt.Model.load(assets / "models" / f"{name}.onnx")
    for name, build in BUILDERS.items():
        if not names or name in names:
            options = SMALLER.get(name, {})
            text = ", ".join(f"{key}={value}" for key, value in options.items())
            yield name + f" ({text})" * bool(text), pwopt.Model(build(**options))


def row(name: str, model: pwopt.Model) -> str:
    begin = time.perf_counter()
    result = pwopt.rewrite(model, exact=True, gate="measured")
    took = f"{time.perf_counter() - begin:.1f} s"
    macs = change(result.before.macs, result.after.macs)
    params = change(result.before.params, result.after.params)
    if not result.changed:
        return line(name, "unchanged", macs, params, "", "", took)
    verdict = pwopt.check(model, result.model)
    latency = verdict.latency
    return line(
        name,
        ", ".join(f"{step.name}: {step.rewrote}" for step in result.reports if step.rewrote),
        macs,
        params,
        f"{verdict.equivalence.max_rel:.1e}",
        f"{latency.speedup:.2f}× [{latency.speedup_ci95[0]:.2f}, {latency.speedup_ci95[1]:.2f}]",
        took,
    )


def change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "unknown"
    if before == after:
        return f"{before:,}"
    return f"{before:,} → {after:,} ({100 * (after / before - 1):+.1f} %)"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
