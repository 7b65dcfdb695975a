"""Ranks of a run: who works on what, who sums gradients, who writes. The engine is torch.distributed.

`torchrun` starts the ranks and sets RANK, WORLD_SIZE and so on; without it the world is one rank, and nothing travels.
Every rank runs the same program with the same options and comes to the same calls in the same order, as collectives
require. Rank 0, the writer, prints and writes what the run has finished; it sends what only its disk holds. No file
system needs to be shared between hosts.

What travels: results of shards (`gather`), the gradients of each step (`sum_gradients`), and, when a run is resumed,
rank 0's weights, state of training and records. docs/scaling.md has the amounts.
"""

import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from runtime.stopping import SIGNALS

# How long a rank waits for another one. A rank that dies is noticed at once; one with a long shard must not be mistaken
# for dead.
PATIENCE = timedelta(hours=12)
CONNECTING = timedelta(minutes=10)
T = TypeVar("T")

_store: dist.Store | None = None  # keys and values that all ranks see; None in a world of one
_counters = itertools.count()  # number of the next counter in the store, the same on all ranks


def rank() -> int:
    """This process's number, from 0 to world_size() - 1."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number among those of its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_writer() -> bool:
    """Whether this rank prints, and writes the files of finished iterates."""
    return rank() == 0


def join(on_gpu: bool, alone: bool = False) -> None:
    """Connects the ranks.

    Args:
        on_gpu: tensors of a GPU travel through NCCL if there is one; all else travels through gloo.
        alone: connect a world of one, too (for fully_shard, which needs a process group).

    Raises: TimeoutError where a rank does not come.
    """
    global _store
    if world_size() == 1 and (not alone or dist.is_initialized()):
        return
    if world_size() == 1:
        store: dist.Store = dist.HashStore()
    else:
        store, _, _ = next(rendezvous("env://", timeout=CONNECTING))
        store = dist.PrefixStore(_name_of_world(store), store)
        _store = dist.PrefixStore("run", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)


def _name_of_world(store: dist.Store) -> str:
    """A name on which the ranks that are alive agree.

    When torchrun restarts a world, the store may still hold the keys of the last one, and ranks would wait for dead
    ones. So each rank writes a token, rank 0 publishes a name with the tokens that it found, and a rank that finds its
    own among them takes the name and says so. Rank 0 repeats this until all have, since some tokens may be old.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + CONNECTING.total_seconds()
    store.set(f"token-{rank()}", token)
    name = uuid.uuid4().hex
    while time.monotonic() < deadline:
        if is_writer():
            store.set("world", json.dumps([name, [store.get(f"token-{r}").decode() for r in range(world_size())]]))
            if all(store.check([f"{name}-{r}"]) for r in range(1, world_size())):
                return name
        else:
            name, tokens = json.loads(store.get("world"))
            if token in tokens:
                store.set(f"{name}-{rank()}", "taken")
                return name
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank()}: other ranks did not come in {CONNECTING}")


def leave() -> None:
    """Disconnects the ranks at a good end.

    Not after an error: other ranks may wait for this one, and its end is what tells them.
    """
    global _store
    if dist.is_initialized():
        barrier()  # rank 0 may hold the store that others still need
        dist.destroy_process_group()
        _store = None


def barrier() -> None:
    """Waits until all ranks have come here."""
    if world_size() > 1:
        dist.all_gather_object([None] * world_size(), None)


# ---------------------------------------------------------------- one writer, errors of any rank


def on_writer(work: Callable[[], T]) -> T:
    """Calls work() on rank 0 alone. All ranks return its result, or raise the exception that it raised."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_writer():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].of_all_ranks = True
        raise outcome[1]
    return outcome[0]


def on_all(work: Callable[[], T]) -> T:
    """Calls work() on every rank and returns its own result. If it raises on one rank, all raise the first exception.

    `work` must not call other functions in which ranks meet.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    errors: list[Any] = [None] * world_size()
    dist.all_gather_object(errors, error)
    for number, found in enumerate(errors):
        if found is not None:
            if number and isinstance(found, ValueError | OSError):  # rank 0's host does not have the problem
                found = ValueError(f"rank {number}: {found}")
            found.of_all_ranks = True
            raise found
    return result  # type: ignore[return-value]


def is_to_report(error: BaseException | None) -> bool:
    """Whether this rank should print the error that ends the run: one rank for all, the writer or the first to ask."""
    if world_size() == 1:
        return True
    if _store is None or getattr(error, "of_all_ranks", False):  # before they are connected, ranks share the options
        return is_writer()
    try:
        return _store.add("reported", 1) == 1
    except RuntimeError:  # the rank that held the store has ended
        return True


