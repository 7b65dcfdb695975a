"""What a run will need, by arithmetic: memory and disk, in bytes. Nothing is allocated.

Activations are left out, since they depend on device and kernels: `spin.py --dry-run` measures them in training.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

FP32 = 4
TOKEN = 8  # a token id of a pair, as text in a JSON file, the comma and the space included


class Needs(NamedTuple):
    """Bytes, but for the first two, which are counts."""

    parameters: int
    trained: int
    training: int  # weights, gradients and optimizer state; activations come on top
    generation: int  # weights and the cache of keys and values
    disk: int


def needs(
    model: nn.Module,
    *,
    optimizer_slots: int,
    bf16: bool,
    cache_tokens: int,
    batch_size: int,
    row_tokens: int,
    iterations: int,
    pair_tokens: int,
    history: bool = False,
    swapped: bool = False,
) -> Needs:
    """Of a run that trains what requires a gradient in `model`, which may lie on the meta device.

    Args:
        optimizer_slots: numbers that the optimizer keeps for each trained one: 2 for AdamW, 1 for RMSProp.
        bf16: frozen weights and the cache are bf16; trained weights are fp32 and are copied to bf16 for generation.
        cache_tokens, batch_size, row_tokens: limits of generation, and the longest prompt with its longest response.
        pair_tokens: tokens in all pairs of one iteration, at most; with `history` they are kept once more.
        swapped: the model is on disk once more while another takes its place.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, train in sizes if train)
    total = sum(n for n, _ in sizes)
    itemsize = 2 if bf16 else FP32
    weights = trained * FP32 + (total - trained) * itemsize
    config = model.config
    rows = min(batch_size, max(1, cache_tokens // row_tokens))
    places = [min(row_tokens, config.window_size) if k == "local" else row_tokens for k in config.attention_layers]
    cache = rows * sum(places) * 2 * config.hidden_size * itemsize
    state = trained * (1 + optimizer_slots) * FP32  # as it is saved during training, and twice while it is replaced
    return Needs(
        parameters=total,
        trained=trained,
        training=weights + trained * (1 + optimizer_slots) * FP32,
        generation=weights + (trained * itemsize if bf16 else 0) + cache,
        disk=iterations * (trained * FP32 + pair_tokens * TOKEN * (2 if history else 1))
        + (2 if swapped else 1) * total * FP32
        + 2 * state
        + pair_tokens * TOKEN,
    )


def memory_of(device: torch.device) -> int:
    """All that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, int(text)) if text.isdigit() else total


def disk_left_for(folder: Path) -> int:
    """Free bytes where `folder` is or will be, and those that its files take up already."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
    return shutil.disk_usage(there).free + used


def check(needs: Needs, model: Path, device: torch.device, out: Path) -> None:
    """Raises ValueError where memory or disk cannot do, even without activations."""
    have = memory_of(device)
    if needs.training > have:
        raise ValueError(
            f"{model}: training needs more than {gib(needs.training)} of memory, {device} has "
            f"{gib(have)}; --rank 16 trains adapters, --optimizer rmsprop keeps less"
        )
    if needs.generation > have:
        raise ValueError(
            f"{model}: generation needs more than {gib(needs.generation)} of memory, {device} has "
            f"{gib(have)}; lower --gen-tokens or --gen-batch"
        )
    free = disk_left_for(out)
    if needs.disk > free:
        raise ValueError(f"--out {out}: the run may need {gib(needs.disk)} of disk, {gib(free)} are free")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe(train_set: list[Any], heldout: list[Any], run: Any, seconds: dict[str, float], peak: int) -> str:
    """The plan of a run (prepare.Run) in words; `seconds` are those a token takes in each phase."""
    args, needs, sft = run.args, run.needs, run.record["command"] == "sft"
    count, prompts = len(train_set), min(args.prompts or len(train_set), len(train_set))
    prompt, real = sum(len(e.prompt_ids) for e in train_set) / count, sum(len(e.real_ids) for e in train_set) / count
    real = real or args.max_new_tokens  # prompts without answers
    written = 0 if args.pairs else prompts * (2 if args.reinforce else 1)
    epochs = args.epochs * (args.iterations if len(args.epochs) == 1 else 1)
    items = [prompts * (2 if args.mix_previous and t else 1) for t in range(args.iterations)]
    steps = [epoch * -(-n // args.batch) for epoch, n in zip(epochs, items)]
    tokens = (prompt + real * (1 if sft else 2)) / args.iterations  # of an item, for the mean over the iterations
    times = {
        "generate": written * real * seconds["generate"],
        "score": tokens * sum(items) * (1 + bool(args.alpha)) * seconds["score"],
        "train": tokens * sum(epoch * n for epoch, n in zip(epochs, items)) * seconds["train"],
        "evaluate": 2 * len(heldout) * (real * seconds["generate"] + (prompt + real) * seconds["score"]),
    }
    times = {phase: time for phase, time in times.items() if not sft or phase in ("train", "evaluate")}
    longer = sum(len(e.real_ids) > args.max_new_tokens for e in train_set)
    how = f"LoRA of rank {args.rank}" if args.rank else "all parameters"
    lines = {
        "model": f"{args.model}: {needs.parameters:,} parameters, {needs.trained:,} trained ({how}), "
        f"{str(run.dtype).removeprefix('torch.')} on {run.device}",
        "data": f"{args.pairs or args.data}: {len(train_set):,} examples to train on, {len(heldout):,} held out",
        "lengths": f"prompts {prompt:.0f} tokens, the longest {max(len(e.prompt_ids) for e in train_set)}; "
        f"real responses {real:.0f}, {longer:,} of them longer than --max-new-tokens {args.max_new_tokens}",
        "iterations": f"{args.iterations}, each of {prompts:,} prompts; steps: {', '.join(map(str, steps))}",
        "memory": f"about {gib(max(peak, needs.generation))} of {gib(memory_of(run.device))}",
        "disk": f"up to {gib(needs.disk)} of {gib(disk_left_for(run.out))} in {run.out}",
        "time": f"about {duration(sum(times.values()))} an iteration if responses are as long as the real ones ("
        + ", ".join(f"{phase} {duration(time)}" for phase, time in times.items())
        + ")",
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())
