"""Log-probabilities of given tokens, from logits or directly from hidden states: differentiable, in little memory.

    logp_i = z_i[y_i] - log sum_v exp(z_iv)         z_i = W h_i
    d logp_i / d z_iv = [v = y_i] - p_iv            p_iv = exp(z_iv) / sum_u exp(z_iu)
    d logp_i / d h_i  = (1 - p_i[y_i]) W[y_i] - sum_{v != y_i} p_iv W_v

linear_logprobs never holds the N x V logits. It computes one tile of them at a time, some rows by some columns, in a
buffer that all tiles share. The upstream gradient is one number per row and only scales d logp_i / d h_i. With a
frozen W (LoRA, a tied head) the forward pass therefore also computes this N x D gradient, while a tile's logits are
available, and the backward pass is a single elementwise product: two matrix products in total. Recomputing the
logits would take three. The sum over v is accumulated tile by tile, as attention accumulates its values, here the rows
of W: each is weighted by exp(z_v - shift), and the sum is scaled down whenever a tile raises the shift. With a trained
W the backward pass does recompute the logits: four products, or three if the forward pass may keep all exp(z_v - shift)
in 16 bits. If no gradient is wanted, there is one product and nothing is saved.

triton_rows.py processes the tiles on CUDA, torch_rows.py on other devices. With TRITON_INTERPRET=1 in the environment,
CPU tensors go through the Triton kernels too: this is slow, but tests the kernels without a GPU.

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
from .tiles import Rows, add_product, scratch_rows, slices, tiles

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KEPT_BYTES = 2**30  # A trained head in bfloat16 keeps N x V numbers for the backward pass if they take at most this.


def token_logprobs(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probability of each row's target, log softmax(logits)[target], without an fp32 copy of the logits.

    Args:
        logits: (N, V), float16, bfloat16 or float32, any strides. The arithmetic is fp32 for every dtype.
        targets: (N,), any integer dtype.
        ignore_index: rows with this target return 0 and get a zero gradient, whatever their upstream gradient is.

    Returns:
        (N,) fp32, in nats. Differentiable once with respect to logits; saves logits and three numbers per row.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: shapes or devices do not match, or a target is neither ignore_index nor in [0, V). On CUDA a target
            out of range gives nan as value and gradient instead: an error would have to wait for the GPU.
    """
    if torch.compiler.is_compiling():  # It breaks its graph here: tracing would unroll the loops over tiles.
        return torch.compiler.disable(token_logprobs)(logits, targets, ignore_index)
    targets = _checked("logits", logits, targets)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TokenLogprobs.apply(logits, targets, ignore_index)
    return _token_forward(logits, targets, ignore_index).logp


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """token_logprobs(hidden @ weight.T, targets) with fp32 logits, of which only one tile exists at a time.

    Pass only the rows you need: an ignored row costs as much as any other. With a frozen weight and a hidden that
    requires grad, the forward pass does the work of the backward pass. If no gradient is wanted, call this under
    torch.no_grad().

    Args:
        hidden: (N, D), float16, bfloat16 or float32, any strides.
        weight: (V, D), same dtype as hidden, any strides. Inside torch.autocast both are first cast to its dtype.
        targets, ignore_index: as in token_logprobs.

    Returns:
        (N,) fp32, in nats. Differentiable once with respect to hidden and weight. Saves N x D fp32 numbers and N bools
        if the weight is frozen; the inputs if it is trained and, in bfloat16, up to KEPT_BYTES more.

    Raises:
        TypeError: a dtype is none of the above, or hidden and weight differ in dtype outside of autocast.
        ValueError: as in token_logprobs.

    Source: gradients in the forward pass as in Liger Kernel, arXiv:2410.10989; the running sum over tiles as in
    FlashAttention, arXiv:2205.14135.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(linear_logprobs)(hidden, weight, targets, ignore_index)
    targets = _checked("hidden", hidden, targets)
    if weight.shape[1:] != hidden.shape[1:] or weight.device != hidden.device:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} on {hidden.device} fits no weight {tuple(weight.shape)} on {weight.device}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)  # cast here, so that autograd casts the gradients back
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or use torch.autocast")
    if torch.is_grad_enabled() and weight.requires_grad:
        return _TrainedHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLogprobs.apply(hidden, weight, targets, ignore_index)
    return _linear_forward(hidden, weight, targets, ignore_index, False)[0].logp


def _checked(name: str, rows: Tensor, targets: Tensor) -> Tensor:
    """The targets as contiguous int64. Checks them and `rows`, which the caller knows as `name`."""
    if rows.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(rows.shape)}")
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {rows.dtype}")
    if targets.dtype not in INTEGERS:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    if targets.shape != rows.shape[:1] or targets.device != rows.device:
        raise ValueError(
            f"targets must have shape ({len(rows)},) on {rows.device}, got {tuple(targets.shape)} on {targets.device}"
        )
    return targets.to(torch.int64).contiguous()


def _check_range(targets: Tensor, V: int, ignore_index: int) -> None:
    """Raises ValueError naming the first target out of range, except on CUDA, where it would wait for the GPU."""
    if targets.is_cuda:
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{i}] = {targets[i]} is not in [0, V) with V = {V}, nor ignored ({ignore_index})")


def _backend(device: torch.device) -> ModuleType:
    """The module whose functions process the tiles on this device."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from . import triton_rows  # imported here, so that everything else works without triton

        return triton_rows
    return torch_rows


