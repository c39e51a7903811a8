"""conv-to-gemm: which convolutions become matrix products, what comes along, what is left alone."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from helpers import (
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    parse,
    random_feeds,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.models import BUILDERS
from pwopt.passes.conv_to_gemm import ConvToGemm
from pwopt.passes.gemm_to_conv import GemmToConv
from pwopt.rewriting import Context, Judgement

Array = npt.NDArray[Any]

GEMM = ConvToGemm()
MATMUL = ConvToGemm(general=True)
CONV = GemmToConv()


def opset(version: int, text: str) -> str:
    ir = {7: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7}.get(version, 8)
    return f'<ir_version: {max(ir, 4)}, opset_import: ["" : {version}]> {text}'


def ops(outcome: Outcome) -> list[str]:
    return [node.op_type for node in outcome.proto.graph.node]


def became(text: str, *expected: str, step: ConvToGemm = GEMM, rtol: float = 1e-4) -> Outcome:
    """Apply the pass; assert the operators afterwards and that the numbers stay."""
    model = parse(text)
    outcome = apply(model, step)
    assert ops(outcome) == list(expected), outcome.events
    assert_same_numbers(outcome.model, model, rtol)
    return outcome


# -- one convolution --------------------------------------------------------------------------


def test_pointwise_on_a_pixel_before_a_flatten() -> None:
    before = """
    head (float[N,4,5,5] x) => (float[N,6] y)
    <float[6,4,1,1] w, float[6] b>
    { p = GlobalAveragePool(x)  c = Conv(p, w, b)  y = Flatten(c) }
    """
    after = """
    head (float[N,4,5,5] x) => (float[N,6] y)
    <float[6,4] w, float[6] b>
    {
      p = GlobalAveragePool(x)
      p.flat = Flatten<axis=1>(p)
      y = Gemm<transB=1>(p.flat, w, b)
    }
    """
    outcome = assert_pass(before, GEMM, after)
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("c", "became a Gemm", {"convs": 1})
    ]


def test_kernel_that_covers_its_input() -> None:
    before = """
    head (float[N,4,3,2] x) => (float[N,6] y) <float[6,4,3,2] w, float[6] b>
    { c = Conv<kernel_shape=[3,2]>(x, w, b)  y = Flatten(c) }
    """
    after = """
    head (float[N,4,3,2] x) => (float[N,6] y) <float[6,24] w, float[6] b>
    { x.flat = Flatten<axis=1>(x)  y = Gemm<transB=1>(x.flat, w, b) }
    """
    outcome = assert_pass(before, GEMM, after)
    original = values(parse(before).proto)["w"]
    assert values(outcome.proto)["w"].tobytes() == original.tobytes()


def test_chain_with_activations() -> None:
    before = """
    head (float[N,4,3,3] x) => (float[N,2] y)
    <float[6,4,3,3] w, float[6] b, float[5,6,1,1] v, float[2,5,1,1] u, float[2] c>
    {
      h = Conv(x, w, b)
      i = Relu(h)
      j = Conv(i, v)
      k = Dropout(j)
      l = HardSigmoid<alpha=0.3>(k)
      m = Conv(l, u, c)
      n = Sigmoid(m)
      y = Flatten(n)
    }
    """
    after = """
    head (float[N,4,3,3] x) => (float[N,2] y)
    <float[6] b, float[2] c, float[6,36] w, float[5,6] v, float[2,5] u>
    {
      x.flat = Flatten<axis=1>(x)
      h.flat = Gemm<transB=1>(x.flat, w, b)
      i.flat = Relu(h.flat)
      j.flat = Gemm<transB=1>(i.flat, v)
      k.flat = Dropout(j.flat)
      l.flat = HardSigmoid<alpha=0.3>(k.flat)
      m.flat = Gemm<transB=1>(l.flat, u, c)
      y = Sigmoid(m.flat)
    }
    """
    outcome = assert_pass(before, GEMM, after)
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("h", "became 3 Gemms", {"convs": 3})
    ]
