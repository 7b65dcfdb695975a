"""Tiles of the logits hidden @ weight.T, the numbers per row, and matrix products accumulated in fp32.

Legend: N rows (tokens), D hidden width, V vocabulary entries; R rows, C columns of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CUDA_BUFFER_BYTES = 512 * 2**20  # upper bound on the buffers of one tile
CUDA_COLUMNS = 2**14  # upper bound on the columns of a tile: 16 warps hold a row of them in registers
CPU_ROWS, CPU_COLUMNS = 512, 2048  # a tile of 4 MiB stays in the CPU cache until its logits are read again
# CUDA multiplies matrices of 50257 columns several times slower than of a multiple of 64: threads load 16 bytes at once
# only from addresses that are multiples of 16, and with an odd number of columns most rows begin elsewhere.
COLUMN_MULTIPLE = 64


class Rows(NamedTuple):
    """The target of each row and its statistics, which triton_rows.py defines."""

    targets: Tensor  # (N,) int64
    logp: Tensor  # (N,) fp32, as the following
    shift: Tensor
    log_sum: Tensor

    @classmethod
    def empty(cls, targets: Tensor) -> "Rows":
        """Rows with uninitialised statistics."""
        return cls(targets, *(targets.new_empty(targets.shape, dtype=torch.float32) for _ in range(3)))

    def part(self, some: slice) -> "Rows":
        """Some of the rows, in the same memory."""
        return Rows(*(tensor[some] for tensor in self))


class Tile(NamedTuple):
    """One tile and everything that is needed to work on it. See `tiles`."""

    rows: slice
    columns: slice
    hidden: Tensor  # (R, D), a factor: see _as_factor
    weight: Tensor  # (C, D), a factor
    logits: Tensor | None  # (R, C) fp32
    terms: Tensor | None  # (R, C), to be multiplied by weight; it is `logits` if the factors are fp32


def tiles(hidden: Tensor, weight: Tensor, with_terms: bool, with_logits: bool = True) -> Iterator[Tile]:
    """Yields tiles of the logits: all rows of the first columns, then all rows of the next columns, and so on.

    In this order the gradient of a trained weight needs an fp32 sum for one tile's columns only. All tiles share their
    buffers, so a tile is valid only until the next one is requested.

    Args:
        hidden: (N, D).
        weight: (V, D).
        with_terms, with_logits: whether `Tile.terms` is needed, and whether `Tile.logits` is to be computed.
    """
    hidden = _as_factor(hidden)
    N, V = len(hidden), len(weight)
    dtypes = {torch.float32, hidden.dtype} if with_terms else {torch.float32}
    bytes_per_logit = sum(dtype.itemsize for dtype in dtypes)
    R, C = tile_shape(hidden.device, N, V, bytes_per_logit)
    needed = dtypes if with_logits else {hidden.dtype}
    buffers = {dtype: hidden.new_empty(R, _round_up(C, COLUMN_MULTIPLE), dtype=dtype) for dtype in needed}
    for columns in slices(V, C):
        weight_tile = _as_factor(weight[columns])
        for rows in slices(N, R):
            views = {dtype: buffer[: rows.stop - rows.start, : len(weight_tile)] for dtype, buffer in buffers.items()}
            logits = views.get(torch.float32)
            if with_logits:
                add_product(logits, hidden[rows], weight_tile.t(), fresh=True)
            yield Tile(rows, columns, hidden[rows], weight_tile, logits, views[hidden.dtype] if with_terms else None)


def tile_shape(device: torch.device, N: int, V: int, bytes_per_logit: int) -> tuple[int, int]:
    """(rows, columns) of a tile. The rule is fixed; a search would make the first call slow.

    On CUDA a tile has as many rows as the memory cap allows with half of CUDA_COLUMNS, which keeps the processors busy
    in the second product, whose result is (rows, D), and then as many columns as the cap and CUDA_COLUMNS allow. They
    are a multiple of COLUMN_MULTIPLE, rounded down, which leaves a small last tile (17 columns of 50257). It costs
    little, and all others are aligned.
    """
    if device.type != "cuda":
        R = max(1, min(N, CPU_ROWS))
        return R, min(V, CPU_ROWS * CPU_COLUMNS // R)
    max_logits = CUDA_BUFFER_BYTES // bytes_per_logit
    parts = max(1, _ceil_div(N, 2 * max_logits // CUDA_COLUMNS // 128 * 128))  # All parts are nearly equal.
    R = max(1, min(N, _round_up(_ceil_div(N, parts), 128)))
    C = V // _ceil_div(V, min(CUDA_COLUMNS, max_logits // R)) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return R, min(V, max(COLUMN_MULTIPLE, C))


def scratch_rows(V: int) -> int:
    """The number of whole rows of V logits that take about as much memory as a tile on a CPU."""
    return max(1, CPU_ROWS * CPU_COLUMNS // V)


def slices(total: int, step: int) -> Iterator[slice]:
    """Yields slices of at most `step` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _round_up(number: int, multiple: int) -> int:
    return _ceil_div(number, multiple) * multiple


def _as_factor(matrix: Tensor) -> Tensor:
    """The matrix in a dtype whose products torch can return in fp32: fp32 or, on CUDA, bf16.

    Not fp16, in which the terms of a softmax would vanish below 6e-8, and with them the tail of a large vocabulary.
    """
    return matrix if matrix.is_cuda and matrix.dtype != torch.float16 else matrix.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a @ b, or total = a @ b if `fresh`. total is fp32 and is summed in fp32, whatever dtype a and b have."""
    with torch.autocast(total.device.type, enabled=False):
        if not total.is_cuda:
            product = F.linear(a, b.t())  # onednn.py makes this one faster, if autocast is off.
            total.copy_(product) if fresh else total.add_(product)
        elif a.dtype == torch.float32:
            torch.mm(a, b, out=total) if fresh else torch.addmm(total, a, b, out=total)
        elif fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:  # requires torch 2.10: before, addmm took no fp32 sum with 16-bit factors
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
