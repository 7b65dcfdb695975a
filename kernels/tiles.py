"""Tiles of the logits hidden @ weight.T, and products summed in fp32.

Legend: N rows (tokens), D hidden width, V vocabulary entries; R rows and C columns of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CUDA_BUFFER_BYTES = 512 * 2**20  # cap on the buffers of a tile
CPU_ROWS, CPU_COLUMNS = 512, 2048  # a tile of 4 MiB: its logits are still in the cache when they are wanted again
PAD = 64  # columns (or rows of the weight) to fill up: V = 50257 is odd, too ill-aligned for wide loads


class Tile(NamedTuple):
    rows: slice
    columns: slice
    hidden: Tensor  # (R, D), a factor: see _as_factor
    weight: Tensor  # (C or more, D), a factor; rows beyond C are padding
    logits: Tensor  # (R, C) fp32
    terms: Tensor | None  # (R, C or more), factors' dtype: room for what the weight is multiplied by; fp32: the logits'


def tiles(hidden: Tensor, weight: Tensor, with_terms: bool) -> Iterator[Tile]:
    """Tiles of the logits: all rows of the first columns, then of the next. A tile lasts until the next is asked for.

    In this order a trained weight's gradient needs an fp32 sum of one tile's rows of it only.
    """
    hidden, padded = _as_factor(hidden), _padded(weight)
    (N, D), V = hidden.shape, len(weight)
    dtypes = {torch.float32, hidden.dtype} if with_terms else {torch.float32}
    R, C = tile_shape(hidden.device, N, V, D if with_terms else 0, sum(dtype.itemsize for dtype in dtypes))
    buffers = {dtype: empty((R, _round_up(C, PAD)), hidden, dtype) for dtype in dtypes}
    for columns in slices(V, C):
        weight_tile = _as_factor(padded[columns.start : columns.stop if columns.stop < V else None])
        for rows in slices(N, R):
            room = {dtype: buffer[: rows.stop - rows.start, : len(weight_tile)] for dtype, buffer in buffers.items()}
            add_product(room[torch.float32], hidden[rows], weight_tile.t(), fresh=True)
            logits = room[torch.float32][:, : columns.stop - columns.start]
            yield Tile(rows, columns, hidden[rows], weight_tile, logits, room[hidden.dtype] if with_terms else None)


def tile_shape(device: torch.device, N: int, V: int, D: int, bytes_per_logit: int) -> tuple[int, int]:
    """(rows, columns) of a tile: a fixed rule rather than a search, so that the first call is as fast as any.

    On CUDA all columns, as many rows as the memory cap allows. If there is a second product, whose result is (rows, D),
    it has few 128 x 256 blocks: where the cap denies one for each processor, rather fewer columns and enough rows.
    D = 0: no second product.
    """
    if device.type != "cuda":
        R = max(1, min(N, CPU_ROWS))
        return R, min(V, CPU_ROWS * CPU_COLUMNS // R)
    room = CUDA_BUFFER_BYTES // bytes_per_logit
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wave = 128 * max(1, processors // max(1, (D + 255) // 256)) if D else 128  # rows that give each processor a block
    R = _even_step(N, max(wave, room // _round_up(V, PAD) // wave * wave), 128)
    return R, _even_step(V, max(PAD, room // R // PAD * PAD), PAD)


def scratch_rows(V: int) -> int:
    """How many whole rows are about as large as a tile on a CPU."""
    return max(1, CPU_ROWS * CPU_COLUMNS // V)


def _padded(weight: Tensor) -> Tensor:
    """The weight with the rows behind it that fill up a multiple of PAD, where its memory holds them; else as it is.

    They add nothing as long as they are finite: their logits are not looked at, the terms they are multiplied by are 0.
    """
    rows, D = _round_up(len(weight), PAD), weight.shape[1]
    held = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if not weight.is_cuda or not weight.is_contiguous() or held < rows * D:
        return weight  # on a CPU it is no faster
    return weight.as_strided((rows, D), (D, 1))


def slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_step(total: int, most: int, multiple: int) -> int:
    """The step, at most `most`, a multiple of `multiple`, that cuts `total` into the fewest, nearly equal parts."""
    total = max(1, total)
    parts = -(-total // most)
    return min(total, _round_up(-(-total // parts), multiple))


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def accumulator(result: Tensor) -> Tensor:
    """fp32 room for a sum that ends up in `result`: that itself where it is fp32."""
    return result if result.dtype == torch.float32 else empty(result.shape, result, torch.float32)


def round_into(result: Tensor, total: Tensor) -> None:
    if result.dtype != torch.float32:
        result.copy_(total)


def _as_factor(matrix: Tensor) -> Tensor:
    """The matrix in a dtype whose products can be had in fp32: any dtype on CUDA, fp32 elsewhere."""
    return matrix if matrix.is_cuda else matrix.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total += a @ b, or total = a @ b if fresh; total is fp32, and so is the sum whatever the factors are."""
    with torch.autocast(total.device.type, enabled=False):  # or it would round fp32 factors to 16 bits
        if a.dtype == torch.float32:
            torch.mm(a, b, out=total) if fresh else torch.addmm(total, a, b, out=total)
        elif fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=total)  # from torch 2.8 on
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
