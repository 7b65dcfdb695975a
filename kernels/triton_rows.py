"""Triton kernels on rows of logits: the log-probability of one token a row, and its gradient.

    logp = (z_y - shift) - log_sum        shift = max_v z_v        log_sum = log sum_v exp(z_v - shift)
    d logp / d z_v = [v = y] - p_v        p_v = exp((z_v - shift) - log_sum)

shift and log_sum are kept apart because their fp32 sum is off by up to 6e-8 |shift|, which shows in every p_v once
logits reach the thousands. The logits of a row may come in tiles of columns, one call each: the statistics then are
those of the columns so far.

One program works on one row, without tl.dot, atomics or autotuning, so the same source runs on a CPU too, under
TRITON_INTERPRET=1. Each lane keeps a maximum and a sum of its own; the lanes meet once, after the last block. The
number of columns is a compile-time constant: there are few of them, and knowing it saves registers. Bounds of loops
are spelled out each time because the interpreter makes a tensor of an assigned number, unfit for range().

Rows of an odd number of 16-bit logits begin where no thread may load 16 bytes at once. So a row is read from the last
16-byte boundary before it, `lead` elements early; only its first and last block are masked.

Legend: N rows, V vocabulary entries, D hidden width, C columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns read at a time: with 8 warps 16 a thread, many loads in flight and no register spilled
WARPS = 8
ALIGNED = tl.constexpr(8)  # elements from one 16-byte boundary to the next, if they have 2 bytes
LOWEST = tl.constexpr(-3.4028234663852886e38)  # least fp32: where a maximum starts. -inf would make -inf - -inf = nan
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _aligned(offset, SHIFTED: tl.constexpr):
    """(the last 16-byte boundary up to `offset`, how many elements that lies back); as it is where rows are aligned."""
    start = offset // ALIGNED * ALIGNED if SHIFTED else offset  # so written, the compiler knows it is a multiple
    return start, (offset - start).to(tl.int32)


@triton.jit
def _accumulate(z, peak, total):
    """Take one block of logits into each lane's peak and total = sum exp(z - peak), at one exponential a logit."""
    gap = z - peak
    ratio = tl.exp(-tl.abs(gap))  # of old to new peak if z is the new one, else z's own term
    total = tl.where(gap > 0, total * ratio + 1.0, total + ratio)
    return tl.maximum(z, peak), total


@triton.jit
def _row_statistics(row, lead, C: tl.constexpr, BLOCK: tl.constexpr):
    """(max z, sum exp(z - max z)) over row[lead : lead + C]. Source: online softmax, arXiv:1805.02867."""
    lanes = tl.arange(0, BLOCK)
    inside = lanes >= lead if C >= BLOCK else (lanes >= lead) & (lanes < lead + C)  # an odd bound splits the loads
    z = tl.load(row + lanes, mask=inside, other=MINUS_INF).to(tl.float32)  # exp(-inf) adds nothing
    peak = tl.maximum(z, LOWEST)
    total = tl.exp(z - peak)
    for start in range(BLOCK, C - C % BLOCK, BLOCK):  # wholly inside
        peak, total = _accumulate(tl.load(row + start + lanes).to(tl.float32), peak, total)
    for start in range(max(BLOCK, C - C % BLOCK), C + ALIGNED - 1, BLOCK):  # once; seldom never or twice
        z = tl.load(row + start + lanes, mask=start + lanes < lead + C, other=MINUS_INF).to(tl.float32)
        peak, total = _accumulate(z, peak, total)
    shift = tl.max(peak, 0)
    return shift, tl.sum(total * tl.exp(peak - shift), 0)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Triton has no portable expm1)."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))  # cut off at 5e-8 of the value
    return tl.where(x > -0.125, series, 1.0 - tl.exp(x))


@triton.jit
def _terms(z, columns, target, at_target, shift, log_sum, scale, dtype: tl.constexpr):
    return (scale * tl.where(columns == target, at_target, tl.exp((z - shift) - log_sum))).to(dtype)


