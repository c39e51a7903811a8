"""What exact rewrites are worth: pretrained networks and all builders of `pwopt.models`.

usage: python benchmarks/exact.py ASSETS [NETWORK]... > table.md
       python benchmarks/exact.py sites > table.md

ASSETS holds ``models/`` with pretrained networks. One thread, batch 1, random inputs; both models
of a row are timed in turn, run by run; the interval of the speed-up is a 95 % bootstrap. Nothing is
timed where nothing was rewritten, for then both models are the same. ``sites`` runs each pass, not
judged, on one small site of its own instead.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx.parser
from onnx import helper, numpy_helper

import pwopt
from pwopt.models import BUILDERS

ASSETS = ("vgg16_cifar10", "smallvgg_cifar10", "resnet56_cifar10", "resnet50_imagenet")

SMALLER = {"vgg16": {"size": 64, "width": 32}}
"""Builders not at the size of their source, which would be 553 MB."""

SITES = {
    "fold-affine": """(float[1,64,56,56] x) => (float[1,64,56,56] y)
        <float[64,64,3,3] w, float[64] scale, float[64] shift, float[64] mean, float[64] var>
        { a = Conv<pads=[1,1,1,1]>(x, w)
          y = BatchNormalization(a, scale, shift, mean, var) }""",
    "fold-affine-before": """(float[1,32,15,15] x) => (float[1,64,13,13] y)
        <float[32] scale, float[32] shift, float[32] mean, float[32] var,
         float[64,32,3,3] w, float[64] b>
        { a = Relu(x)
          n = BatchNormalization(a, scale, shift, mean, var)
          y = Conv(n, w, b) }""",
    "fold-pad": """(float[1,3,224,224] x) => (float[1,64,112,112] y)
        <float[64,3,7,7] w, int64[8] p = {0,0,3,3,0,0,3,3}>
        { a = Pad(x, p)
          y = Conv<strides=[2,2]>(a, w) }""",
    "merge-linear-convs": """(float[1,64,28,28] x) => (float[1,64,28,28] y)
        <float[256,64,1,1] w, float[256] b, float[64,256,1,1] v, float[64] c>
        { a = Conv(x, w, b)
          y = Conv(a, v, c) }""",
    "pool-before-pointwise": """(float[1,256,56,56] x) => (float[1,128,28,28] y)
        <float[128,256,1,1] w>
        { a = Conv(x, w)
          y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a) }""",
    "hoist-stride": """(float[1,64,56,56] x) => (float[1,128,28,28] y)
        <float[64,64,3,3] w, float[128,64,1,1] v>
        { a = Conv<pads=[1,1,1,1]>(x, w)
          r = Relu(a)
          y = Conv<strides=[2,2]>(r, v) }""",
    "fuse-siblings": """(float[1,192,28,28] x) => (float[1,64,28,28] y, float[1,96,28,28] z)
        <float[64,192,1,1] w, float[96,192,1,1] v>
        { y = Conv(x, w)
          z = Conv(x, v) }""",
    "gemm-to-conv": """(float[1,512,7,7] x) => (float[1,10] y)
        <float[4096,25088] w, float[4096] b, float[10,4096] v, float[10] c>
        { f = Flatten(x)
          h = Gemm<transB=1>(f, w, b)
          r = Relu(h)
          y = Gemm<transB=1>(r, v, c) }""",
    "conv-to-gemm": """(float[1,512,1,1] x) => (float[1,10] y)
        <float[256,512,1,1] w, float[256] b, float[10,256,1,1] v, float[10] c>
        { h = Conv(x, w, b)
          r = Relu(h)
          m = Conv(r, v, c)
          y = Flatten(m) }""",
    "conv-to-gemm{general=true}": """(float[1,64,28,28] x) => (float[1,128,28,28] y)
        <float[128,64,1,1] w, float[128] b>
        { y = Conv(x, w, b) }""",
}
"""The examples of docs/exact-rewrites.md, as `onnx.parser` reads them."""


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
    if not result.changed:
        size = result.before
        return line(name, "unchanged", f"{size.macs:,}", f"{size.params:,}", "", "", took)
    passes = ", ".join(f"{step.name}: {step.rewrote}" for step in result.reports if step.rewrote)
    return line(name, passes, *compared(model, result), took)


def compared(model: pwopt.Model, result: pwopt.Rewritten) -> tuple[str, ...]:
    """Return the cells MACs, parameters, max_rel and speed-up."""
    verdict = pwopt.check(model, result.model)
    latency = verdict.latency
    return (
        change(result.before.macs, result.after.macs),
        change(result.before.params, result.after.params),
        f"{verdict.equivalence.max_rel:.1e}",
        f"{latency.speedup:.2f}× [{latency.speedup_ci95[0]:.2f}, {latency.speedup_ci95[1]:.2f}]",
    )


def change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "unknown"
    if before == after:
        return f"{before:,}"
    return f"{before:,} → {after:,} ({100 * (after / before - 1):+.1f} %)"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def sites() -> None:
    print("| pass | MACs | parameters | max_rel | speed-up |")
    print("|---|---|---|---|---|")
    for name, text in SITES.items():
        model = pwopt.Model(with_weights(text))
        print(line(f"`{name}`", *compared(model, pwopt.rewrite(model, pipeline=name))), flush=True)


def with_weights(text: str) -> onnx.ModelProto:
    """Parse a graph; what no node writes becomes a positive random constant."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> site {text}')
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:
        tensor = info.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        values = rng.random(shape).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        model.graph.initializer.append(numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    return model


if __name__ == "__main__":
    if sys.argv[1:] == ["sites"]:
        sites()
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
