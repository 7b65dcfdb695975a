"""What a run will need: memory and disk by arithmetic, time and peak memory by a game on two small batches."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.examples import Example
from runtime import parallel
from runtime.folder import Folder, read_rows
from runtime.progress import duration
from runtime.run import Run

FP32 = 4  # bytes
TOKEN = 12  # bytes of a token in a JSON file: its id with comma and space, and its text


def count(model: nn.Module) -> tuple[int, int]:
    """(parameters, trained ones) of a model, which may be on the meta device."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def check(model: nn.Module, args: Any, examples: list[Example], device: torch.device, path: Path) -> None:
    """Compares the memory and disk that a run needs, without activations and generation cache, with what there is.

    Raises: ValueError naming what is too small.
    """
    total, trained = count(model)
    frozen = (total - trained) * (2 if args.precision == "bf16" else FP32)
    state = trained * FP32 * (2 if args.optimizer == "adamw" else 1)  # the optimizer state
    memory = (frozen + 2 * trained * FP32 + state) // (parallel.world_size() if args.fsdp else 1)
    have = memory_of(device)
    if memory > have:
        raise ValueError(
            f"{path}: training needs more than {gib(memory)} of memory, {device} has {gib(have)}; --rank 16 trains "
            f"adapters, --optimizer rmsprop keeps less"
        )
    longest = max(e.tokens for e in examples) + args.max_new_tokens
    pairs = min(args.prompts or len(examples), len(examples)) * longest * TOKEN
    # An iterate and pairs per iteration; final/ and best/; two checkpoints, since one stays until the next replaces it.
    disk = args.iterations * (trained * FP32 + pairs) + 2 * total * FP32 + 2 * (trained * FP32 + state)
    free = disk_left_for(Path(args.out))
    if disk > free:
        raise ValueError(f"--out {args.out}: the run may need {gib(disk)} of disk, {gib(free)} are free")


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has for a rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # the limit of a container
    text = limit.read_text().strip() if limit.exists() else ""
    return (min(total, int(text)) if text.isdigit() else total) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def disk_left_for(folder: Path) -> int:
    """Bytes that the run may use: free space and what its own files hold."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free + sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def describe(examples: list[Example], run: Run) -> str:
    """The plan of a run in words."""
    args = run.args
    total, trained = run.record["parameters"]
    prompts, reals = ([len(ids) for ids in column] for column in zip(*((e.prompt_ids, e.real_ids) for e in examples)))
    longer = sum(length > args.max_new_tokens for length in reals)
    ends = dict.fromkeys((run.work.eos_token_id, *run.work.ends))
    names = [run.work.tokenizer.id_to_token(token) for token in ends]
    how = f"LoRA of rank {args.rank}" if args.rank else "all parameters"
    lines = {
        "model": f"{args.model}: {total:,} parameters, {trained:,} trained ({how}), {args.precision} on {run.device}",
        "data": f"{', '.join(args.source[1])}: {len(examples):,} examples, {len(run.work.heldout):,} held out",
        "lengths": f"prompts {sum(prompts) / len(prompts):.0f} tokens, the longest {max(prompts)}; real responses "
        f"{sum(reals) / len(reals):.0f}, {longer:,} of them longer than --max-new-tokens {args.max_new_tokens}",
        "ends": f"responses end at {', '.join(map(repr, names))}",
        "iterations": f"{args.iterations}, each of {min(args.prompts or len(examples), len(examples)):,} prompts",
        "memory": f"{gib(memory_of(run.device))} on {run.device}",
        "disk": f"{gib(disk_left_for(run.folder.path))} free for {args.out}",
    }
    if parallel.world_size() > 1:
        sharded = "weights, gradients and optimizer state are sharded across them"
        held = sharded if args.fsdp else "each holds a whole model"
        lines["ranks"] = f"{parallel.world_size()}, which share the prompts and the batch of every step; {held}"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def dry_run(method: Callable, player: Any, examples: list[Example], run: Run) -> str:
    """Plays two iterations on two small batches in a temporary folder, and tells what the second took, in words.

    The first iteration warms up, on the same examples, which are the longest: they need the most memory. The player
    is not the start any more after this.
    """
    args = run.args
    some = sorted(examples, key=lambda e: e.tokens)[-2 * args.batch :]
    heldout = run.work.heldout[: args.batch]
    two = {f.name: getattr(args, f.name)[:1] for f in dataclasses.fields(args) if f.name in ("lr", "beta", "epochs")}
    with tempfile.TemporaryDirectory() as name:
        small_args = dataclasses.replace(args, **two, iterations=2, prompts=0, best="nll", out=name)
        folder = Folder(Path(name))
        work = dataclasses.replace(run.work, args=small_args, heldout=heldout)
        weights = dataclasses.replace(run.weights, args=small_args, folder=folder)
        method(player, some, dataclasses.replace(run, args=small_args, work=work, weights=weights, folder=folder))
        times = parallel.on_writer(lambda: list(read_rows(folder.path / "times.jsonl")))
    prompts = min(args.prompts or len(examples), len(examples))
    scale = {"evaluate": len(run.work.heldout) / len(heldout)}
    seconds = {phase: s * scale.get(phase, prompts / len(some)) for phase, s in times[-1]["seconds"].items()}
    phases = ", ".join(f"{phase} {duration(s)}" for phase, s in seconds.items())
    peak = gib(max(size for row in times for size in row["memory"].values()))
    whole = duration(sum(seconds.values()))
    return f"dry run     about {whole} per iteration ({phases}), by {len(some)} examples; peak memory {peak}"
