"""A tiny network, one like it with a bottleneck in it, and images for both."""

from pathlib import Path

import numpy as np
from helpers import Array, parse

from pwopt.model import Model

TEACHER = """
    net (float[N,3,8,8] x) => (float[N,4] y)
    <float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2, float[4,8] w3, float[4] b3>
    {
        a = Conv<pads = [1,1,1,1]>(x, w1, b1)
        ra = Relu(a)
        b = Conv<pads = [1,1,1,1]>(ra, w2, b2)
        rb = Relu(b)
        g = GlobalAveragePool(rb)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, w3, b3)
    }
"""

STUDENT = TEACHER.replace("float[8,8,3,3] w2", "float[6,8,1,1] wr, float[8,6,3,3] w2").replace(
    "b = Conv<pads = [1,1,1,1]>(ra, w2, b2)",
    "r = Conv(ra, wr)  b = Conv<pads = [1,1,1,1]>(r, w2, b2)",
)


def teacher(text: str = TEACHER) -> Model:
    """Make the network; what it gives varies a lot with its input."""
    rng = np.random.default_rng(5)
    return parse(text, {"w3": rng.standard_normal((4, 8)) * 6}) if "w3" in text else parse(text)


def student(text: str = STUDENT) -> Model:
    """Make the one that has other weights where they differ, and the teacher's elsewhere."""
    rng = np.random.default_rng(5)
    return parse(text, {"w3": rng.standard_normal((4, 8)) * 6}, seed=3)


def images(count: int = 160) -> Array:
    """Draw images with some structure."""
    rng = np.random.default_rng(1)
    wide = rng.standard_normal((count, 3, 1, 1)) + 0.5 * rng.standard_normal((count, 3, 8, 8))
    return wide.astype(np.float32)


def write(folder: Path, count: int = 160) -> tuple[Path, Path, Path]:
    """Write student.onnx, teacher.onnx and data.npz."""
    student().save(folder / "student.onnx")
    teacher().save(folder / "teacher.onnx")
    np.savez(folder / "data.npz", x=images(count), labels=np.arange(count) % 4)
    return folder / "student.onnx", folder / "teacher.onnx", folder / "data.npz"
