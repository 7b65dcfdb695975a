"""A whole iteration, generation, scoring and training: spin.py beside transformers + PEFT + TRL on the same weights."""

import itertools
from collections.abc import Callable

import torch
from bench import Case, Ways, ours
from generation_cases import BF16, FP32, forced_ends, theirs
from training_cases import parts, peer_trainer

import spin


def iteration(shape: str, dtype: torch.dtype, count: int, batch: int, limit: int = 256, estimate: float = 0.0) -> Case:
    """Generation of `count` responses, scoring, training on the pairs; generation takes `count` rows at a time."""

    def build(device: torch.device) -> Ways:
        sizes = dict(batch=batch, gen_batch=count, max_new_tokens=limit)
        player, run, pairs, peer = parts(shape, dtype, device, count, limit, **sizes)
        prompts, lengths = [p.prompt_ids for p in pairs], [len(p.generated_ids[0]) for p in pairs]

        def call() -> None:
            with forced_ends(lengths):
                responses = player.respond(prompts, seed=0)
            assert [len(ids) for ids, _ in responses] == lengths
            spin.score(player, pairs, run)
            spin.train(player, pairs, 0, run)

        def stack() -> Callable:
            other, turn = peer(), itertools.count()
            generate = theirs(other, prompts, lengths, count, limit, player.eos_token_id)

            def call() -> None:
                generate()
                start = next(turn) % count  # Otherwise the second call would find the reference's figures on disk.
                trainer = peer_trainer(other, player, pairs[start:] + pairs[:start], batch, precompute=True)
                trainer.train()
                trainer.model.unload()  # This call takes the adapters off again.

            return call

        rounds = 3 if device.type == "cpu" else 2
        peers = {"transformers + TRL, reference precomputed": stack}
        return Ways(ours(call, device), peers, (count, "pairs"), rounds)

    name = f"iteration: {shape} shape, {str(dtype).removeprefix('torch.')}, LoRA, {count} prompts with GSM8K's lengths"
    return Case(f"{name}, {batch} pairs a step", build, estimate)


CASES = {
    "quick": [iteration("tiny", FP32, 8, 4, limit=16)],
    "cpu": [iteration("125M", FP32, 8, 4)],
    "cuda": [iteration("125M", BF16, 64, 32, estimate=45), iteration("1.3B", BF16, 64, 32, estimate=45)],
}
