"""A whole iteration, generation, scoring and training: spin.py beside transformers + PEFT + TRL on the same weights."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from bench import Case, Ways, optional, ours
from generation_cases import forced_ends, theirs
from training_cases import parts, peer_settings, trl_trainer

import spin

SIZES = ((45, "125M"), (45, "1.3B"))  # seconds on a GPU, and shape


def iteration_case(
    estimate: float, shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int, limit: int = 256
) -> Case:
    """Generation of `count` responses, scoring, training on the pairs; generation takes `count` rows at a time."""
    name = f"iteration: {shape} shape, {str(dtype).removeprefix('torch.')}, LoRA, {count} prompts with GSM8K's lengths"
    build = partial(iteration_ways, shape, dtype, device, count, batch, limit)
    return Case(f"{name}, {batch} pairs a step", build, estimate=estimate)


def iteration_ways(shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int, limit: int) -> Ways:
    options = dict(batch=batch, gen_batch=count, max_new_tokens=limit)
    player, other, pairs, run, notes = parts(shape, dtype, device, count, limit, **options)
    eos = player.eos_token_id
    prompts, lengths = [p.prompt_ids for p in pairs], [len(p.generated_ids[0]) for p in pairs]

    def iteration() -> None:
        with forced_ends(lengths):
            responses = player.respond(prompts, seed=0)
        assert [len(ids) for ids, _ in responses] == lengths
        spin.score(player, pairs, run)
        spin.train(player, pairs, 0, run)

    settings = peer_settings(player.model, dtype, device, batch)
    turn = itertools.count()

    def stack(precompute: bool) -> Callable:
        def call() -> None:
            theirs(other, prompts, lengths, count, limit, eos, device)()
            start = next(turn) % count  # else the second call would find the reference's figures in a cache on disk
            trainer = trl_trainer(other, pairs[start:] + pairs[:start], precompute=precompute, **settings)
            trainer.train()
            trainer.model.unload()  # takes the adapters off again

        return call

    ways = ours(iteration, device)
    with optional(notes, "transformers + TRL"):
        import trl  # noqa: F401

        if other is not None:
            ways["transformers + TRL, reference precomputed"] = stack(True)
            if shape != "1.3B":  # It is the slower of the two, and takes most of the time there.
                ways["transformers + TRL, reference in each step"] = stack(False)
    return Ways(ways, notes, dict.fromkeys(ways, (count, "pairs")), rounds=3 if device.type == "cpu" else 2)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [iteration_case(0, "tiny", torch.float32, device, 8, 4, 16)]
    if device.type == "cpu":
        return [iteration_case(0, "125M", torch.float32, device, 8, 4)]
    return [iteration_case(estimate, shape, torch.bfloat16, device, 64, 32) for estimate, shape in SIZES]
