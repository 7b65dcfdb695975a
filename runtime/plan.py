"""What a run will need: memory and disk by arithmetic, before anything is allocated; time by a rehearsal.

The arithmetic leaves out activations, which depend on device and kernels: `--dry-run` measures them.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from runtime import parallel
from runtime.data import Example
from runtime.options import value_at
from runtime.progress import duration, peak_memory

FP32 = 4
TOKEN = 12  # bytes of a token in a JSON file: its id with comma and space, and its text


class Needs(NamedTuple):
    """Two counts, then bytes."""

    parameters: int
    trained: int
    training: int  # weights, gradients and optimizer state, without activations
    generation: int  # weights and the cache of keys and values
    disk: int
    optimizer: int  # the optimizer's state alone


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
    keeps_responses: bool = False,
    swaps_weights: bool = False,
    cut: int = 0,
    models: int = 1,
) -> Needs:
    """The needs of each rank of a run that trains the parameters of `model` that require a gradient.

    The model may be on the meta device.

    Args:
        optimizer_slots: numbers that the optimizer keeps for each trained one: 2 for AdamW, 1 for RMSProp.
        bf16: frozen weights and the cache are bf16; trained weights are fp32 and are copied to bf16 for generation.
        cache_tokens, batch_size, row_tokens: limits of generation, and the longest prompt with its longest response.
        pair_tokens: upper bound of the tokens in all pairs of one iteration.
        keeps_responses: responses are written a second time, for later iterations.
        swaps_weights: the player's weights wait on disk while others take their place.
        cut: number of ranks over which --fsdp cuts what is trained; 0: every rank holds all of it.
        models: of this size in memory together while responses are generated.
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
    training = weights + trained * (1 + optimizer_slots) * FP32
    generation = weights + (trained * itemsize if bf16 else 0)
    if cut:
        block = sum(p.numel() for p in model.transformer["h"][0].parameters())
        outside = total - config.num_layers * block  # embeddings, which stay whole with their gradient during a step
        own = -(-trained * FP32 // cut)
        training = own * (2 + optimizer_slots) + outside * 2 * FP32 + block * 2 * (itemsize + FP32)
        generation = own + (total - outside) * itemsize + outside * FP32
    state = trained * (1 + optimizer_slots) * FP32  # a checkpoint of training; two exist while one replaces the other
    return Needs(
        parameters=total,
        trained=trained,
        training=training,
        generation=generation + (models - 1) * weights + cache,
        disk=iterations * (trained * FP32 + pair_tokens * TOKEN * (2 if keeps_responses else 1))
        + (3 if swaps_weights else 2) * total * FP32  # final/ and best/
        + 2 * state
        + pair_tokens * TOKEN,
        optimizer=trained * optimizer_slots * FP32 // max(cut, 1),
    )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has for a rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else ""
    return (min(total, int(text)) if text.isdigit() else total) // parallel.local_world_size()


def disk_left_for(folder: Path) -> int:
    """Bytes the run may use: free space plus what its own files hold."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
    return shutil.disk_usage(there).free + used


def check(needs: Needs, model: Path, device: torch.device, out: Path) -> None:
    """Raises ValueError where memory or disk cannot suffice, even without activations."""
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


def rehearse(player: Any, examples: list[Example], run: Any) -> tuple[dict[str, float], int]:
    """Measures (seconds a token of each phase, peak memory in bytes) on one small batch. Writes nothing.

    It runs twice: on the longest examples, which need the most memory and warm up, and on those of middle length.
    """
    ordered = sorted(examples, key=lambda e: e.tokens)
    half = len(ordered) // 2
    size = max(1, player.micro_tokens // (ordered[-1].tokens + run.args.max_new_tokens))
    room = player.model.config.max_position_embeddings - max(len(e.prompt_ids) for e in examples)
    seconds = {}
    # Long enough that prompts do not dominate, but a given pair's prompt may leave less room.
    for some, new_tokens in ((ordered[::-1], 8), (ordered[half:] + ordered[:half], 64)):
        some = some[: max(size, run.args.gen_batch)]
        began = time.perf_counter()
        new_tokens = min(new_tokens, run.args.max_new_tokens, room)
        responses = player.respond([e.prompt_ids for e in some], 0, max_new_tokens=new_tokens)
        seconds["generate"] = (time.perf_counter() - began) / sum(len(ids) for ids, _ in responses)
        real = [e.real_ids or ids for e, (ids, _) in zip(some, responses)]  # a prompt may have no answer
        items = [(e.prompt_ids, *[ids] * (1 + run.args.generated_in_pair)) for e, ids in zip(some[:size], real)]
        tokens = sum(len(ids) for item in items for ids in item)
        began = time.perf_counter()
        player.logps(items)
        seconds["score"] = (time.perf_counter() - began) / tokens
        with run.weights_to_train(player):
            began = time.perf_counter()
            player.model.train()
            player.response_logps(items).sum().backward()
            peak = peak_memory(run.device) + run.needs.optimizer
            player.model.zero_grad()
            seconds["train"] = (time.perf_counter() - began) / tokens
    return seconds, peak


def describe(
    examples: list[Example],
    run: Any,
    replaced: Sequence[str] = (),
    seconds: dict[str, float] | None = None,
    peak: int = 0,
) -> str:
    """The plan of a run in words.

    Args:
        replaced: options of recipes that the command line replaces, as `options.overridden` has them.
        seconds, peak: from `rehearse`; without them no time is known.
    """
    args, needs, supervised = run.args, run.needs, run.record["command"] == "sft"
    count = len(examples)
    prompts = min(args.prompts or count, count)
    prompt = sum(len(e.prompt_ids) for e in examples) / count
    limit = args.max_new_tokens
    real = sum(len(e.real_ids) for e in examples) / count or limit  # prompts may have no answers
    written = sum(min(len(e.real_ids), limit) for e in examples) / count or limit  # of a generated response
    epochs = [value_at(args.epochs, t) for t in range(args.iterations)]
    items = [prompts * args.items_per_prompt * (2 if args.mix_previous and t else 1) for t in range(args.iterations)]
    steps = [epoch * -(-n // args.batch) for epoch, n in zip(epochs, items)]
    generated = 0 if supervised else written * args.generated_in_pair
    tokens = (prompt + real + generated) / args.iterations  # of an item, for the mean over these
    per_token = seconds or dict.fromkeys(("generate", "score", "train"), 0.0)
    times = {
        "generate": prompts * args.responses_per_prompt * written * per_token["generate"],
        "score": tokens * sum(items) * args.scoring_passes * per_token["score"],
        "train": tokens * sum(epoch * n for epoch, n in zip(epochs, items)) * per_token["train"],
        "evaluate": 2 * len(run.heldout) * (written * per_token["generate"] + (prompt + real) * per_token["score"]),
    }
    if supervised:
        times = {phase: times[phase] for phase in ("train", "evaluate")}
    elif not args.scoring_passes:
        del times["score"]
    ranks = parallel.world_size()
    times = {phase: seconds / ranks for phase, seconds in times.items()}
    longer = sum(len(e.real_ids) > limit for e in examples)
    trained = f"LoRA of rank {args.rank}" if args.rank else "all parameters"
    phases = ", ".join(f"{phase} {duration(time)}" for phase, time in times.items())
    each = " for each rank" if ranks > 1 else ""
    memory = f"about {gib(max(peak, needs.generation))}"
    if not peak:
        memory = f"training {gib(needs.training)} and activations, generation {gib(needs.generation)},"
    lines = {
        "model": f"{args.model}: {needs.parameters:,} parameters, {needs.trained:,} trained ({trained}), "
        f"{str(run.dtype).removeprefix('torch.')} on {run.device}",
        "data": f"{', '.join(args.source[1])}: {count:,} examples to train on, {len(run.heldout):,} held out",
        "lengths": f"prompts {prompt:.0f} tokens, the longest {max(len(e.prompt_ids) for e in examples)}; "
        f"real responses {real:.0f}, {longer:,} of them longer than --max-new-tokens {limit}",
        "iterations": f"{args.iterations}, each of {prompts:,} prompts; steps: {', '.join(map(str, steps))}",
        "memory": f"{memory} of {gib(memory_of(run.device))}{each}",
        "disk": f"up to {gib(needs.disk)} of {gib(disk_left_for(run.out))} in {run.out}",
        "time": f"about {duration(sum(times.values()))} an iteration if responses are as long as the real ones "
        f"({phases})",
    }
    if not seconds:
        lines["time"] = "told as soon as a phase has run; --dry-run measures it before"
    if ranks > 1:
        cut = "weights, gradients and optimizer state are cut over them" if args.fsdp else "each holds the whole model"
        shards = -(-prompts // run.shard_size(prompts, *run.shard_limits))
        lines["ranks"] = f"{ranks}, which share {shards} shards of prompts (--shard) and the batch of every step; {cut}"
    if replaced:
        lines["options"] = ", ".join(replaced)
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())
