"""The functions of triton_rows.py in plain torch, for CPUs and for machines without triton.

One thing is different: `logits` is an fp32 scratch tensor, in which these functions work and which they overwrite.

Legend: N rows, V vocabulary entries, D hidden width, C columns of a tile.
"""

import torch
from torch import Tensor

from .tiles import Rows


def row_logprobs(
    logits: Tensor, rows: Rows, ignore_index: int, first: int, V: int, terms: Tensor | None = None,
    weighted: Tensor | None = None,
) -> None:  # fmt: skip
    """Updates the statistics of the rows by one tile; overwrites logits by terms. See triton_rows.py."""
    targets, logp, shift, log_sum = rows
    C = logits.shape[1]
    if first == 0:
        logp.fill_(float("nan"))
        shift.fill_(torch.finfo(torch.float32).min)  # -inf would give nan: -inf - -inf is nan
        log_sum.zero_()
    here, column = _locate(targets, first, C)
    logp.copy_(torch.where(here, logits.gather(1, column).squeeze(1), logp))
    new_shift = torch.maximum(shift, logits.amax(1))
    rescale = (shift - new_shift).exp_()
    shift.copy_(new_shift)
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()  # (N, C)
    log_sum.mul_(rescale).add_(exponentials.sum(1))
    ignored = targets == ignore_index
    if terms is not None:
        set_target(exponentials, targets, first, torch.zeros_like(logp))
        exponentials[ignored] = 0.0  # assigned, not multiplied: 0 * nan is nan
        if terms is not logits:
            terms.copy_(exponentials)
        if first > 0 and weighted is not None:
            weighted.mul_(rescale.unsqueeze(1))
    if first + C == V:
        log_sum.log_()
        logp.sub_(shift).sub_(log_sum).masked_fill_(ignored, 0.0)


def row_gradient(logits: Tensor, rows: Rows, ignore_index: int, first: int, scale: Tensor, grad: Tensor) -> None:
    """Overwrites logits, and grad, by scale * ([v = target] - p_v); scale is (N,) fp32. See triton_rows.py."""
    targets, logp, shift, log_sum = rows
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()
    exponentials.mul_((-scale * torch.exp(-log_sum)).unsqueeze(1))
    set_target(exponentials, targets, first, -scale * torch.expm1(logp))  # -expm1(logp) is 1 - p without cancellation
    exponentials[targets == ignore_index] = 0.0
    if grad is not logits:
        grad.copy_(exponentials)


def kept_gradient(
    terms: Tensor, old_shift: Tensor, rows: Rows, ignore_index: int, first: int, scale: Tensor, grad: Tensor
) -> None:
    """row_gradient, on any device, from the terms that row_logprobs wrote when the shift was `old_shift`."""
    ignored = rows.targets == ignore_index
    factor = -scale * torch.exp(old_shift - rows.shift - rows.log_sum)
    torch.mul(terms, factor.masked_fill(ignored, 0.0).unsqueeze(1), out=grad)
    set_target(grad, rows.targets, first, (-scale * torch.expm1(rows.logp)).masked_fill(ignored, 0.0))


def hidden_gradient(weighted: Tensor, weight: Tensor, rows: Rows, ignore_index: int) -> None:
    """Overwrites weighted by d logp / d h = (1 - p_y) W[y] - sum_{v != y} p_v W_v. See triton_rows.py."""
    ignored = rows.targets == ignore_index
    target_rows = weight[rows.targets.masked_fill(ignored, 0)].float()  # (N, D)
    weighted.mul_(-torch.exp(-rows.log_sum).unsqueeze(1)).addcmul_(target_rows, -torch.expm1(rows.logp).unsqueeze(1))
    weighted[ignored] = 0.0


def _locate(targets: Tensor, first: int, C: int) -> tuple[Tensor, Tensor]:
    """(N,) bool: whether the target is in this tile; (N, 1) int64: its column in the tile, or 0."""
    here = (targets >= first) & (targets < first + C)
    return here, (targets - first).masked_fill(~here, 0).unsqueeze(1)


def set_target(matrix: Tensor, targets: Tensor, first: int, value: Tensor) -> None:
    """Sets matrix[i, targets[i] - first] = value[i], both (N,), in the rows whose target is among the columns."""
    here, column = _locate(targets, first, matrix.shape[1])
    old = matrix.gather(1, column)
    matrix.scatter_(1, column, torch.where(here.unsqueeze(1), value.unsqueeze(1).to(matrix.dtype), old))
