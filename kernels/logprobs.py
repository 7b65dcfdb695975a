"""Log-probabilities of given tokens, from logits or straight from hidden states: differentiable, in little memory.

    logp_i = z_i[y_i] - log sum_v exp(z_iv)         z_i = W h_i
    d logp_i / d z_iv = [v = y_i] - p_iv            p_iv = exp(z_iv) / sum_u exp(z_iu)
    d logp_i / d h_i  = W[y_i] - sum_v p_iv W_v

linear_logprobs never holds the N x V logits: it makes them a chunk of rows at a time, in a buffer all chunks share.
The gradient arriving at logp_i is one number a row and only scales d logp_i / d h_i. So with a frozen W (LoRA, a tied
head) the forward pass also makes that N x D gradient, while the chunk's logits are at hand, and the backward pass is
one multiply: two matrix products in all, where recomputing the logits takes three. With a trained W the backward pass
does recompute them. If nobody wants a gradient, there is one product and nothing is saved.

The rows of a chunk are worked on by triton_rows.py on CUDA and by torch_rows.py elsewhere. TRITON_INTERPRET=1 in the
environment sends CPU tensors through the Triton kernels too: slow, but it tests them without a GPU.

Legend: N rows (tokens), D hidden width, V vocabulary entries. All log-probabilities are in nats.
"""

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import torch_rows

