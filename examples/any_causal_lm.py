#!/usr/bin/env python3
"""SPIN on any causal language model of transformers, with the loss, the loop, LoRA and the kernel of this project.

    python examples/any_causal_lm.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out runs/qwen

Flags are those of spin.py, but for --rank 0 and --fsdp; all linear layers get adapters unless --lora-targets names
some. Only this file needs transformers: `CausalLM` is the player, and `HubModel` tells runtime/ how to load its model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spin
from kernels import linear_logprobs
from player import Item, Player, head_rows
from runtime import cli
from runtime.work import seed_of


@dataclass(frozen=True)
class HubConfig:
    """What a run asks about a model."""

    hub: Any  # the config of transformers
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    eos_token_id: int

    @classmethod
    def from_json(cls, path: Path) -> "HubConfig":
        hub = transformers.AutoConfig.from_pretrained(path.parent)
        eos = transformers.AutoTokenizer.from_pretrained(path.parent).eos_token_id  # a chat model's own end of a turn
        return cls(hub, hub.vocab_size, hub.hidden_size, hub.max_position_embeddings, eos)

    def to_json(self) -> str:
        return "{}"  # config.json stays that of the start


class HubModel:
    """How a run makes and loads a model."""

    config_class = HubConfig

    def __new__(cls, config: HubConfig) -> nn.Module:
        return as_linear(transformers.AutoModelForCausalLM.from_config(config.hub))

    @staticmethod
    def from_pretrained(path: Path, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Module:
        model = as_linear(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval())
        model.generation_config = transformers.GenerationConfig()  # its settings would replace what we leave out
        model.save_pretrained = MethodType(save_plain, model)
        return model


def save_plain(model: nn.Module, folder: Path) -> None:
    """Writes a model without adapters in the layout that its own class has."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    conv1d = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, Conv1D)}
    state = {name: tensor.t() if name in conv1d else tensor for name, tensor in model.state_dict().items()}
    type(model).save_pretrained(model, folder, state_dict={name: t.contiguous() for name, t in state.items()})


def as_linear(model: nn.Module) -> nn.Module:
    """Replaces GPT-2's Conv1D layers, whose weights are transposed, with the linear layers that LoRA knows."""
    for name, conv in list(model.named_modules()):
        if isinstance(conv, Conv1D):
            linear = nn.Linear(conv.nx, conv.nf, device="meta")
            linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t()), conv.bias
            model.set_submodule(name, linear.train(conv.training))
    return model


class CausalLM(Player):
    """A model of transformers as a player; Player's docstring says what a player does.

    Raises: ValueError if the model's logits are more than hidden states times the head's weight.
    """

    @staticmethod
    def class_of(folder: Path) -> type:
        return HubModel

    def __init__(self, model: Any, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.eos_token_id, self.args, self.dtype = model, eos_token_id, args, dtype
        self.device = model.device
        self.micro_tokens = args.micro_tokens or (8192 if self.device.type == "cuda" else 2048)
        self.head = model.get_output_embeddings().weight  # (V, D)
        with torch.no_grad():
            ids = torch.arange(1, 9, device=self.device)[None]
            hidden, logits = model.base_model(ids).last_hidden_state, model(ids).logits
            tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
            if not torch.allclose((hidden @ self.head.T).float(), logits.float(), atol=tolerance, rtol=tolerance):
                raise ValueError(f"{type(model).__name__}: its head is not one product, so its kernel would be wrong")

    @torch.no_grad()
    def respond(
        self, prompts, seed, *, rows=None, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=None, progress=None,
        with_logps=False,
    ) -> list[tuple]:  # fmt: skip
        """One response to each prompt, by `generate`, in batches of prompts of like length, padded on the left."""
        sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p) if temperature else {}
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens or self.args.max_new_tokens,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.eos_token_id,
            **sampling,
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result: list[Any] = [None] * len(prompts)
        devices = [self.device] if self.device.type == "cuda" else []
        for first in range(0, len(order), self.args.gen_batch):
            some = order[first : first + self.args.gen_batch]
            width = len(prompts[some[-1]])
            ids = self._tensor([[self.eos_token_id] * (width - len(prompts[i])) + prompts[i] for i in some])
            mask = self._tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed_of(seed, (rows or range(len(prompts)))[some[0]], "batch"))
                written = self.model.generate(ids, attention_mask=mask, generation_config=settings)
            for i, response in zip(some, written[:, width:].tolist()):
                finished = self.eos_token_id in response
                result[i] = response[: response.index(self.eos_token_id) + 1] if finished else response, finished
            if progress is not None:
                progress(len(some), sum(len(result[i][0]) for i in some))
        if with_logps:
            logps = self.logps([(prompt, ids) for prompt, (ids, _) in zip(prompts, result)], by_token=True)
            return [(*row, by_token) for row, by_token in zip(result, logps)]
        return result

    def token_logps(self, items: list[Item], temperature: float = 1.0) -> Tensor:
        """log p of every token of the responses: (R, B, longest) fp32, nats. A row for each response."""
        rows = [(item[0], item[n]) for n in range(1, len(items[0])) for item in items]  # R * B
        width = max(len(prompt) + len(response) - 1 for prompt, response in rows)
        ids = self._tensor([(p + r[:-1]) + [0] * (width - len(p) - len(r) + 1) for p, r in rows])
        # No mask: attention is causal, so that padding on the right changes nothing before it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            sources, targets, slots, longest = head_rows(rows, width)
            logps = linear_logprobs(hidden[self._tensor(sources)] / temperature, self.head, self._tensor(targets))
        padded = logps.new_zeros(len(rows) * longest).index_put((self._tensor(slots),), logps)
        return padded.view(len(items[0]) - 1, len(items), longest)


@dataclass(frozen=True)
class HubOptions(spin.SpinOptions):
    """SPIN's options; adapters on all linear layers are the default."""

    lora_targets: tuple[str, ...] = spin.option((), "Names of the linear layers that get an adapter; default: all.")

    def check_together(self) -> None:
        super().check_together()
        self.require(self.rank and not self.fsdp, "any_causal_lm.py trains adapters: expected no --rank 0 or --fsdp")


def play(*game: Any) -> None:
    spin.play(*game, spin.generate, spin.score, spin.train)


def main(argv: list[str] | None = None) -> int:
    return cli.main("any_causal_lm", play, CausalLM, HubOptions, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
