"""The functions of triton_rows.py in plain torch, for a CPU and for machines without triton.

Two differences: `logits` is fp32 scratch, worked on in place and left overwritten, and `terms` or `grad`, if given,
is that scratch itself.

Legend: N rows, V vocabulary entries, D hidden width, C columns of a tile.
"""

import torch
from torch import Tensor


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
    """Take one tile of logits into logp, shift and log_sum, (N,) fp32, and turn it into terms. See triton_rows.py."""
    C = logits.shape[1]
    if first == 0:
        logp.fill_(float("nan"))
        shift.fill_(torch.finfo(torch.float32).min)  # not -inf, since -inf - -inf is nan
        log_sum.zero_()
    here, column = _within(targets, first, C)
    logp.copy_(torch.where(here, logits.gather(1, column).squeeze(1), logp))
    new_shift = torch.maximum(shift, logits.amax(1))
    rescale = (shift - new_shift).exp_()
    shift.copy_(new_shift)
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()  # (N, C)
    log_sum.mul_(rescale).add_(exponentials.sum(1))
    ignored = targets == ignore_index
    if terms is not None:
        _set_at(exponentials, column, here, torch.zeros_like(logp))
        exponentials[ignored] = 0.0  # not by a factor, since 0 * nan is nan
        if first > 0:
            weighted.mul_(rescale.unsqueeze(1))
    if first + C == V:
        log_sum.log_()
        logp.sub_(shift).sub_(log_sum).masked_fill_(ignored, 0.0)


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
    """Turn logits into scale * ([v = target] - p_v); scale is (N,) fp32. See triton_rows.py."""
    here, column = _within(targets, first, logits.shape[1])
    exponentials = logits.sub_(shift.unsqueeze(1)).exp_()
    exponentials.mul_((-scale * torch.exp(-log_sum)).unsqueeze(1))
    _set_at(exponentials, column, here, -scale * torch.expm1(logp))  # 1 - p, also where p rounds to 1
    exponentials[targets == ignore_index] = 0.0


def hidden_gradient(
    weighted: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, logp: Tensor, log_sum: Tensor
) -> None:
    """Turn weighted into d logp / d h = (1 - p_y) W[y] - sum_v p_v W_v, v != y. See triton_rows.py."""
    ignored = targets == ignore_index
    target_rows = weight[targets.masked_fill(ignored, 0)].float()  # (N, D)
    weighted.mul_(-torch.exp(-log_sum).unsqueeze(1)).addcmul_(target_rows, -torch.expm1(logp).unsqueeze(1))
    weighted[ignored] = 0.0


def _within(targets: Tensor, first: int, C: int) -> tuple[Tensor, Tensor]:
    """(N,) whether the target is in the tile; (N, 1) its column there, or 0."""
    here = (targets >= first) & (targets < first + C)
    return here, (targets - first).masked_fill(~here, 0).unsqueeze(1)


def _set_at(matrix: Tensor, column: Tensor, here: Tensor, value: Tensor) -> None:
    """matrix[i, column[i]] = value[i] where here[i]."""
    old = matrix.gather(1, column)
    matrix.scatter_(1, column, torch.where(here.unsqueeze(1), value.unsqueeze(1), old))
