"""Tiles of the logits hidden @ weight.T, and matrix products accumulated in fp32.

Legend: N rows (tokens), D hidden width, V vocabulary entries, P padding rows of the weight;
R rows, C columns of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CUDA_BUFFER_BYTES = 512 * 2**20  # upper bound on the buffers of one tile
CPU_ROWS, CPU_COLUMNS = 512, 2048  # a tile of 4 MiB stays in the CPU cache until its logits are read again
COLUMN_MULTIPLE = 64  # buffer rows of a multiple of 64 columns are aligned; V = 50257 is odd and prevents wide loads


class Tile(NamedTuple):
    """One tile and everything that is needed to work on it. See `tiles`."""

    rows: slice
    columns: slice  # of the V real columns
    hidden: Tensor  # (R, D), a factor: see _as_factor
    weight: Tensor  # (C, D), a factor; (C + P, D) in the last columns
    logits: Tensor  # (R, C) fp32
    terms: Tensor | None  # (R, len(weight)), to be multiplied by weight; shares the memory of logits if that is fp32


def tiles(hidden: Tensor, weight: Tensor, V: int, with_terms: bool) -> Iterator[Tile]:
    """Yields tiles of the logits: all rows of the first columns, then all rows of the next columns, and so on.

    In this order the gradient of a trained weight needs an fp32 sum for one tile's columns only. All tiles share their
    buffers, so a tile is valid only until the next one is requested.

    Args:
        hidden: (N, D).
        weight: (V + P, D). The last P rows are padding: they take part in the matrix products, for aligned shapes, but
            their logits are not part of any tile.
        with_terms: whether `Tile.terms` is needed.
    """
    hidden = _as_factor(hidden)
    N, D = hidden.shape
    P = len(weight) - V
    dtypes = {torch.float32, hidden.dtype} if with_terms else {torch.float32}
    bytes_per_logit = sum(dtype.itemsize for dtype in dtypes)
    R, C = tile_shape(hidden.device, N, V, D if with_terms else 0, bytes_per_logit)
    last_columns = V - (V - 1) // C * C
    width = _round_up(max(C, last_columns + P), COLUMN_MULTIPLE)
    buffers = {dtype: empty((R, width), hidden, dtype) for dtype in dtypes}
    for columns in slices(V, C):
        weight_tile = _as_factor(weight[columns.start : columns.stop if columns.stop < V else None])
        for rows in slices(N, R):
            views = {dtype: buffer[: rows.stop - rows.start, : len(weight_tile)] for dtype, buffer in buffers.items()}
            add_product(views[torch.float32], hidden[rows], weight_tile.t(), fresh=True)
            logits = views[torch.float32][:, : columns.stop - columns.start]
            terms = views[hidden.dtype] if with_terms else None
            yield Tile(rows, columns, hidden[rows], weight_tile, logits, terms)


def tile_shape(device: torch.device, N: int, V: int, D: int, bytes_per_logit: int) -> tuple[int, int]:
    """(rows, columns) of a tile. A fixed rule and not a search, so that the first call is as fast as the others.

    On CUDA a tile has all columns and as many rows as the memory cap allows. A second product, with a result of
    (rows, D), has few blocks of 128 x 256: where the cap does not allow one block for each processor, the tile gets
    fewer columns and more rows. D = 0 means that there is no second product.
    """
    if device.type != "cuda":
        R = max(1, min(N, CPU_ROWS))
        return R, min(V, CPU_ROWS * CPU_COLUMNS // R)
    max_logits = CUDA_BUFFER_BYTES // bytes_per_logit
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    # The number of rows that gives each processor one block of the second product.
    wave = 128 * max(1, processors // max(1, (D + 255) // 256)) if D else 128
    R = _even_step(N, max(wave, max_logits // _round_up(V, COLUMN_MULTIPLE) // wave * wave), 128)
    max_columns = max(COLUMN_MULTIPLE, max_logits // R // COLUMN_MULTIPLE * COLUMN_MULTIPLE)
    return R, _even_step(V, max_columns, COLUMN_MULTIPLE)


def scratch_rows(V: int) -> int:
    """The number of whole rows of V logits that take about as much memory as a tile on a CPU."""
    return max(1, CPU_ROWS * CPU_COLUMNS // V)


def slices(total: int, step: int) -> Iterator[slice]:
    """Yields slices of at most `step` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_step(total: int, max_step: int, multiple: int) -> int:
    """A multiple of `multiple`, at most `max_step`, that cuts `total` into the fewest parts of nearly equal size."""
    total = max(1, total)
    parts = -(-total // max_step)
    return min(total, _round_up(-(-total // parts), multiple))


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def accumulator(result: Tensor) -> Tensor:
    """An fp32 tensor for the sum that ends up in `result`: `result` itself if it is fp32."""
    return result if result.dtype == torch.float32 else empty(result.shape, result, torch.float32)


def round_into(result: Tensor, total: Tensor) -> None:
    """Copies an accumulator into `result`, unless it is `result` itself."""
    if result.dtype != torch.float32:
        result.copy_(total)


def _as_factor(matrix: Tensor) -> Tensor:
    """The matrix in a dtype whose products torch can return in fp32: any dtype on CUDA, fp32 elsewhere."""
    return matrix if matrix.is_cuda else matrix.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a @ b, or total = a @ b if `fresh`. total is fp32 and is summed in fp32, whatever dtype a and b have."""
    with torch.autocast(total.device.type, enabled=False):  # onednn.py replaces no product inside autocast
        if a.dtype == torch.float32:
            torch.mm(a, b, out=total) if fresh else torch.addmm(total, a, b, out=total)
        elif fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:  # requires torch 2.10: before, addmm took no fp32 sum with 16-bit factors
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