@triton.jit
def _write_terms(
    row, out, lead, target, at_target, shift, log_sum, scale, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """out = scale * (at_target if v = target, else exp((z - shift) - log_sum)), then zeros up to WIDTH columns.

    out may be row: a block is read before it is written.
    """
    lanes = tl.arange(0, BLOCK)
    target += lead
    inside = lanes >= lead if C >= BLOCK else (lanes >= lead) & (lanes < lead + C)
    z = tl.load(row + lanes, mask=inside, other=MINUS_INF).to(tl.float32)
    value = _terms(z, lanes, target, at_target, shift, log_sum, scale, out.dtype.element_ty)
    tl.store(out + lanes, value, mask=lanes >= lead if C >= BLOCK else (lanes >= lead) & (lanes < lead + WIDTH))
    for start in range(BLOCK, C - C % BLOCK, BLOCK):
        z = tl.load(row + start + lanes).to(tl.float32)
        value = _terms(z, start + lanes, target, at_target, shift, log_sum, scale, out.dtype.element_ty)
        tl.store(out + start + lanes, value)
    for start in range(max(BLOCK, C - C % BLOCK), WIDTH + ALIGNED - 1, BLOCK):
        z = tl.load(row + start + lanes, mask=start + lanes < lead + C, other=MINUS_INF).to(tl.float32)
        value = _terms(z, start + lanes, target, at_target, shift, log_sum, scale, out.dtype.element_ty)
        tl.store(out + start + lanes, value, mask=start + lanes < lead + WIDTH)


@triton.jit
def _write_zeros(out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of an ignored row, whose logits are never read."""
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, tl.zeros((BLOCK,), out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _rescale(row, factor, D: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(row + columns, mask=columns < D)
        tl.store(row + columns, value * factor, mask=columns < D)


@triton.jit
def _logprobs_kernel(
    logits, targets, logp_out, shift_out, log_sum_out, terms, weighted, logits_stride, terms_stride, first, V,
    ignore_index, C: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, WITH_TERMS: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: row_logprobs for row i of a tile."""
    i = tl.program_id(0).to(tl.int64)  # i * stride passes 2^31 from row 42731 of 50257 columns on
    target = tl.load(targets + i)
    if target == ignore_index:
        tl.store(logp_out + i, 0.0)
        if WITH_TERMS:
            _write_zeros(terms + i * terms_stride, WIDTH, BLOCK)
    else:
        start, lead = _aligned(i * logits_stride, SHIFTED)
        row = logits + start
        here = (target >= first) & (target < first + C)
        before = tl.load(logp_out + i, mask=first > 0, other=float("nan"))  # nan unless a tile has the target
        target_logit = tl.load(row + lead + (target - first), mask=here, other=0.0).to(tl.float32)
        target_logit = tl.where(here, target_logit, before)
        old_shift = tl.load(shift_out + i, mask=first > 0, other=LOWEST)
        old_total = tl.load(log_sum_out + i, mask=first > 0, other=0.0)
        shift, total = _row_statistics(row, lead, C, BLOCK)
        new_shift = tl.maximum(shift, old_shift)
        rescale = tl.exp(old_shift - new_shift)
        total = old_total * rescale + total * tl.exp(shift - new_shift)
        tl.store(shift_out + i, new_shift)
        if first + C < V:
            tl.store(log_sum_out + i, total)
            tl.store(logp_out + i, target_logit)
        else:
            valid = (target >= 0) & (target < V)
            log_sum = tl.where(valid, tl.log(total), float("nan"))  # makes every gradient of the row nan
            tl.store(log_sum_out + i, log_sum)
            tl.store(logp_out + i, (target_logit - new_shift) - log_sum)
        if WITH_TERMS:
            _write_terms(
                row, terms + i * terms_stride, lead, target - first, 0.0, new_shift, 0.0, 1.0, C, WIDTH, BLOCK
            )  # fmt: skip
            if (first > 0) & (rescale < 1.0):  # before the first product there is nothing to scale
                _rescale(weighted + i * D, rescale, D, BLOCK)


@triton.jit
def _gradient_kernel(
    logits, targets, logp, shift, log_sum, scale, grad, logits_stride, grad_stride, first, ignore_index,
    C: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: row_gradient for row i of a tile."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    if target == ignore_index:
        _write_zeros(grad + i * grad_stride, WIDTH, BLOCK)
    else:
        start, lead = _aligned(i * logits_stride, SHIFTED)
        row = logits + start
        out = grad + (start if SHIFTED else i * grad_stride)
        row_shift, row_log_sum, row_scale = tl.load(shift + i), tl.load(log_sum + i), tl.load(scale + i)
        at_target = -_one_minus_exp(tl.load(logp + i))
        _write_terms(
            row, out, lead, target - first, at_target, row_shift, row_log_sum, -row_scale, C, WIDTH, BLOCK
        )  # fmt: skip


@triton.jit
def _hidden_gradient_kernel(
    weighted, weight, targets, logp, log_sum, row_stride, column_stride, ignore_index, V,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: hidden_gradient for row i."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    if target == ignore_index:
        _write_zeros(weighted + i * D, D, BLOCK)
    else:
        token = tl.where((target >= 0) & (target < V), target, 0)  # out of range: log_sum is nan, the row too
        at_target = _one_minus_exp(tl.load(logp + i))
        scale = tl.exp(-tl.load(log_sum + i))
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < D
            w = tl.load(weight + token * row_stride + columns * column_stride, mask=inside)
            others = tl.load(weighted + i * D + columns, mask=inside)
            tl.store(weighted + i * D + columns, at_target * w.to(tl.float32) - scale * others, mask=inside)


def row_logprobs(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    first: int,
    V: int,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    terms: Tensor | None = None,
    weighted: Tensor | None = None,
) -> None:
    """Take one tile of logits into logp, shift and log_sum; tiles come from left to right.

    After the last tile these are what the docstring of this file says; before it logp holds the target's logit, if it
    has come, and log_sum the sum itself. Ignored rows get logp 0, their shift and log_sum are meaningless; a target
    out of range gives nan.

    Args:
        logits: (N, C), columns `first` to `first` + C of V; any float dtype, column stride 1.
        targets: (N,) int64, contiguous.
        logp, shift, log_sum: (N,) fp32, contiguous; read where first > 0.
        terms: (N, at least C), any float dtype, column stride 1, may be logits itself: is given exp(z_v - shift), but
            0 for the target, in ignored rows and beyond column C. Times the weight's rows that is the tile's share of
            sum_v exp(z_v - shift) W_v, v != target.
        weighted: (N, D) fp32, contiguous, given if terms is: the shares of earlier tiles, scaled here to the new shift.
    """
    if not len(targets):
        return  # CUDA refuses an empty grid
    out, into, D = (
        (terms, weighted, weighted.shape[1]) if terms is not None else (logits, logp, 1)
    )  # else never touched
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _logprobs_kernel[(len(targets),)](
            logits, targets, logp, shift, log_sum, out, into, logits.stride(0), out.stride(0), first, V, ignore_index,
            C=logits.shape[1], WIDTH=out.shape[1], D=D, WITH_TERMS=terms is not None,
            SHIFTED=terms is None and logits.stride(0) % 8 != 0, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    first: int,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    scale: Tensor,
    grad: Tensor,
) -> None:
    """Fill grad, of at least C columns, with scale * ([v = target] - p_v) and zeros; arguments as in row_logprobs.

    scale is the gradient arriving at logp, (N,) fp32, contiguous.
    """
    if not len(targets):
        return
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(targets),)](
            logits, targets, logp, shift, log_sum, scale, grad, logits.stride(0), grad.stride(0), first, ignore_index,
            C=logits.shape[1], WIDTH=grad.shape[1],
            SHIFTED=logits.stride(0) % 8 != 0 and logits.stride(0) == grad.stride(0), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def hidden_gradient(
    weighted: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, logp: Tensor, log_sum: Tensor
) -> None:
    """Turn weighted into d logp / d h = (1 - p_y) W[y] - sum_v p_v W_v, v != y; zero in ignored rows.

    Args:
        weighted: (N, D) fp32, contiguous: sum_v exp(z_v - shift) W_v, v != y.
        weight: (V, D), any float dtype and strides. The rest as in row_logprobs.
    """
    if not len(targets):
        return
    V, D = weight.shape
    with torch.cuda.device_of(weighted):
        _hidden_gradient_kernel[(len(targets),)](
            weighted, weight, targets, logp, log_sum, *weight.stride(), ignore_index, V,
            D=D, BLOCK=min(BLOCK, triton.next_power_of_2(D)), num_warps=4,
        )  # fmt: skip
