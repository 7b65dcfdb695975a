"""fp32 matrix products on a CPU with oneDNN instead of MKL. torch contains both libraries.

torch multiplies fp32 matrices with MKL, which does not use the widest instructions of non-Intel processors: on an AMD
EPYC with AVX-512, oneDNN was about twice as fast at most sizes and never slower at large ones (benchmarks/README.md,
"without onednn.py"). torch uses oneDNN for bf16 and in compiled graphs, but has no switch for plain fp32 products. Use:

    with onednn.products():
        model(input_ids)

Inside the context, F.linear is replaced in all threads. Calls with other devices or dtypes run as before, as does
everything if torch was built without oneDNN. Results are as accurate, but not bit-identical.

Needs torch only; copy this file alone into another code base.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# oneDNN compiles code for every new shape. It caches the last 1024 pieces, and ideep, torch's wrapper, as many of its
# own. If shapes vary, both caches fill up: 150 training steps of a small model grew the process by 960 MB, but by 280
# MB with these bounds, and were no slower. With 128 pieces, generation at 40 batch sizes compiled in every step and was
# 10 times slower.
CACHE_BOUNDS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "64"}


def available() -> bool:
    """Whether this build of torch can multiply fp32 matrices with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
def products() -> Iterator[None]:
    """Context manager: inside it, oneDNN computes the fp32 products on the CPU, if it is available.

    Bounds oneDNN's caches, for the whole process, by environment variables; those that are set already stay as they
    are. oneDNN reads them once: if the process has used oneDNN before, they have no effect.
    """
    for name, value in CACHE_BOUNDS.items():
        os.environ.setdefault(name, value)
    original = F.linear

    @wraps(original)
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _fits(input, weight, bias):
            return original(input, weight, bias)
        trained = any(t is not None and t.requires_grad for t in (input, weight, bias))
        return (_Linear.apply if trained and torch.is_grad_enabled() else _product)(input, weight, bias)

    if available():
        F.linear = call
    try:
        yield
    finally:
        F.linear = original


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can compute F.linear(x, weight, bias): a plain eager call with fp32 tensors on the CPU."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    eager = not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    # oneDNN does not check shapes, and reads every bias as if it were contiguous.
    good_shapes = weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1]
    good_bias = bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    return plain and eager and good_shapes and good_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (x.numel() and weight.numel()):  # oneDNN rejects some empty tensors
        return torch._C._nn.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(Function):
    """(..., I), (O, I), (O,) -> (..., O). Differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # (N, O)
        d_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = _product(flat.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
