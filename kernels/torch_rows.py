"""The functions of triton_rows.py in plain torch, for a CPU and for machines without triton.

One difference: here `logits` is fp32 scratch, worked on in place and left overwritten; `grad` may be `logits` itself.

Legend: N rows, V vocabulary entries.
"""

import torch
from torch import Tensor


def row_logprobs(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    logp: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    grad: Tensor | None = None,
) -> None:
    """Fill logp, shift and log_sum, (N,) fp32, and, if given, grad (N, V) = [v = target] - p_v. See triton_rows.py."""
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(1)  # (N, 1)
    target_logit = logits.gather(1, index).squeeze(1)
    torch.amax(logits, 1, out=shift)
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()  # (N, V)
    torch.sum(exponentials, 1, out=log_sum).log_()
    torch.sub(target_logit - shift, log_sum, out=logp).masked_fill_(ignored, 0.0)
    if grad is not None:
        _write_gradient(exponentials, index, ignored, logp, log_sum, torch.ones_like(logp), grad)


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
    """Fill grad = scale * ([v = target] - p_v) from row_logprobs's logp, shift and log_sum; scale is (N,) fp32."""
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0).unsqueeze(1)
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()
    _write_gradient(exponentials, index, ignored, logp, log_sum, scale, grad)


def _write_gradient(
    exponentials: Tensor, index: Tensor, ignored: Tensor, logp: Tensor, log_sum: Tensor, scale: Tensor, grad: Tensor
) -> None:
    """grad = scale * ([v = index] - p_v), p_v being exponentials / sum exponentials; zero in ignored rows."""
    rows = exponentials.mul_((-scale * torch.exp(-log_sum)).unsqueeze(1))
    rows.scatter_(1, index, (-scale * torch.expm1(logp)).unsqueeze(1))  # 1 - p, also where p rounds to 1
    rows[ignored] = 0.0  # not by a factor, since 0 * nan is nan
    if grad is not rows:
        grad.copy_(rows)  # rounds to grad's dtype
