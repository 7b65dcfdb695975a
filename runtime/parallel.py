"""The ranks of a run: which rank does which work, how gradients are summed, and who writes.

`torchrun` starts the ranks. Without it there is one rank, and nothing is sent. All ranks reach the same calls in the
same order, as collective operations require. Rank 0 is the writer: it prints, and it alone reads and writes the run's
folder. What the others need of it is sent, so hosts need not share a file system.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Optimizers import this module, whose functions hold the process group as a default argument. After `join` that would
# keep the group's threads alive, and a thread that runs when the interpreter ends sometimes aborts the process.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from runtime.stopping import SIGNALS

# How long a rank waits for another one, which may be at work on a long shard. A dead rank is noticed at once.
PATIENCE = timedelta(hours=12)
CONNECTING = timedelta(minutes=10)
T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0 to world_size() - 1."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of ranks on all hosts."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number among the ranks of its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_writer() -> bool:
    """Whether this rank prints, and reads and writes the files of the run."""
    return rank() == 0


def join(on_gpu: bool, alone: bool = False) -> None:
    """Connects the ranks: NCCL sends tensors of a GPU if `on_gpu` and there is one, gloo sends everything else.

    `alone` makes a process group even if there is one rank, as fully_shard requires. Raises: dist.DistError if a rank
    does not arrive.
    """
    if world_size() == 1 and (not alone or dist.is_initialized()):
        return
    store = dist.HashStore() if world_size() == 1 else next(rendezvous("env://", timeout=CONNECTING))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # It has the keys of the ranks before a restart, too.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)


def leave() -> None:
    """Disconnects the ranks at the end of a successful run.

    After an error the others may wait for this rank, and notice its end only by its exit.
    """
    if dist.is_initialized():
        barrier()  # Rank 0 may host the store that the others still use.
        dist.destroy_process_group()


# ---------------------------------------------------------------- one writer, and errors on any rank


def values_of_all(value: T) -> list[T]:
    """Returns the `value` of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every rank has called this."""
    values_of_all(None)


def on_all(work: Callable[[], T]) -> T:
    """Calls work() on every rank and returns its own result. If it raises on one rank, all raise the first exception.

    `work` must not call other functions in which ranks wait for each other.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    for number, found in enumerate(values_of_all(error)):
        if found is not None:
            if number and isinstance(found, ValueError | OSError):  # The host of rank 0 does not have the problem.
                found = ValueError(f"rank {number}: {found}")
            found.of_all_ranks = True
            raise found
    return result  # type: ignore[return-value]


def on_writer(work: Callable[[], T]) -> T:
    """Calls work() on rank 0 alone. All ranks return its result, or raise the exception that it raised."""
    result = [on_all(lambda: work() if is_writer() else None)]
    if world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def is_to_report(error: BaseException | None) -> bool:
    """Whether this rank should print the error that ends the run.

    A rank reports what went wrong on it alone; the writer also reports what all ranks share, among it all errors before
    the ranks are connected, and the end of another rank, which may have been killed silently.
    """
    shared = not dist.is_initialized() or getattr(error, "of_all_ranks", False) or ended_elsewhere(error)
    return is_writer() or not shared


def ended_elsewhere(error: BaseException | None) -> bool:
    """Whether the error says that the connection to another rank is lost."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection closed by peer" in text


# ---------------------------------------------------------------- training


def shares(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Deals items with these numbers of tokens to the ranks, the longest first, so each has about as many tokens.

    Returns: the ascending indices of each rank's items; a rank gets none if there are fewer items than ranks.
    """
    longest_first = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    return [sorted(longest_first[rank::ranks]) for rank in range(ranks)]


def micro_batches(
    tokens: Sequence[int], cut: Callable[[Sequence[int]], Iterable[list[int]]]
) -> Iterator[tuple[list[int], float]]:
    """Yields (indices, weight) of the micro-batches that this rank works on in one step.

    `tokens` has the number of tokens of each item of the global batch; `cut` divides items into groups that fit into
    memory. All ranks get the same number of micro-batches, since fully_shard gathers weights in each: a rank with
    too few repeats one with weight 0. All other weights are 1.
    """
    parts = shares(tokens, world_size())
    groups = [[[part[i] for i in group] for group in cut([tokens[i] for i in part])] for part in parts]
    own = groups[rank()]
    yield from ((group, 1.0) for group in own)
    repeated = own[0] if own else groups[0][0]
    for _ in range(max(map(len, groups)) - len(own)):
        yield repeated, 0.0


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces every gradient by its sum over all ranks, and returns `sums`, scalars by name, added up in the same way.

    One all-reduce of one flat fp32 buffer carries both, and whether a rank was asked to stop. Its result has the same
    bits on all ranks, so their weights stay equal. fully_shard has already summed the gradients of sharded parameters.
    """
    if world_size() == 1:
        SIGNALS.agreed = SIGNALS.pending
        return sums
    replicated = [p for p in parameters if not is_sharded(p)]
    scalars = torch.stack([*sums.values()]).float()
    asked = scalars.new_tensor([float(SIGNALS.pending > 0)])
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in replicated]
    flat = torch.cat([*gradients, scalars, asked])
    dist.all_reduce(flat)
    *gradients, scalars, asked = flat.split([*(p.numel() for p in replicated), len(sums), 1])
    for parameter, gradient in zip(replicated, gradients):
        parameter.grad = gradient.view_as(parameter)
    SIGNALS.agreed = (SIGNALS.pending or signal.SIGTERM) if asked.item() else 0
    return dict(zip(sums, scalars))


# ---------------------------------------------------------------- weights and states, which rank 0 reads and writes


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, as fully_shard makes them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor on every rank, whether it is sharded across ranks or not."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def collected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The complete tensors on rank 0's CPU, gathered one at a time. The other ranks get {}."""
    result = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if is_writer():
            result[name] = complete.cpu().contiguous()
    return result


@torch.no_grad()
def overwrite(tensors: dict[str, Tensor], values: dict[str, Tensor] | None) -> None:
    """Sets tensors of all ranks, sharded or not, to rank 0's `values` by name. Those of other ranks are ignored.

    One value is in the memory of the other ranks at a time.
    """
    layout = on_writer(lambda: {name: (value.shape, value.dtype) for name, value in values.items()})
    for name, (shape, dtype) in layout.items():
        value = values[name].cpu().contiguous() if is_writer() else torch.empty(shape, dtype=dtype)
        if world_size() > 1:
            dist.broadcast(value, src=0)
        like = tensors[name]
        if is_sharded(like):
            from torch.distributed.tensor import distribute_tensor  # Importing it takes a second.

            value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        like.copy_(value)
