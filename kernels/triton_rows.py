"""Triton kernels on rows of logits: the log-probability of one token per row, and its gradient.

    logp = (z_y - shift) - log_sum        shift = max_v z_v        log_sum = log sum_v exp(z_v - shift)
    d logp / d z_v = [v = y] - p_v        p_v = exp((z_v - shift) - log_sum)

shift and log_sum are separate because their fp32 sum has an error of up to 6e-8 |shift|, which is visible in every p_v
once logits reach the thousands. The logits of a row may arrive in tiles of columns, one call per tile: the statistics
then cover the columns so far.

One program processes one row, without tl.dot, atomics or autotuning, so the same source also runs on a CPU under
TRITON_INTERPRET=1. If the terms exp(z_v - shift) are wanted, the row is one block, held in registers: it is read once,
and one exponential serves the sum and the term. Longer rows are read block by block: each lane has its own maximum and
sum, which are combined after the last block. The number of columns is a compile-time constant: it takes few values,
and knowing it saves registers. Loop bounds are written out each time because the interpreter turns an assigned number
into a tensor, which range() does not accept.

If rows have an odd number of 16-bit logits, most of them start at an address from which no thread can load 16 bytes at
once. A row is therefore read from the last 16-byte boundary before it, `lead` elements early; only blocks
that reach beyond the row are masked.

Legend: N rows, V vocabulary entries, D hidden width, C columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Rows

BLOCK = 4096  # columns per load of a long row: 16 per thread with 8 warps, so that many loads are in flight
WARPS = 8
ROW_PER_WARP = 1024  # columns of a row that is one block: 32 per thread
ALIGNED = tl.constexpr(8)  # 2-byte elements between two 16-byte boundaries
LOWEST = tl.constexpr(-3.4028234663852886e38)  # least fp32, the initial maximum: -inf would give -inf - -inf = nan
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _aligned(offset, SHIFTED: tl.constexpr):
    """The last 16-byte boundary up to `offset` and the distance to it in elements; (offset, 0) unless SHIFTED."""
    start = offset // ALIGNED * ALIGNED if SHIFTED else offset  # this form tells the compiler that it is a multiple
    return start, (offset - start).to(tl.int32)


@triton.jit
def _load(row, columns, start, lead, C: tl.constexpr, BLOCK: tl.constexpr):
    """The logits of a block of columns in fp32; -inf outside row[lead : lead + C], where exp(-inf) = 0.

    Blocks inside the row have no mask, whose odd bounds would split the loads. Their condition is `start >= lead` and
    not `start > 0`: Triton 3.6 takes the loop's first start, 0, for a constant, and would not vectorise that branch.
    """
    if (start >= lead) & (start + BLOCK <= C):
        z = tl.load(row + columns)
    else:
        z = tl.load(row + columns, mask=(columns >= lead) & (columns < lead + C), other=MINUS_INF)
    return z.to(tl.float32)


@triton.jit
def _row_statistics(row, lead, C: tl.constexpr, BLOCK: tl.constexpr):
    """max z and sum exp(z - max z) over row[lead : lead + C]. Source: online softmax, arXiv:1805.02867."""
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C + ALIGNED - 1, BLOCK):
        z = _load(row, start + tl.arange(0, BLOCK), start, lead, C, BLOCK)
        gap = z - peak
        ratio = tl.exp(-tl.abs(gap))  # exp(old peak - new peak) if z is the new peak, otherwise the term of z
        total = tl.where(gap > 0, total * ratio + 1.0, total + ratio)
        peak = tl.maximum(z, peak)
    shift = tl.max(peak, 0)
    return shift, tl.sum(total * tl.exp(peak - shift), 0)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Triton has no portable expm1)."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))  # relative truncation error 5e-8
    return tl.where(x > -0.125, series, 1.0 - tl.exp(x))


@triton.jit
def _write_zeros(out, C: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the gradient of an ignored row, whose logits are never read."""
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, tl.zeros((BLOCK,), out.dtype.element_ty), mask=columns < C)


@triton.jit
def _rescale(row, factor, D: tl.constexpr):
    """Multiplies the D numbers of a row by factor, in place."""
    for start in range(0, D, 1024):
        columns = start + tl.arange(0, 1024)
        value = tl.load(row + columns, mask=columns < D)
        tl.store(row + columns, value * factor, mask=columns < D)


