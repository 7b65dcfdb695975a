"""Triton kernels on rows of logits: the log-probability of one token a row, and its gradient in the row.

    logp = (z_y - shift) - log_sum        shift = max_v z_v        log_sum = log sum_v exp(z_v - shift)
    d logp / d z_v = [v = y] - p_v        p_v = exp((z_v - shift) - log_sum)

shift and log_sum are kept apart because their fp32 sum is off by up to 6e-8 |shift|, which shows in every p_v once
logits reach the thousands.

One program works on one row, without tl.dot, atomics or autotuning, so the same source runs on a CPU too, under
TRITON_INTERPRET=1. Each lane keeps a maximum and a sum of its own; the lanes meet once, after the last block. V is a
compile-time constant: a model has one vocabulary, and knowing it saves registers. V - V % BLOCK, the columns in whole
blocks, is spelled out each time because the interpreter makes a tensor of an assigned number, unfit for range().

Legend: N rows, V vocabulary entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns read at a time: with 8 warps 16 a thread, many loads in flight and no register spilled
WARPS = 8
LOWEST = tl.constexpr(-3.4028234663852886e38)  # least fp32: where a maximum starts. -inf would make -inf - -inf = nan


@triton.jit
def _accumulate(z, peak, total):
    """Take one block of logits into each lane's peak and total = sum exp(z - peak), at one exponential a logit."""
    gap = z - peak
    ratio = tl.exp(-tl.abs(gap))  # of old to new peak if z is the new one, else z's own term
    total = tl.where(gap > 0, total * ratio + 1.0, total + ratio)
    return tl.maximum(z, peak), total


@triton.jit
def _row_statistics(row, V: tl.constexpr, BLOCK: tl.constexpr):
    """(shift, log_sum) of the V logits at `row`. Source: online softmax, arXiv:1805.02867."""
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V - V % BLOCK, BLOCK):  # no mask here: it would split the loads where V is odd
        peak, total = _accumulate(tl.load(row + start + lanes).to(tl.float32), peak, total)
    columns = V - V % BLOCK + lanes
    tail = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)  # exp(-inf) adds nothing
    peak, total = _accumulate(tail, peak, total)
    shift = tl.max(peak, 0)
    return shift, tl.log(tl.sum(total * tl.exp(peak - shift), 0))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Triton has no portable expm1)."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))  # cut off at 5e-8 of the value
    return tl.where(x > -0.125, series, 1.0 - tl.exp(x))


@triton.jit
def _gradient_block(z, columns, target, target_value, shift, log_sum, scale):
    """scale * ([v = target] - p_v) for a block of columns v."""
    return scale * tl.where(columns == target, target_value, -tl.exp((z - shift) - log_sum))


@triton.jit
def _write_gradient(row, grad_row, target, logp, shift, log_sum, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Write scale * d logp / d z over the V columns. grad_row may be row: a block is read before it is written."""
    lanes = tl.arange(0, BLOCK)
    target_value = _one_minus_exp(logp)
    out_type = grad_row.dtype.element_ty
    for start in range(0, V - V % BLOCK, BLOCK):
        columns = start + lanes
        z = tl.load(row + columns).to(tl.float32)
        value = _gradient_block(z, columns, target, target_value, shift, log_sum, scale)
        tl.store(grad_row + columns, value.to(out_type))
    columns = V - V % BLOCK + lanes
    z = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    value = _gradient_block(z, columns, target, target_value, shift, log_sum, scale)
    tl.store(grad_row + columns, value.to(out_type), mask=columns < V)


@triton.jit
def _write_zeros(grad_row, V: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of an ignored row, whose logits are never read."""
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(grad_row + columns, tl.zeros((BLOCK,), grad_row.dtype.element_ty), mask=columns < V)


@triton.jit
def _logprobs_kernel(
    logits,
    targets,
    logp_out,
    shift_out,
    log_sum_out,
    grad,
    row_stride,
    grad_stride,
    ignore_index,
    V: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: logp, shift and log_sum of row i and, WITH_GRADIENT, [v = target] - p_v into row i of grad."""
    i = tl.program_id(0).to(tl.int64)  # i * row_stride passes 2^31 from row 42731 of 50257 columns on
    target = tl.load(targets + i)
    row = logits + i * row_stride
    grad_row = grad + i * grad_stride
    if target == ignore_index:
        tl.store(logp_out + i, 0.0)
        if WITH_GRADIENT:
            _write_zeros(grad_row, V, BLOCK)
    else:
        valid = (target >= 0) & (target < V)
        target_logit = tl.load(row + target, mask=valid, other=0.0).to(tl.float32)
        shift, log_sum = _row_statistics(row, V, BLOCK)
        log_sum = tl.where(valid, log_sum, float("nan"))  # makes logp nan, and the gradient in either kernel
        logp = (target_logit - shift) - log_sum
        tl.store(logp_out + i, logp)
        tl.store(shift_out + i, shift)
        tl.store(log_sum_out + i, log_sum)
        if WITH_GRADIENT:
            _write_gradient(row, grad_row, target, logp, shift, log_sum, 1.0, V, BLOCK)


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    logp,
    shift,
    log_sum,
    scale,
    grad,
    row_stride,
    grad_stride,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: scale_i * ([v = target] - p_v) into row i of grad, from what _logprobs_kernel stored."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    row = logits + i * row_stride
    grad_row = grad + i * grad_stride
    if target == ignore_index:
        _write_zeros(grad_row, V, BLOCK)
    else:
        row_scale = tl.load(scale + i)
        row_logp, row_shift, row_log_sum = tl.load(logp + i), tl.load(shift + i), tl.load(log_sum + i)
        _write_gradient(row, grad_row, target, row_logp, row_shift, row_log_sum, row_scale, V, BLOCK)


def row_logprobs(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    grad: Tensor | None = None,
) -> None:
    """Fill logp, shift and log_sum and, if given, grad = [v = target] - p_v.

    Ignored rows get logp 0 and a zero gradient, their shift and log_sum stay unset. Targets out of range give nan.

    Args:
        logits: (N, V), any float dtype and strides; copied if the column stride is not 1.
        targets: (N,) int64, contiguous.
        logp, shift, log_sum: (N,) fp32, contiguous.
        grad: (N, V), any float dtype, column stride 1; may be logits itself.
    """
    if not len(targets):
        return  # CUDA refuses an empty grid
    logits = _with_unit_columns(logits)
    out = logits if grad is None else grad  # the kernel takes a pointer even if it writes nothing there
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _logprobs_kernel[(len(targets),)](
            logits,
            targets,
            logp,
            shift,
            log_sum,
            out,
            logits.stride(0),
            out.stride(0),
            ignore_index,
            V=logits.shape[1],
            WITH_GRADIENT=grad is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    scale: Tensor,
    grad: Tensor,
) -> None:
    """Fill grad = scale * ([v = target] - p_v) from row_logprobs's logp, shift and log_sum; arguments as there.

    scale is the gradient arriving at logp, (N,) fp32, contiguous.
    """
    if not len(targets):
        return
    logits = _with_unit_columns(logits)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(targets),)](
            logits,
            targets,
            logp,
            shift,
            log_sum,
            scale,
            grad,
            logits.stride(0),
            grad.stride(0),
            ignore_index,
            V=logits.shape[1],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _with_unit_columns(logits: Tensor) -> Tensor:
    """Logits whose neighbouring columns are neighbours in memory: the kernels load whole blocks."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
