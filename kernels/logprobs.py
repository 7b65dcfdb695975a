"""Log-probabilities of given tokens, from logits or straight from hidden states: differentiable, in little memory.

    logp_i = z_i[y_i] - log sum_v exp(z_iv)         z_i = W h_i
    d logp_i / d z_iv = [v = y_i] - p_iv            p_iv = exp(z_iv) / sum_u exp(z_iu)
    d logp_i / d h_i  = (1 - p_i[y_i]) W[y_i] - sum_v p_iv W_v, v != y_i

linear_logprobs never holds the N x V logits: it makes them a tile at a time, some rows by some columns, in a buffer all
tiles share. The gradient arriving at logp_i is one number a row and only scales d logp_i / d h_i. So with a frozen W
(LoRA, a tied head) the forward pass also makes that N x D gradient, while a tile's logits are at hand, and the backward
pass is one multiply: two matrix products in all, where recomputing the logits takes three. The sum over v is gathered
tile by tile as attention gathers its values, here the rows of W: weighted by exp(z_v - shift), and scaled down whenever
a tile raises the shift. With a trained W the backward pass does recompute the logits. If nobody wants a gradient,
there is one product and nothing is saved.

A tile is worked on by triton_rows.py on CUDA and by torch_rows.py elsewhere. TRITON_INTERPRET=1 in the environment
sends CPU tensors through the Triton kernels too: slow, but it tests them without a GPU.

Legend: N rows (tokens), D hidden width, V vocabulary entries. All log-probabilities are in nats.
"""

import os
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import torch_rows
from .tiles import accumulator, add_product, empty, round_into, scratch_rows, slices, tiles

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
    targets = _checked_targets(targets, logits, logits.shape[1])
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TokenLogprobs.apply(logits, targets, ignore_index)
    return _token_forward(logits, targets, ignore_index)[0]


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """token_logprobs(hidden @ weight.T, targets), the logits in fp32 and never N x V of them at once.

    Pass only the rows you need: an ignored row costs as much as any. With a frozen weight and a hidden that requires
    grad, the forward pass does the backward pass's work; call under torch.no_grad() where no gradient is wanted.

    Args:
        hidden: (N, D), float16, bfloat16 or float32, any strides.
        weight: (V, D), same dtype as hidden. Inside torch.autocast both are cast to the autocast dtype first. On CUDA
            the memory behind a contiguous weight, up to a multiple of 64 rows, is multiplied too if it belongs to the
            same storage: it must hold finite numbers, best zeros, and adds nothing.
        targets: (N,), any integer dtype.
        ignore_index: rows with this target give 0 and get a zero gradient.

    Returns:
        (N,) fp32, in nats. Differentiable once in hidden and weight. Keeps N x D fp32 numbers for that if the
        weight is frozen, the inputs if it is trained.

    Raises:
        TypeError: a dtype is none of the above, or hidden and weight differ in dtype outside autocast.
        ValueError: as in token_logprobs.

    Source: making gradients in the forward pass is from Liger Kernel, arXiv:2410.10989; the running sum over tiles
    from FlashAttention, arXiv:2205.14135.
    """
    _check_matrix("hidden", hidden)
    _check_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1] or hidden.device != weight.device:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} on {hidden.device} fits no weight {tuple(weight.shape)} on {weight.device}"
        )
    targets = _checked_targets(targets, hidden, len(weight))
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)  # here autograd sees it and casts the gradients back
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or use torch.autocast")
    if torch.is_grad_enabled() and weight.requires_grad:
        return _TrainedHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    return _linear_forward(hidden, weight, targets, ignore_index, False)[0]


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {matrix.dtype}")


def _checked_targets(targets: Tensor, rows: Tensor, V: int) -> Tensor:
    """The targets as contiguous int64, checked against the (N, anything) rows and the vocabulary size."""
    if targets.dtype not in INTEGERS:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != rows.shape[:1] or targets.device != rows.device:
        raise ValueError(
            f"targets must have shape ({len(rows)},) on {rows.device}, got {tuple(targets.shape)} on {targets.device}"
        )
    if V == 0:
        raise ValueError("the vocabulary must have at least 1 entry, got V = 0")
    return targets.to(torch.int64).contiguous()


def _check_range(targets: Tensor, V: int, ignore_index: int) -> None:
    if targets.is_cuda:
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{i}] = {targets[i]} is not in [0, V) with V = {V}, nor ignored ({ignore_index})")


