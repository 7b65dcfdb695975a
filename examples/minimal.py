"""SPIN inside your own training code: a game on a list of (prompt, response) texts, in memory.

    python examples/minimal.py

It needs model.py, llama.py, lora.py, sampling.py, kernels/, player.py and spin.py, and nothing else that is here.
`MemoryRun` is all that spin.py asks of its surroundings: put your own data, logging and checkpoints there. For the same
texts and options, pairs and losses are those of spin.py bit for bit (tests/test_minimal.py).
"""

import contextlib
import gzip
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402 - the path comes first
import spin  # noqa: E402
from kernels import onednn  # noqa: E402
from model import GPTNeo  # noqa: E402
from player import Player  # noqa: E402


@dataclass(frozen=True)
class Options(spin.SpinOptions):
    """SPIN's options, and those that this file and a player read."""

    iterations: int = 2
    seed: int = 0
    max_new_tokens: int = 32
    gen_batch: int = 64  # responses to generate together
    gen_tokens: int = 2**17  # size of the generation cache in tokens
    micro_tokens: int = 2048  # tokens per forward pass


@dataclass
class Example:
    prompt_ids: list[int]
    real_ids: list[int]  # ends with the end-of-sequence token
    asked: str  # the prompt as text


class MemoryRun:
    """What spin.Run and spin.Training ask for, kept in lists."""

    def __init__(self, args: Options) -> None:
        self.args, self.pairs, self.log = args, [], []  # the pairs of each iteration, a row for every step

    def seed(self, t, purpose):
        """Every purpose has random numbers of its own, so that no phase disturbs another."""
        return int.from_bytes(hashlib.sha256(f"{self.args.seed}/{t}/{purpose}".encode()).digest()[:8], "big") >> 1

    def generator(self, t, purpose):
        return torch.Generator().manual_seed(self.seed(t, purpose))

    def iterations(self, player):
        return range(self.args.iterations)

    def prompts(self, examples, t):
        return [examples[i] for i in torch.randperm(len(examples), generator=self.generator(t, "choose")).tolist()]

    def sample(self, player, examples, t, purpose):
        args = self.args
        sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        return player.respond([e.prompt_ids for e in examples], self.seed(t, purpose), **sampling)

    def logps(self, player, items, purpose):
        return player.logps(items)

    def previous_pairs(self, t):
        return []

    def evaluate(self, player):
        return {}  # your own metrics

    def finish_iterate(self, player, row, pairs):
        print(f"iteration {len(self.pairs)}: {row['pairs']} pairs, loss {row['loss']:.4f}, margin {row['margin']:.4f}")
        self.pairs.append(pairs)

    @contextlib.contextmanager
    def training(self, player, items, t):
        shuffle, args = self.generator(t, "shuffle"), self.args
        orders = [torch.randperm(len(items), generator=shuffle) for _ in range(args.epochs[t])]
        self.parts = [part.tolist() for order in orders for part in order.split(args.batch)]
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
            yield [batch[i] for i in part], 1.0

    def add(self, values, weight):
        self.sums = {name: self.sums.get(name, 0) + value.detach().sum() for name, value in values.items()}

    def step(self, optimizer, clip):
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        self.log.append({name: float(total / self.size) for name, total in self.sums.items()})

    def signals(self):
        return self.log[-1]


def encode(texts: list[tuple[str, str]], tokenizer: Tokenizer, eos: int) -> list[Example]:
    """Prompt and response are encoded apart, so that no token spans their boundary."""
    asked = [f"### Instruction: {prompt}\n\n### Response: " for prompt, _ in texts]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked]
    real_ids = [tokenizer.encode(response, add_special_tokens=False).ids for _, response in texts]
    return [Example(*both, text) for *both, (text, _) in zip(ids, [[*ids, eos] for ids in real_ids], texts)]


def play(texts: list[tuple[str, str]], start: Path, args: Options, rank: int = 16) -> MemoryRun:
    """A game from the model in the folder `start` by LoRA adapters; prints three responses before and after."""
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    model, run = GPTNeo.from_pretrained(start), MemoryRun(args)
    lora.add_lora(model, rank, alpha=32, generator=run.generator(0, "lora"))
    player = Player(model, model.config.eos_token_id, args)
    examples = encode(texts, tokenizer, player.eos_token_id)

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
