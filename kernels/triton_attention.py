"""Attention of one new token per row to its cached tokens, in Triton: each row reads its own entries and no others.

Attention under a mask reads the cache up to the longest row, for every row. With responses of different lengths half of
that may be for nothing, and the cache is most of what a large batch reads. Here each row's length is read on the device
by the program that needs it. The grid and all addresses are fixed, so a step can be captured in a CUDA graph, one for
all lengths.

NOT YET MEASURED on a GPU, so nothing uses it by default: `make bench-gpu ARGS=generation` compares both ways.

One program attends for one head of one row. Every lane has its own maximum, sum and weighted values; lanes are combined
once, after the last block, so that loads do not wait for a reduction. There is no tl.dot: with one query a head the
products are bound by memory, and the source runs under TRITON_INTERPRET=1. The entries of a row are not split over
programs: B * H of them fill a GPU from about 16 rows on, and below that the weights are most of what a step reads.

Legend: B rows, H heads, S entries of the cache, K head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # entries per load
WARPS = 4
LOWEST = tl.constexpr(-3.4028234663852886e38)  # least fp32, the initial maximum: -inf would give -inf - -inf = nan


@triton.jit
def _decode_kernel(
    q, k, v, lengths, out, q_row, q_head, k_row, k_head, k_entry, v_row, v_head, v_entry, S,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, h) computes decode_attention for head h of row b."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # 64 bits: a cache may exceed 2^31 numbers
    columns = tl.arange(0, WIDTH)[None]
    entries = tl.arange(0, BLOCK)
    query = tl.load(q + b * q_row + h * q_head + columns, mask=columns < K, other=0.0).to(tl.float32)
    keys = k + b * k_row + h * k_head + columns
    values = v + b * v_row + h * v_head + columns
    count = tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, count, BLOCK):
        entry = (start + entries)[:, None]
        inside = (entry < count) & (columns < K)  # what lies beyond may be nan
        key = tl.load(keys + entry * k_entry, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values + entry * v_entry, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(start + entries < count, tl.sum(key * query, 1), LOWEST)
        new_peak = tl.maximum(peak, score)
        rescale = tl.exp(peak - new_peak)
        weight = tl.where(start + entries < count, tl.exp(score - new_peak), 0.0)
        total = total * rescale + weight
        weighted = weighted * rescale[:, None] + weight[:, None] * value
        peak = new_peak
    lane = tl.exp(peak - tl.max(peak, 0))
    result = tl.sum(weighted * lane[:, None], 0) / tl.sum(total * lane, 0)
    result = tl.reshape(result, (1, WIDTH)).to(out.dtype.element_ty)
    tl.store(out + (b * tl.num_programs(1) + h) * K + columns, result, mask=columns < K)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k^T) v over the first `lengths[b]` entries of row b; scores are not scaled. Without gradient.

    In a ring buffer the order of the entries does not matter, and a row longer than the buffer reads all of it: pass
    the row's length as it is.

    Args:
        q: (B, H, 1, K), any float dtype; K consecutive in memory, as in k and v.
        k, v: (B, H, S, K), of any float dtype, with any strides but of K.
        lengths: (B,) integers >= 1 on the same device; more than S count as S.

    Returns: (B, H, 1, K) in q's dtype; sums are fp32.
    Raises: ValueError if the shapes do not fit or K is not consecutive.
    """
    B, H, T, K = q.shape
    if T != 1 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (B, H, K) or lengths.shape != (B,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, lengths))
        raise ValueError(f"shapes {shapes}: expected (B, H, 1, K), twice (B, H, S, K), (B,)")
    if any(x.stride(3) != 1 for x in (q, k, v)) or lengths.stride(0) != 1:
        raise ValueError("expected the last dimension of q, k, v and lengths to be consecutive in memory")
    out = torch.empty(B, H, 1, K, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _decode_kernel[(B, H)](
            q, k, v, lengths, out, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], k.shape[2],
            K=K, WIDTH=triton.next_power_of_2(K), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out