# ---- from logits ----


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        rows = _token_forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, *rows)
        ctx.ignore_index = ignore_index
        return rows.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        logits, *statistics = ctx.saved_tensors
        rows, backend = Rows(*statistics), _backend(logits.device)
        upstream = upstream.contiguous()  # (N,); the gradient of sum() has stride 0
        grad = logits.new_empty(logits.shape)
        for r, chunk in _chunks(logits):
            backend.row_gradient(chunk, rows.part(r), ctx.ignore_index, 0, upstream[r], grad[r])
        return grad, None, None


def _token_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> Rows:
    V = logits.shape[1]
    _check_range(targets, V, ignore_index)
    rows, backend = Rows.empty(targets), _backend(logits.device)
    for r, chunk in _chunks(logits):
        backend.row_logprobs(chunk, rows.part(r), ignore_index, 0, V)
    return rows


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their logits): fp32 scratch copies of some rows for torch_rows, all rows at once for Triton."""
    N, V = logits.shape
    if _backend(logits.device) is not torch_rows:
        yield slice(0, N), logits if logits.stride(1) == 1 else logits.contiguous()
        return
    step = scratch_rows(V)
    scratch = logits.new_empty(min(N, step), V, dtype=torch.float32)
    for rows in slices(N, step):
        yield rows, scratch[: rows.stop - rows.start].copy_(logits[rows])


# ---- from hidden states ----


class _FrozenHeadLogprobs(Function):
    """Differentiates hidden only. The forward pass computes the gradient, except for the upstream factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        rows, d_hidden = _linear_forward(hidden, weight, targets, ignore_index, True)
        ctx.save_for_backward(d_hidden, targets == ignore_index)
        ctx.dtype = hidden.dtype
        return rows.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        d_hidden, ignored = ctx.saved_tensors
        upstream = upstream.masked_fill(ignored, 0.0)  # it may be inf or nan: 0 * nan is nan
        grad = torch.empty_like(d_hidden, dtype=ctx.dtype)
        # `*` would return fp32 and need another pass to round it. Not in place, since backward may run again.
        torch.mul(d_hidden, upstream.unsqueeze(1), out=grad)
        return grad, None, None, None


class _TrainedHeadLogprobs(Function):
    """Differentiates weight, and hidden if it requires grad. The backward pass computes the logits again, unless the
    forward pass has kept what it needs of them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        keeps = hidden.dtype == torch.bfloat16 and 2 * len(hidden) * len(weight) <= KEPT_BYTES
        kept: list[Tensor] | None = [] if keeps else None
        rows, _ = _linear_forward(hidden, weight, targets, ignore_index, False, kept)
        ctx.save_for_backward(hidden, weight, *rows, *(kept or ()))
        ctx.ignore_index = ignore_index
        return rows.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        hidden, weight, *rest = ctx.saved_tensors
        rows, kept, backend = Rows(*rest[:4]), rest[4:], _backend(hidden.device)
        upstream = upstream.contiguous()  # (N,)
        d_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_weight = weight.new_zeros(weight.shape)  # zeros for N = 0, where there is no tile
        in_fp32 = d_weight.dtype == torch.float32  # if so, the sums need no buffer of their own
        for n, tile in enumerate(tiles(hidden, weight, True, with_logits=not kept)):
            r, c = tile.rows, tile.columns
            facts = rows.part(r), ctx.ignore_index, c.start, upstream[r], tile.terms
            if kept:
                torch_rows.kept_gradient(*kept[2 * n : 2 * n + 2], *facts)
            else:
                backend.row_gradient(tile.logits, *facts)
            if r.start == 0:
                weight_sum = d_weight[c] if in_fp32 else torch.empty_like(d_weight[c], dtype=torch.float32)
            add_product(weight_sum, tile.terms.t(), tile.hidden, fresh=r.start == 0)
            if d_hidden is not None:
                add_product(d_hidden[r], tile.terms, tile.weight, fresh=c.start == 0)
            if r.stop == len(hidden) and not in_fp32:
                d_weight[c] = weight_sum
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None


def _linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool,
    kept: list[Tensor] | None = None,
) -> tuple[Rows, Tensor | None]:  # fmt: skip
    """The statistics of the rows, and d logp_i / d h_i, (N, D) fp32, if wanted.

    `kept`, if given, gets two tensors per tile: its terms (R, C) in bfloat16, and the shift of its rows at that time.
    """
    V = len(weight)
    _check_range(targets, V, ignore_index)
    rows, backend = Rows.empty(targets), _backend(hidden.device)
    # The gradient is fp32, since it is rounded after the upstream factor.
    d_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if with_gradient else None
    for tile in tiles(hidden, weight, with_gradient or kept is not None):
        part, first = rows.part(tile.rows), tile.columns.start
        terms = tile.terms if kept is None else torch.empty_like(tile.logits, dtype=torch.bfloat16)
        weighted = d_hidden[tile.rows] if with_gradient else None
        backend.row_logprobs(tile.logits, part, ignore_index, first, V, terms, weighted)
        if with_gradient:
            add_product(weighted, terms, tile.weight, fresh=first == 0)
        if kept is not None:
            kept += terms, part.shift.clone()
    if with_gradient:
        backend.hidden_gradient(d_hidden, weight, rows, ignore_index)
    return rows, d_hidden