CUDA_BUFFER_BYTES = 512 * 2**20  # cap on the buffers of a chunk
CPU_BUFFER_BYTES = 32 * 2**20  # smaller is slower, as every chunk reads all of the weight; larger gains little
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def token_logprobs(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probability of each row's target, log softmax(logits)[target], without an fp32 copy of the logits.

    Args:
        logits: (N, V), float16, bfloat16 or float32, any strides. Computed in fp32 whatever the dtype.
        targets: (N,), any integer dtype.
        ignore_index: rows with this target give 0 and get a zero gradient.

    Returns:
        (N,) fp32, in nats. Differentiable once in logits; keeps logits and three numbers a row for that.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes or devices do not fit, or a target is neither ignore_index nor in [0, V). On CUDA a target
            out of range gives nan, value and gradient, instead: an error would have to wait for the GPU.
    """
    _check_matrix("logits", logits)
    targets = _checked_targets(targets, logits, logits.shape[1], ignore_index)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TokenLogprobs.apply(logits, targets, ignore_index)
    return _token_forward(logits, targets, ignore_index)[0]


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """token_logprobs(hidden @ weight.T, targets), the logits in fp32 and never N x V of them at once.

    Pass only the rows you need: an ignored row costs as much as any. With a frozen weight and a hidden that requires
    grad, the forward pass does the backward pass's work; call under torch.no_grad() where no gradient is wanted.

    Args:
        hidden: (N, D), float16, bfloat16 or float32, any strides.
        weight: (V, D), same dtype as hidden. Inside torch.autocast both are cast to the autocast dtype first.
        targets: (N,), any integer dtype.
        ignore_index: rows with this target give 0 and get a zero gradient.

    Returns:
        (N,) fp32, in nats. Differentiable once in hidden and weight. Keeps N x D numbers for that if the weight is
        frozen, the inputs if it is trained; its gradient is summed in an fp32 (V, D) buffer.

    Raises:
        TypeError: a dtype is none of the above, or hidden and weight differ in dtype outside autocast.
        ValueError: as in token_logprobs.

    Source: making gradients in the forward pass, chunk by chunk, is from Liger Kernel, arXiv:2410.10989.
    """
    _check_matrix("hidden", hidden)
    _check_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1] or hidden.device != weight.device:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} on {hidden.device} fits no weight {tuple(weight.shape)} on {weight.device}"
        )
    targets = _checked_targets(targets, hidden, len(weight), ignore_index)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)  # here autograd sees it and casts the gradients back
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or use torch.autocast")
    if torch.is_grad_enabled() and weight.requires_grad:
        return _TrainedHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    return _linear_forward(hidden, weight, targets, ignore_index)[0]


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {matrix.dtype}")


def _checked_targets(targets: Tensor, rows: Tensor, V: int, ignore_index: int) -> Tensor:
    """The targets as contiguous int64, checked against the (N, anything) rows and the vocabulary size."""
    if targets.dtype not in INTEGERS:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != rows.shape[:1] or targets.device != rows.device:
        raise ValueError(
            f"targets must have shape ({len(rows)},) on {rows.device}, got {tuple(targets.shape)} on {targets.device}"
        )
    if V == 0:
        raise ValueError("the vocabulary must have at least 1 entry, got V = 0")
    targets = targets.to(torch.int64).contiguous()
    if not rows.is_cuda:
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"targets[{i}] = {targets[i]} is not in [0, V) with V = {V}, nor ignored ({ignore_index})")
    return targets


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        logp, shift, log_sum = _token_forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, logp, shift, log_sum)
        ctx.ignore_index = ignore_index
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, *statistics = ctx.saved_tensors
        upstream = upstream.contiguous()  # (N,); sum() sends a stride of 0
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        backend = _backend(logits.device)
        for rows, chunk in _fp32_chunks(logits):
            known = (s[rows] for s in statistics)
            backend.row_gradient(chunk, targets[rows], ctx.ignore_index, *known, upstream[rows], grad[rows])
        return grad, None, None


def _token_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    logp, shift, log_sum = _empty_statistics(logits)
    backend = _backend(logits.device)
    for rows, chunk in _fp32_chunks(logits):
        backend.row_logprobs(chunk, targets[rows], ignore_index, logp[rows], shift[rows], log_sum[rows])
    return logp, shift, log_sum


def _fp32_chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, their logits): for torch_rows fp32 scratch copies, for Triton all rows as they are."""
    N, V = logits.shape
    if _backend(logits.device) is not torch_rows:
        yield slice(0, N), logits
        return
    step = min(max(1, N), _chunk_rows(logits.device, V, 4 * V))
    scratch = torch.empty(step, V, dtype=torch.float32, device=logits.device)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        yield rows, scratch[: rows.stop - start].copy_(logits[rows])


def _empty_statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for logp, shift and log_sum, each (N,) fp32; triton_rows.py says what they are."""
    logp, shift, log_sum = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(3))
    return logp, shift, log_sum


class _FrozenHeadLogprobs(Function):
    """Differentiates hidden alone; forward already makes the gradient, but for the upstream factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        d_hidden = torch.empty_like(hidden)
        logp, _, _ = _linear_forward(hidden, weight, targets, ignore_index, d_hidden)
        ctx.save_for_backward(d_hidden)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (d_hidden,) = ctx.saved_tensors
        # Not `*`, which would return fp32 and need another pass to round; not in place, as backward may run again.
        return torch.mul(d_hidden, upstream.unsqueeze(1), out=torch.empty_like(d_hidden)), None, None, None


class _TrainedHeadLogprobs(Function):
    """Differentiates weight, and hidden if it asks for it; backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        logp, shift, log_sum = _linear_forward(hidden, weight, targets, ignore_index)
        ctx.save_for_backward(hidden, weight, targets, logp, shift, log_sum)
        ctx.ignore_index = ignore_index
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        hidden, weight, targets, *statistics = ctx.saved_tensors
        upstream = upstream.contiguous()  # (N,)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)  # a sum over chunks, so fp32
        factor = _as_factor(weight)
        backend = _backend(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits, grad in _logit_chunks(hidden, factor, with_grad=True):
                known = (s[rows] for s in statistics)
                backend.row_gradient(logits, targets[rows], ctx.ignore_index, *known, upstream[rows], grad)
                _add_matmul(d_weight, grad.t(), _as_factor(hidden[rows]))
                if d_hidden is not None:
                    _matmul(grad, factor, out=d_hidden[rows])
        return d_hidden, d_weight.to(weight.dtype), None, None


def _linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, d_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, shift, log_sum); also fills d_hidden (N, D), if given, with d logp_i / d h_i."""
    logp, shift, log_sum = _empty_statistics(hidden)
    factor = _as_factor(weight)
    backend = _backend(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # or it would round fp32 factors to 16 bits
        for rows, logits, grad in _logit_chunks(hidden, factor, with_grad=d_hidden is not None):
            backend.row_logprobs(logits, targets[rows], ignore_index, logp[rows], shift[rows], log_sum[rows], grad)
            if d_hidden is not None:
                _matmul(grad, factor, out=d_hidden[rows])
    return logp, shift, log_sum


def _logit_chunks(hidden: Tensor, factor: Tensor, with_grad: bool) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(which rows, their fp32 logits, if wanted a buffer for the logits' gradient); the next chunk overwrites both.

    The gradient is multiplied by `factor`, the weight, and has its dtype. In fp32 it shares the buffer of the logits.
    """
    (N, D), V = hidden.shape, len(factor)
    stride = (V + 63) // 64 * 64  # V = 50257 is odd: without padding, rows are too ill-aligned for wide loads
    dtypes = {torch.float32, factor.dtype} if with_grad else {torch.float32}
    step = min(max(1, N), _chunk_rows(hidden.device, D, stride * sum(dtype.itemsize for dtype in dtypes)))
    buffers = {dtype: torch.empty(step, stride, dtype=dtype, device=hidden.device)[:, :V] for dtype in dtypes}
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        chunk = {dtype: buffer[: rows.stop - start] for dtype, buffer in buffers.items()}
        _matmul(_as_factor(hidden[rows]), factor.t(), out=chunk[torch.float32])
        yield rows, chunk[torch.float32], chunk[factor.dtype] if with_grad else None


def _chunk_rows(device: torch.device, D: int, row_bytes: int) -> int:
    """Rows of logits to hold at a time: a fixed rule rather than a search, so that the first call is as fast as any.

    On CUDA a multiple of 128 under the memory cap. The product that writes the (rows, D) gradient has few 128 x 256
    tiles: take as many as fill every processor a whole number of times or, if the cap denies that, all it allows.
    """
    if device.type != "cuda":
        return max(1, CPU_BUFFER_BYTES // row_bytes)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = max(1, CUDA_BUFFER_BYTES // row_bytes // 128)  # in blocks of 128 rows
    tiles = (D + 255) // 256  # of each block
    waves = max(1, most * tiles // processors)
    return 128 * max(1, min(most, waves * processors // tiles))


def _as_factor(matrix: Tensor) -> Tensor:
    """The matrix in a dtype whose products can be had in fp32: any dtype on CUDA, fp32 elsewhere."""
    return matrix if matrix.is_cuda else matrix.float()


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed in fp32 and rounded once, to out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)  # 16-bit factors, fp32 result; from torch 2.8 on
    else:
        out.copy_(torch.mm(a, b))  # fp32 factors, 16-bit result


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total being fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _backend(device: torch.device) -> ModuleType:
    """The module whose row_logprobs and row_gradient work on this device."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from . import triton_rows  # not at the top: without triton, all else still works

        return triton_rows
    return torch_rows
