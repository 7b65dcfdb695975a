"""KL divergences between the next tokens of two models, over the whole vocabulary, from hidden states.

    KL_i = sum_v p_iv (log p_iv - log q_iv)                       p_i = softmax(W h_i), q_i = softmax(W' h'_i)
    d KL_i / d z_iv = p_iv (log p_iv - log q_iv - KL_i)           z_i = W h_i

A tile is some rows of both models' logits. The backward pass computes the logits again, so that no more than one tile
exists at a time. The code is plain torch, and logits are fp32.

Legend: N rows (tokens), D hidden width, V vocabulary entries. All divergences are in nats.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .tiles import _as_factor, add_product, slices

# The logits of a tile take at most 128 MiB per model; a backward pass holds about four times as many.
TILE_LOGITS = 2**25


def linear_kl(hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor) -> Tensor:
    """KL(softmax(hidden @ weight.T) || softmax(other_hidden @ other_weight.T)) of each row.

    Args:
        hidden, other_hidden: (N, D), float16, bfloat16 or float32; their widths may differ.
        weight, other_weight: (V, D), of the same dtypes as their hidden states.

    Returns: (N,) fp32, in nats. Differentiable once with respect to hidden and weight, which are those of the player
    in reverse KL; the other distribution is a constant.
    """
    return _LinearKL.apply(hidden, weight, other_hidden.detach(), other_weight.detach())


class _LinearKL(Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        kl = tensors[0].new_empty(len(tensors[0]), dtype=torch.float32)
        factors = [_as_factor(tensor) for tensor in tensors]  # A CPU casts 16-bit tensors here, once for all tiles.
        for rows in slices(len(kl), max(1, TILE_LOGITS // len(tensors[1]))):
            logp, logq = _both_log_softmax(rows, *factors)
            kl[rows] = logp.exp().mul_(logp - logq).sum(1)
        ctx.save_for_backward(*tensors, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        *tensors, kl = ctx.saved_tensors
        hidden, weight = tensors[:2]
        wanted = list(zip(ctx.needs_input_grad, (hidden, weight)))  # A frozen head gets no (V, D) gradient.
        d_hidden, d_weight = (torch.zeros_like(t, dtype=torch.float32) if needed else None for needed, t in wanted)
        factors = [_as_factor(tensor) for tensor in tensors]
        for rows in slices(len(kl), max(1, TILE_LOGITS // len(weight))):
            logp, logq = _both_log_softmax(rows, *factors)
            gradient = logp.exp().mul_(logp.sub_(logq).sub_(kl[rows, None])).mul_(upstream[rows, None])
            terms = gradient.to(factors[0].dtype)
            if d_hidden is not None:
                add_product(d_hidden[rows], terms, factors[1], fresh=True)
            if d_weight is not None:
                add_product(d_weight, terms.t(), factors[0][rows], fresh=False)
        both = zip((d_hidden, d_weight), (hidden, weight))
        return *(None if gradient is None else gradient.to(like.dtype) for gradient, like in both), None, None


def _both_log_softmax(rows: slice, *tensors: Tensor) -> list[Tensor]:
    """The log-probabilities of both models for some rows, (R, V) fp32."""
    both = []
    for hidden, weight in (tensors[:2], tensors[2:]):
        logits = torch.empty(rows.stop - rows.start, len(weight), device=hidden.device)
        add_product(logits, hidden[rows], weight.t(), fresh=True)
        both.append(logits.log_softmax(1))
    return both
