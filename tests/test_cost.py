"""Costs: MACs and parameters by hand, predicted speed-ups against measured ones."""

import ml_dtypes
import numpy as np
import pytest

from pwopt.cost import ConvSize, Sides, Split, is_parameter, node_macs, tensor_bytes


def square(cin: int, cout: int, k: int, size: int, *, stride: int = 1) -> ConvSize:
    return ConvSize(
        in_channels=cin,
        out_channels=cout,
        kernel=(k, k),
        input_positions=size * size,
        output_positions=(size // stride) ** 2,
    )


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "output", "macs"),
    [
        ("Conv", {}, [(1, 3, 8, 8), (16, 3, 3, 3)], (1, 16, 8, 8), 8 * 8 * 16 * 27),
        ("Conv", {}, [(2, 3, 8, 8), (16, 3, 3, 3), (16,)], (2, 16, 4, 4), 2 * 4 * 4 * 16 * 27),
        ("Conv", {"group": 4}, [(1, 8, 5), (12, 2, 3)], (1, 12, 3), 3 * 12 * 2 * 3),
        ("Conv", {}, [(1, 2, 4, 4, 4), (5, 2, 2, 2, 2)], (1, 5, 3, 3, 3), 27 * 5 * 16),
        ("ConvTranspose", {}, [(1, 8, 4, 4), (8, 6, 3, 3)], (1, 6, 9, 9), 16 * 8 * 6 * 9),
        ("ConvTranspose", {"group": 2}, [(1, 8, 4), (8, 3, 2)], (1, 6, 8), 4 * 8 * 3 * 2),
        ("Gemm", {}, [(5, 7), (7, 3)], (5, 3), 105),
        ("Gemm", {"transA": 1, "transB": 1}, [(7, 5), (3, 7)], (5, 3), 105),
        ("MatMul", {}, [(2, 1, 4, 6), (3, 6, 5)], (2, 3, 4, 5), 2 * 3 * 4 * 5 * 6),
        ("MatMul", {}, [(6,), (6,)], (), 6),
        ("MatMul", {}, [(6,), (6, 4)], (4,), 24),
    ],
)
def test_macs_by_hand(
    op: str,
    attributes: dict[str, object],
    inputs: list[tuple[int, ...]],
    output: tuple[int, ...],
    macs: int,
) -> None:
    assert node_macs(op, attributes, inputs, output) == macs


def test_macs_are_unknown_where_a_shape_is() -> None:
    assert node_macs("Conv", {}, [None, (8, 3, 3, 3)], (1, 8, None, 8)) is None
    assert node_macs("Conv", {}, [None, (8, 3, 3, 3)], None) is None
    assert node_macs("Conv", {}, [None, (8, 3, 3, 3)], (1, 8, 8, 8)) == 64 * 8 * 27
    assert node_macs("MatMul", {}, [None, (3, 4)], (2, 4)) is None


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        (np.float32, True),
        (np.float16, True),
        (ml_dtypes.bfloat16, True),
        (ml_dtypes.int4, True),
        (np.int8, True),
        (np.int64, False),
        (np.bool_, False),
        (np.object_, False),
    ],
)
def test_parameters_are_floats_and_quantized_weights(dtype: type, counts: bool) -> None:
    assert is_parameter(np.dtype(dtype)) is counts


def test_bytes_pack_small_types() -> None:
    assert tensor_bytes(5, np.dtype(np.float16)) == 10
    assert tensor_bytes(5, np.dtype(ml_dtypes.int4)) == 3
    assert tensor_bytes(5, np.dtype(ml_dtypes.float8_e4m3fn)) == 5


def test_tutorial_example_7x7_on_512_maps() -> None:
    conv = ConvSize(
        in_channels=512,
        out_channels=64,
        kernel=(7, 7),
        bias=True,
        input_positions=28 * 28,
        output_positions=22 * 22,
    )
    assert conv.params == 1_605_696
    reduce, core = Split(conv, "input", 64).parts
    assert (reduce.params, core.params) == (512 * 64, 7 * 7 * 64 * 64 + 64)
    assert reduce.params + core.params == 233_536


def test_a_stride_makes_the_1x1_on_the_input_side_dearer() -> None:
    conv = square(64, 64, 3, 16, stride=2)
    before, core = Split(conv, "input", 16).parts
    assert before.macs == 16 * 16 * 64 * 16
    assert core.macs == 8 * 8 * 16 * 64 * 9
    core, after = Split(conv, "output", 16).parts
    assert core.macs == 8 * 8 * 64 * 16 * 9
    assert after.macs == 8 * 8 * 16 * 64


def test_both_sides_chain_channels_and_positions() -> None:
    parts = Split(square(48, 64, 3, 16, stride=2), "both", 16).parts
    assert [(p.in_channels, p.out_channels, p.kernel) for p in parts] == [
        (48, 16, (1, 1)),
        (16, 16, (3, 3)),
        (16, 64, (1, 1)),
    ]
    assert [(p.input_positions, p.output_positions) for p in parts] == [
        (256, 256),
        (256, 64),
        (64, 64),
    ]


# Measured in onnxruntime 1.31, float32, one thread, AVX-512: input, output, both sides.
MEASURED = [
    (square(512, 512, 3, 28), 64, (6.76, 6.83, 18.9)),
    (square(512, 512, 3, 28), 256, (1.77, 1.79, 2.73)),
    (square(256, 256, 3, 56), 64, (3.41, 3.42, 7.14)),
    (square(64, 64, 3, 112), 16, (2.84, 2.41, 4.22)),
    (square(512, 64, 7, 28), 64, (6.86,)),
    # Small maps, where reading weights takes longer than computing.
    (square(64, 64, 3, 8), 16, (3.15, 2.78, 5.23)),
    (square(64, 64, 3, 8), 32, (1.69, 1.63, 2.29)),
    (square(128, 128, 3, 16), 32, (3.40, 3.28, 7.02)),
    (square(256, 256, 3, 8), 64, (3.40, 3.41, 7.47)),
    (square(512, 512, 3, 4), 64, (6.64, 6.84, 20.56)),
    (square(512, 512, 3, 2), 64, (6.57, 6.80, 20.30)),
    (square(512, 512, 3, 2), 224, (2.04, 1.99, 3.57)),
]


@pytest.mark.parametrize(("conv", "rank", "measured"), MEASURED)
def test_predicted_speedup_agrees_with_measured(
    conv: ConvSize, rank: int, measured: tuple[float, ...]
) -> None:
    choices: tuple[Sides, ...] = ("input", "output", "both")
    for sides, speedup in zip(choices, measured, strict=False):
        assert Split(conv, sides, rank).speedup == pytest.approx(speedup, rel=0.19)


def test_a_rank_between_blocks_costs_as_much_as_the_next_block() -> None:
    conv = square(256, 256, 3, 28)
    at_20, at_32 = Split(conv, "input", 20).speedup, Split(conv, "input", 32).speedup
    assert at_20 == pytest.approx(at_32, rel=0.05)
