"""SPIN inside your own training code: a game on a list of (prompt, response) texts, in memory.

    python examples/minimal.py

It needs model.py, llama.py, lora.py, sampling.py, kernels/, player.py and spin.py, and nothing else of this
repository. `MemoryRun` has all calls that spin.py makes to its surroundings: put your own data, logging and checkpoints
there. For the same texts and options, pairs and losses are those of spin.py bit for bit (tests/test_minimal.py).
"""

import contextlib
import gzip
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402 - the path comes first
import spin  # noqa: E402
from kernels import onednn  # noqa: E402
from player import Player  # noqa: E402


@dataclass(frozen=True)
class Options(spin.SpinOptions):
    """SPIN's options, and those that this file and a player read. lr, epochs and beta have a value per iteration."""

    iterations: int = 2
    seed: int = 0
    max_new_tokens: int = 32  # length limit of responses
    gen_batch: int = 64  # responses to generate together
    gen_tokens: int = 2**17  # size of the generation cache in tokens
    micro_tokens: int = 2048  # tokens per forward pass in training and scoring


class Example(NamedTuple):
    prompt_ids: list[int]
    real_ids: list[int]  # ends with the end-of-sequence token
    asked: str  # the prompt as text


class MemoryRun:
    """The calls of spin.Run and, from `training` on, of spin.Training; what they yield is kept in lists."""

    def __init__(self, args: Options) -> None:
        self.args = args
        self.pairs = []  # the list of pairs of each iteration
        self.log = []  # a row for every step of training

    def generator(self, t, purpose):
        """Each purpose of each iteration has random numbers of its own, so that no phase disturbs another."""
        name = hashlib.sha256(f"{self.args.seed}/{t}/{purpose}".encode())
        return torch.Generator().manual_seed(int.from_bytes(name.digest()[:8], "big") >> 1)

    def iterations(self, player):
        return range(self.args.iterations)

    def prompts(self, examples, t):
        return [examples[i] for i in torch.randperm(len(examples), generator=self.generator(t, "choose")).tolist()]

    def sample(self, player, examples, t, purpose):
        seed, how = self.generator(t, purpose).initial_seed(), self.args
        prompts = [e.prompt_ids for e in examples]
        return player.respond(prompts, seed, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)

    def logps(self, player, items, purpose):
        return player.logps(items)

    def previous_pairs(self, t):
        return []

    def evaluate(self, player):
        return {}  # your own metrics

    def finish_iterate(self, player, row, pairs):
        self.pairs.append(pairs)
        print(f"{row['pairs']} pairs, loss {row['loss']:.4f}, margin {row['margin']:.4f} at the last step")

    @contextlib.contextmanager
    def training(self, player, items, t):
        shuffle, args = self.generator(t, "shuffle"), self.args
        orders = [torch.randperm(len(items), generator=shuffle) for _ in range(args.epochs[t])]
        self.parts = [part.tolist() for order in orders for part in order.split(args.batch)]  # a batch per step
        self.items, self.steps, self.player = items, len(self.parts), player
        self.parameters = [p for p in player.model.parameters() if p.requires_grad]
        player.model.train()
        yield self
        player.model.eval()

    def batches(self, optimizer):
        for step, part in enumerate(self.parts):
            self.sums, self.size = {}, len(part)
            yield step, [self.items[i] for i in part]

    def micro_batches(self, batch):
        for part in self.player.micro_batches([item.tokens for item in batch]):
            yield [batch[i] for i in part], 1.0  # One GPU repeats no part.

    def add(self, values, weight):
        self.sums = {name: self.sums.get(name, 0) + value.detach().sum() for name, value in values.items()}

    def step(self, optimizer, clip):
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        self.log.append({name: float(total / self.size) for name, total in self.sums.items()})

    def signals(self):
        return self.log[-1]


def play(texts: list[tuple[str, str]], start: Path, args: Options, rank: int = 16) -> MemoryRun:
    """A game with LoRA adapters on a GPT-Neo or Llama in folder `start`; prints greedy responses before and after."""
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    model, run = Player.class_of(start).from_pretrained(start), MemoryRun(args)
    lora.add_lora(model, rank, alpha=32, targets=lora.linear_names(model), generator=run.generator(0, "lora"))
    player = Player(model, model.config.eos_token_id, args)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def example(prompt: str, real: str) -> Example:  # The two are encoded apart: no token spans their boundary.
        prompt_ids = encode(f"### Instruction: {prompt}\n\n### Response: ")
        return Example(prompt_ids, [*encode(real), player.eos_token_id], prompt)

    examples = [example(prompt, real) for prompt, real in texts]

    def show(title: str) -> None:
        responses = player.respond([e.prompt_ids for e in examples[:3]], seed=0, temperature=0)
        print(title, *(f"{e.asked} -> {tokenizer.decode(ids)}" for e, (ids, _) in zip(examples, responses)), sep="\n  ")

    with onednn.products():  # faster on some CPUs
        show("before")
        spin.play(player, examples, run, spin.generate, spin.score, spin.train)
        show("after")
    return run


if __name__ == "__main__":
    with gzip.open(ROOT / "pronounce" / "cmudict.jsonl.gz", "rt") as file:
        rows = [json.loads(next(file)) for _ in range(256)]
    texts = [(row["prompt"], row["response"]) for row in rows]
    play(texts, ROOT / "pronounce" / "start", Options(lr=(1e-3, 1e-3), beta=(0.5, 0.5), epochs=(2, 2)))
