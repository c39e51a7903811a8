"""Products of matrices."""

import torch
from torch import Tensor

from pwopt.learn.operators.node import Node, together


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """ONNX Gemm: alpha · A B + beta · C, A and B perhaps transposed."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    if c is None:
        return a @ b if alpha == 1 else alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """ONNX MatMul: numpy's."""
    return torch.matmul(*together(a, b))


def einsum(node: Node, *inputs: Tensor) -> Tensor:
    """ONNX Einsum."""
    return torch.einsum(node.get("equation"), *together(*inputs))
