"""Memory of training steps at GPT-Neo's shapes: a dry run of all allocations, beside the arithmetic of runtime/plan.py.

    python benchmarks/memory.py

Runs two steps on fake tensors, which have shapes and no numbers, and follows every storage from its creation to its
end: 2.7 billion parameters take seconds and no memory. Prints a table and renews it in this folder's README.

It computes what a GPU would: autocast's layer norms in fp32, and attention under masks, whose CPU form saves the same
tensors. Left out are the head, whose tiles kernels/tiles.py limits to about half a GiB, with its own gradient where all
parameters are trained; what CUDA's libraries reserve; and the allocator's fragments.
"""

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from bench import renew_section
from generation_cases import SHAPES, neo_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from model import GPTNeo, GPTNeoConfig
from runtime import plan

ROW_TOKENS = 1024  # of a pair: the most that are one row under a mask, player.MASKED_TOKENS
PAIRS = (2, 8)  # of a micro-batch; 8 are those of the default --micro-tokens on a GPU, 8192
GIB = 2**30


class Account(TorchDispatchMode):
    """The bytes of all storages that operators create inside it and that are alive: now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.known | before:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Step(NamedTuple):
    """Bytes."""

    planned: int  # weights, gradients and AdamW's state, by runtime/plan.py
    held: int  # the same as the dry run has them between two steps
    saved: int  # what a forward pass adds: activations, and weights that autocast has cast
    peak: int  # the most that is alive at a time


def dry_run(config: GPTNeoConfig, rank: int, pairs: int, checkpoint: bool, tokens: int = ROW_TOKENS) -> Step:
    """Two steps in bf16 on `pairs` pairs of `tokens` tokens, each a row. Rank 0 trains all parameters."""
    layer_norm = F.layer_norm

    def in_fp32(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)

    with FakeTensorMode(), Account() as account, mock.patch.object(F, "layer_norm", in_fp32):
        torch.set_default_dtype(torch.bfloat16 if rank else torch.float32)  # as runtime/setup.py loads them
        try:
            model = GPTNeo(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if rank:
            lora.add_lora(model, rank, 2.0 * rank)
        model.checkpointing = checkpoint
        trained = [p for p in model.parameters() if p.requires_grad]
        state = [torch.empty_like(p) for p in trained for _ in range(2)]
        segments = torch.zeros(pairs, tokens, dtype=torch.long)
        for _ in range(2):  # the second has the gradients of the first beside its own
            held = account.live
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(segments, segments)
                saved = account.live - held
            hidden.backward(torch.empty_like(hidden))
            del hidden
        del segments
        torch._foreach_sqrt(state[::2])  # AdamW's step on CUDA: a root of all second moments at once
        held = account.live
    needs = plan.needs(
        model, optimizer_slots=2, bf16=True, cache_tokens=1, batch_size=1, row_tokens=1, iterations=1, pair_tokens=1
    )
    return Step(needs.training, held, saved, account.peak)


def lines() -> Iterator[str]:
    columns = [f"{pairs * ROW_TOKENS} tokens{how}" for pairs in PAIRS for how in ("", ", `--checkpoint`")]
    yield f"| model | trained | by `plan.py` | {' | '.join(columns)} |"
    yield "|---" * (3 + len(columns)) + "|"
    for shape in SHAPES:
        for rank in (16, 0):
            steps = [dry_run(neo_config(shape), rank, pairs, how) for pairs in PAIRS for how in (False, True)]
            assert all(step.planned == step.held for step in steps)
            figures = " | ".join(f"{size / GIB:.1f}" for size in (steps[0].planned, *(step.peak for step in steps)))
            yield f"| {shape} | {f'LoRA of rank {rank}' if rank else 'all, AdamW'} | {figures} |"


def main() -> None:
    table = list(lines())
    print("\n".join(table))
    renew_section("memory", table)


if __name__ == "__main__":
    main()