@triton.jit
def _logprobs_kernel(
    logits, targets, logp_out, shift_out, log_sum_out, terms, weighted, logits_stride, terms_stride, first, V,
    ignore_index, C: tl.constexpr, D: tl.constexpr, WITH_TERMS: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i computes row_logprobs for row i of a tile."""
    i = tl.program_id(0).to(tl.int64)  # 64 bits: i * stride exceeds 2^31 from row 42731 of 50257 columns
    target = tl.load(targets + i)
    if target == ignore_index:
        tl.store(logp_out + i, 0.0)
        if WITH_TERMS:
            _write_zeros(terms + i * terms_stride, C, BLOCK)
    else:
        start, lead = _aligned(i * logits_stride, SHIFTED)
        row = logits + start
        here = (target >= first) & (target < first + C)
        before = tl.load(logp_out + i, mask=first > 0, other=float("nan"))  # stays nan if no tile has the target
        target_logit = tl.load(row + lead + (target - first), mask=here, other=0.0).to(tl.float32)
        target_logit = tl.where(here, target_logit, before)
        old_shift = tl.load(shift_out + i, mask=first > 0, other=LOWEST)
        old_total = tl.load(log_sum_out + i, mask=first > 0, other=0.0)
        if WITH_TERMS:  # A block holds the whole row: one load and one exponential per logit.
            lanes = tl.arange(0, BLOCK)
            z = tl.load(row + lanes, mask=lanes < C, other=MINUS_INF).to(tl.float32)
            new_shift = tl.maximum(tl.max(z, 0), old_shift)
            rescale = tl.exp(old_shift - new_shift)
            exponentials = tl.exp(z - new_shift)
            total = old_total * rescale + tl.sum(exponentials, 0)
            value = tl.where(lanes == target - first, 0.0, exponentials).to(terms.dtype.element_ty)
            tl.store(terms + i * terms_stride + lanes, value, mask=lanes < C)
            if (first > 0) & (rescale < 1.0):  # before the first product, weighted is uninitialised
                _rescale(weighted + i * D, rescale, D)
        else:
            peak, total = _row_statistics(row, lead, C, BLOCK)
            new_shift = tl.maximum(peak, old_shift)
            total = old_total * tl.exp(old_shift - new_shift) + total * tl.exp(peak - new_shift)
        tl.store(shift_out + i, new_shift)
        if first + C < V:
            tl.store(log_sum_out + i, total)
            tl.store(logp_out + i, target_logit)
        else:
            valid = (target >= 0) & (target < V)
            log_sum = tl.where(valid, tl.log(total), float("nan"))  # nan makes the row's gradient nan too
            tl.store(log_sum_out + i, log_sum)
            tl.store(logp_out + i, (target_logit - new_shift) - log_sum)


@triton.jit
def _gradient_kernel(
    logits, targets, logp, shift, log_sum, scale, grad, logits_stride, grad_stride, first, ignore_index,
    C: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i computes row_gradient for row i of a tile."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    if target == ignore_index:
        _write_zeros(grad + i * grad_stride, C, BLOCK)
    else:
        start, lead = _aligned(i * logits_stride, SHIFTED)
        out = grad + (start if SHIFTED else i * grad_stride)
        row_shift, row_log_sum, row_scale = tl.load(shift + i), tl.load(log_sum + i), tl.load(scale + i)
        at_target = row_scale * _one_minus_exp(tl.load(logp + i))
        for begin in range(0, C + ALIGNED - 1, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            z = _load(logits + start, columns, begin, lead, C, BLOCK)
            others = -row_scale * tl.exp((z - row_shift) - row_log_sum)
            value = tl.where(columns - lead == target - first, at_target, others).to(grad.dtype.element_ty)
            if (begin >= lead) & (begin + BLOCK <= C):
                tl.store(out + columns, value)
            else:
                tl.store(out + columns, value, mask=(columns >= lead) & (columns < lead + C))


@triton.jit
def _hidden_gradient_kernel(
    weighted, weight, targets, logp, log_sum, row_stride, column_stride, ignore_index, V,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i computes hidden_gradient for row i."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    if target == ignore_index:
        _write_zeros(weighted + i * D, D, BLOCK)
    else:
        token = tl.where((target >= 0) & (target < V), target, 0)  # out of range: log_sum is nan, and so is the row
        at_target = _one_minus_exp(tl.load(logp + i))
        scale = tl.exp(-tl.load(log_sum + i))
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < D
            w = tl.load(weight + token * row_stride + columns * column_stride, mask=inside)
            others = tl.load(weighted + i * D + columns, mask=inside)
            tl.store(weighted + i * D + columns, at_target * w.to(tl.float32) - scale * others, mask=inside)


def row_logprobs(
    logits: Tensor, rows: Rows, ignore_index: int, first: int, V: int, terms: Tensor | None = None,
    weighted: Tensor | None = None,
) -> None:  # fmt: skip
    """Updates the statistics of the rows by one tile of logits; the tiles must come from left to right.

    After the last tile they are as defined in the docstring of this file. Before that, logp is the target's logit, if
    its tile has come, and log_sum is the sum without its logarithm. Ignored rows get logp 0, and their shift and
    log_sum are meaningless; a target out of range gives nan.

    Args:
        logits: (N, C), the columns from `first` to `first` + C of V; any float dtype, column stride 1.
        rows: N contiguous rows; the statistics are read if first > 0.
        terms: (N, C), any float dtype, column stride 1, may be logits itself. Overwritten by exp(z_v - shift), and by
            0 in the target's column and in ignored rows. Its product with the rows of the weight is the tile's share
            of sum_{v != target} exp(z_v - shift) W_v.
        weighted: (N, D) fp32, contiguous: the sum of the products over earlier tiles, if there is one; rescaled to the
            new shift.
    """
    N, C = logits.shape
    if not N:
        return  # CUDA rejects an empty grid
    block, warps = BLOCK, WARPS
    if terms is not None:
        block = max(ROW_PER_WARP, triton.next_power_of_2(C))
        warps = block // ROW_PER_WARP
    out = logits if terms is None else terms  # placeholders, this one and the next, which the kernel does not touch
    into, D = (rows.logp, 0) if weighted is None else (weighted, weighted.shape[1])
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _logprobs_kernel[(N,)](
            logits, *rows, out, into, logits.stride(0), out.stride(0), first, V, ignore_index,
            C=C, D=D, WITH_TERMS=terms is not None, SHIFTED=terms is None and logits.stride(0) % 8 != 0,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip


def row_gradient(logits: Tensor, rows: Rows, ignore_index: int, first: int, scale: Tensor, grad: Tensor) -> None:
    """Writes scale * ([v = target] - p_v) to grad. Arguments as in row_logprobs.

    Args:
        scale: (N,) fp32, contiguous: the gradient with respect to logp.
        grad: (N, C), any float dtype, column stride 1, may be logits itself.
    """
    N, C = logits.shape
    if not N:
        return
    with torch.cuda.device_of(logits):
        _gradient_kernel[(N,)](
            logits, *rows, scale, grad, logits.stride(0), grad.stride(0), first, ignore_index,
            C=C, SHIFTED=logits.stride(0) % 8 != 0 and logits.stride(0) == grad.stride(0),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def hidden_gradient(weighted: Tensor, weight: Tensor, rows: Rows, ignore_index: int) -> None:
    """Overwrites weighted by d logp / d h = (1 - p_y) W[y] - sum_{v != y} p_v W_v, and by 0 in ignored rows.

    Args:
        weighted: (N, D) fp32, contiguous: sum_{v != y} exp(z_v - shift) W_v.
        weight: (V, D), any float dtype and strides.
        rows, ignore_index: as in row_logprobs.
    """
    if not len(weighted):
        return
    V, D = weight.shape
    with torch.cuda.device_of(weighted):
        _hidden_gradient_kernel[(len(weighted),)](
            weighted, weight, rows.targets, rows.logp, rows.log_sum, *weight.stride(), ignore_index, V,
            D=D, BLOCK=min(BLOCK, triton.next_power_of_2(D)), num_warps=4,
        )  # fmt: skip
