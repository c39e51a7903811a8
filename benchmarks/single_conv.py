"""How far the predicted speed-up of a split holds in onnxruntime: one convolution at a time.

usage: python benchmarks/single_conv.py > table.md

One thread, batch 1; the convolution and its split are timed in turn, run by run.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import pwopt

CONVS = (  # in channels, out channels, kernel, positions along each side, ranks
    (512, 512, 3, 28, (64, 256)),
    (512, 512, 3, 4, (64, 256)),
    (256, 256, 3, 56, (64,)),
    (64, 64, 3, 112, (16,)),
    (512, 64, 7, 28, (32,)),
)


def main() -> None:
    print("| conv | rank | sides | MACs ÷ | predicted | measured |")
    print("|---|---|---|---|---|---|")
    for inputs, outputs, kernel, side, ranks in CONVS:
        model = single_conv(inputs, outputs, kernel, side)
        for rank in ranks:
            for sides in ("input", "output", "both"):
                result = pwopt.rewrite(model, bottleneck=rank, sides=sides)
                if not result.changed:
                    continue
                event = result.reports[-1].events[0]
                latency = pwopt.check(model, result.model).latency
                low, high = latency.speedup_ci95
                print(
                    f"| {kernel}×{kernel} {inputs}→{outputs} @{side}² | {rank} | {sides} "
                    f"| {result.before.macs / result.after.macs:.2f} "
                    f"| {event.data['predicted_speedup']:.2f}× "
                    f"| {latency.speedup:.2f}× [{low:.2f}, {high:.2f}] |",
                    flush=True,
                )


def single_conv(inputs: int, outputs: int, kernel: int, side: int) -> pwopt.Model:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(outputs, inputs, kernel, kernel)).astype(np.float32)
    pads = [kernel // 2] * 4
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"], name="conv", pads=pads)],
        "single_conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs, side, side])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = helper.make_opsetid("", 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(proto)
    return pwopt.Model(proto)


if __name__ == "__main__":
    main()