def _operator(fake: Callable) -> Callable:
    """Decorator: torch.compile takes the function for one operator, whose empty results `fake` makes.

    Eager calls go straight to the function. Operators are named after this module, so that copies of it can coexist.
    """

    def decorate(function: Callable) -> Callable:
        name = f"{__name__}{function.__name__}".replace(".", "_")
        operator = torch.library.custom_op(f"logprobs::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


# ---- from logits ----


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
        return _token_backward(*ctx.saved_tensors, upstream, ctx.ignore_index), None, None


@_operator(lambda logits, *_: _empty_statistics(logits))
def _token_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, shift, log_sum), each (N,)."""
    V = logits.shape[1]
    _check_range(targets, V, ignore_index)
    logp, shift, log_sum = _empty_statistics(logits)
    backend = _backend(logits.device)
    for rows, chunk in _fp32_chunks(logits):
        backend.row_logprobs(chunk, targets[rows], ignore_index, 0, V, logp[rows], shift[rows], log_sum[rows])
    return logp, shift, log_sum


@_operator(lambda logits, *_: _empty_gradient(logits))
def _token_backward(
    logits: Tensor, targets: Tensor, logp: Tensor, shift: Tensor, log_sum: Tensor, upstream: Tensor, ignore_index: int
) -> Tensor:
    upstream = upstream.contiguous()  # (N,); sum() sends a stride of 0
    grad = _empty_gradient(logits)
    backend = _backend(logits.device)
    for rows, chunk in _fp32_chunks(logits):
        known = (s[rows] for s in (logp, shift, log_sum, upstream))
        out = grad[rows] if backend is not torch_rows else chunk
        backend.row_gradient(chunk, targets[rows], ignore_index, 0, *known, out)
        if out is chunk:
            grad[rows] = chunk
    return grad


def _fp32_chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, their logits): for torch_rows fp32 scratch copies, for Triton all rows as they are."""
    N, V = logits.shape
    if _backend(logits.device) is not torch_rows:
        yield slice(0, N), logits if logits.stride(1) == 1 else logits.contiguous()
        return
    step = max(1, min(N, scratch_rows(V)))
    scratch = torch.empty(step, V, dtype=torch.float32, device=logits.device)
    for rows in slices(N, step):
        yield rows, scratch[: rows.stop - rows.start].copy_(logits[rows])


# ---- from hidden states ----


class _FrozenHeadLogprobs(Function):
    """Differentiates hidden alone; forward already makes the gradient, but for the upstream factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        logp, _, _, d_hidden = _linear_forward(hidden, weight, targets, ignore_index, True)
        ctx.save_for_backward(d_hidden)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (d_hidden,) = ctx.saved_tensors
        grad = torch.empty_like(d_hidden, dtype=ctx.dtype)
        # Not `*`, which would return fp32 and need another pass to round; not in place, as backward may run again.
        return torch.mul(d_hidden, upstream.unsqueeze(1), out=grad), None, None, None


class _TrainedHeadLogprobs(Function):
    """Differentiates weight, and hidden if it asks for it; backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        logp, shift, log_sum, _ = _linear_forward(hidden, weight, targets, ignore_index, False)
        ctx.save_for_backward(hidden, weight, targets, logp, shift, log_sum)
        ctx.ignore_index = ignore_index
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        d_hidden, d_weight = _linear_backward(*ctx.saved_tensors, upstream, ctx.ignore_index, ctx.needs_input_grad[0])
        return d_hidden if ctx.needs_input_grad[0] else None, d_weight, None, None


@_operator(lambda hidden, *rest: (*_empty_statistics(hidden), _empty_gradient(hidden, rest[-1], torch.float32)))
def _linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, shift, log_sum), each (N,), and d logp_i / d h_i, (N, D), all fp32; that empty if it is not wanted."""
    V = len(weight)
    _check_range(targets, V, ignore_index)
    logp, shift, log_sum = _empty_statistics(hidden)
    d_hidden = _empty_gradient(hidden, with_gradient, torch.float32)  # fp32, so as to round only after the upstream
    backend = _backend(hidden.device)
    for tile in tiles(hidden, weight, with_gradient):
        r, first = tile.rows, tile.columns.start
        weighted = (tile.terms, d_hidden[r]) if with_gradient else ()
        backend.row_logprobs(tile.logits, targets[r], ignore_index, first, V, logp[r], shift[r], log_sum[r], *weighted)
        if with_gradient:
            add_product(d_hidden[r], tile.terms, tile.weight, fresh=first == 0)
    if with_gradient:
        backend.hidden_gradient(d_hidden, weight, targets, ignore_index, logp, log_sum)
    return logp, shift, log_sum, d_hidden


@_operator(lambda hidden, weight, *rest: (_empty_gradient(hidden, rest[-1]), _empty_gradient(weight)))
def _linear_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    upstream: Tensor,
    ignore_index: int,
    with_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_weight), d_hidden an empty tensor if it is not wanted."""
    upstream = upstream.contiguous()  # (N,)
    d_weight = _empty_gradient(weight).zero_()  # for N = 0
    d_hidden = _empty_gradient(hidden, with_hidden)
    hidden_sum = accumulator(d_hidden)
    backend = _backend(hidden.device)
    for tile in tiles(hidden, weight, True):
        r, c = tile.rows, tile.columns
        backend.row_gradient(
            tile.logits, targets[r], ignore_index, c.start, logp[r], shift[r], log_sum[r], upstream[r], tile.terms
        )
        if r.start == 0:
            weight_sum = accumulator(d_weight[c])
        add_product(weight_sum, tile.terms[:, : len(weight_sum)].t(), tile.hidden, fresh=r.start == 0)
        if with_hidden:
            add_product(hidden_sum[r], tile.terms, tile.weight, fresh=c.start == 0)
        if r.stop == len(hidden):
            round_into(d_weight[c], weight_sum)
    round_into(d_hidden, hidden_sum)
    return d_hidden, d_weight


def _empty_gradient(of: Tensor, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    return empty(of.shape if wanted else (0,), of, dtype or of.dtype)


def _empty_statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for logp, shift and log_sum, each (N,) fp32; triton_rows.py says what they are."""
    logp, shift, log_sum = (empty((len(rows),), rows, torch.float32) for _ in range(3))
    return logp, shift, log_sum


def _backend(device: torch.device) -> ModuleType:
    """The module whose functions work on this device."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from . import triton_rows  # not at the top: without triton, all else still works

        return triton_rows
    return torch_rows
