"""Ranks of a run: who works on what, who sums gradients, who writes. Today every run is a world of one rank.

The functions are called wherever ranks will matter, so that more ranks change this file and no caller.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0 to world_size() - 1."""
    return 0


def world_size() -> int:
    return 1


def is_writer() -> bool:
    """Whether this rank prints and writes the files that all ranks share."""
    return rank() == 0


def share(shards: Sequence[T]) -> Sequence[T]:
    """The shards of generation or scoring that this rank works on: in a world of one, all of them."""
    return shards[rank() :: world_size()]


def gather(results: list[T]) -> list[T]:
    """The results of all ranks' shares, in the order of the shards: in a world of one, `results` itself."""
    return results


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every parameter's gradient by its sum over all ranks: in a world of one it is that sum already."""