def ended_elsewhere(error: BaseException) -> bool:
    """Whether the error says that the connection to another rank is lost."""
    from_gloo = "gloo" in str(error).lower() or "Connection closed by peer" in str(error)  # plain RuntimeErrors
    return world_size() > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and from_gloo))


# ---------------------------------------------------------------- shards of generation and scoring


def dealt(items: Sequence[int]) -> list[int]:
    """Those of the numbers `items` that this rank takes; each is taken by one of the ranks that have it."""
    if world_size() == 1:
        return list(items)
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, list(items))
    owners: dict[int, list[int]] = {}
    for number, numbers in enumerate(lists):
        for item in numbers:
            owners.setdefault(item, []).append(number)
    return [item for item in items if owners[item][item % len(owners[item])] == rank()]


def claimed(items: Sequence[T]) -> Iterator[T]:
    """Yields the items that this rank works on: an item goes to the rank that is the first to ask for one.

    A long item therefore keeps one rank busy while the others go on. `items` is the same on all ranks.
    """
    if _store is None:
        yield from items
        return
    key = f"shards-{next(_counters)}"
    while (number := _store.add(key, 1) - 1) < len(items):
        yield items[number]


def gather(found: dict[int, T]) -> dict[int, T]:
    """All entries of all ranks, on all ranks."""
    if world_size() == 1:
        return found
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


# ---------------------------------------------------------------- training


def shares(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Cuts a batch over the ranks so that each has about as many tokens.

    Args:
        tokens: of each item of the batch.

    Returns: the indices of the items of each rank, ascending; [] for ranks beyond the number of items.
    """
    result: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):  # the longest first, to the rank with the least
        to = min(range(ranks), key=lambda r: (loads[r], len(result[r]), r))
        result[to].append(i)
        loads[to] += tokens[i]
    return [sorted(part) for part in result]


def micro_batches(
    tokens: Sequence[int], cut: Callable[[Sequence[int]], Iterable[list[int]]]
) -> Iterator[tuple[list[int], float]]:
    """Yields (indices, weight) of the micro-batches that this rank works on in one step.

    All ranks get the same number of micro-batches, since fully_shard's collectives need that. A rank that has fewer
    repeats one with the weight 0; the others have the weight 1.

    Args:
        tokens: of each item of the global batch.
        cut: cuts items of so many tokens into groups that fit the memory, as Player.micro_batches.
    """
    parts = shares(tokens, world_size()) if world_size() > 1 else [list(range(len(tokens)))]
    groups = [[[part[i] for i in group] for group in cut([tokens[i] for i in part])] for part in parts]
    own = groups[rank()]
    yield from ((group, 1.0) for group in own)
    shortest = own[0] if own else groups[0][0]
    for _ in range(max(map(len, groups)) - len(own)):
        yield shortest, 0.0


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces every gradient by its sum over all ranks. Returns the sums over all ranks of the scalars in `sums`.

    One all-reduce of one flat fp32 buffer, which also tells every rank whether one of them was asked to stop. The
    result has the same bits on all ranks, so their weights stay equal. Gradients of parameters that fully_shard has cut
    are sums already.
    """
    if world_size() == 1:
        SIGNALS.agreed = SIGNALS.pending
        return sums
    whole = [p for p in parameters if not is_cut(p)]
    scalars = torch.stack([*sums.values()]).float()
    asked = scalars.new_tensor([float(SIGNALS.pending > 0)])
    gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in whole]
    flat = torch.cat([*gradients, scalars, asked])
    dist.all_reduce(flat)
    *gradients, scalars, asked = flat.split([*(p.numel() for p in whole), len(sums), 1])
    for parameter, gradient in zip(whole, gradients):
        parameter.grad = gradient.view_as(parameter)
    SIGNALS.agreed = (SIGNALS.pending or SIGNALS.DEFAULT) if asked.item() else 0
    return dict(zip(sums, scalars))


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as fully_shard makes them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece on every rank, whether it was cut over the ranks or not."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


# ---------------------------------------------------------------- what only rank 0's disk holds


@torch.no_grad()
def send_weights(model: nn.Module) -> None:
    """Overwrites the trained parameters of all ranks by those of rank 0."""
    if world_size() > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)


def sent(tensors: dict[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of rank 0's tensors, which are on the CPU, on all ranks; the others give None."""
    if world_size() == 1:
        yield from (tensors or {}).items()
        return
    layout = on_writer(lambda: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in (tensors or {}).items()})
    for name, (shape, dtype) in layout.items():
        tensor = tensors[name].contiguous() if tensors and is_writer() else torch.empty(shape, dtype=dtype)
        dist.broadcast(tensor, src=0)
        yield name, tensor


def silence() -> None:
    """Lets the writer alone print to stdout."""
    if not is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for as long as the process lives
