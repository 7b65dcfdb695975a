#!/usr/bin/env python3
"""SPIN on any causal language model of transformers, with the loss, the loop, LoRA and the kernel of this project.

    python examples/any_causal_lm.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out runs/qwen

Flags are those of spin.py, but for --rank 0 and --fsdp; all linear layers get adapters unless --lora-targets names
some. Only this file needs transformers: `CausalLM` is the player, and `HubModel` tells runtime/ how to load its model.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback.

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spin
from kernels import linear_logprobs
from player import Item, Player
from runtime import cli
from runtime.work import seed_of


@dataclass(frozen=True)
class HubConfig:  # what a run asks about a model
    hub: Any  # the config of transformers
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    eos_token_id: int

    @classmethod
    def from_json(cls, path: Path) -> "HubConfig":
        hub = AutoConfig.from_pretrained(path.parent)
        eos = AutoTokenizer.from_pretrained(path.parent).eos_token_id  # a chat model's own end of a turn
        return cls(hub, hub.vocab_size, hub.hidden_size, hub.max_position_embeddings, eos)

    def to_json(self) -> str:
        return "{}"  # config.json stays that of the start


class HubModel:  # how a run makes and loads a model
    config_class = HubConfig

    def __new__(cls, config: HubConfig) -> nn.Module:
        return as_linear(AutoModelForCausalLM.from_config(config.hub))

    @staticmethod
    def from_pretrained(path: Path, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Module:
        return as_linear(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval())


def as_linear(model: nn.Module) -> nn.Module:
    """Replaces GPT-2's Conv1D layers, whose weights are transposed, with the linear layers that LoRA knows."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, conv in convs.items():
        linear = nn.Linear(conv.nx, conv.nf, device="meta")
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t()), conv.bias
        model.set_submodule(name, linear)

    def save_pretrained(folder: Path) -> None:
        state = {key: x.t() if key.removesuffix(".weight") in convs else x for key, x in model.state_dict().items()}
        type(model).save_pretrained(model, folder, state_dict={key: x.contiguous() for key, x in state.items()})

    model.save_pretrained = save_pretrained
    return model


class CausalLM(Player):
    """A model of transformers as a player. Raises: ValueError if its logits are more than one product."""

    @staticmethod
    def class_of(folder: Path) -> type:
        return HubModel

    def __init__(self, model: Any, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        self.head = model.get_output_embeddings().weight  # (V, D)
        object.__setattr__(model, "head_weight", self.head)  # Player asks for it; it is no further parameter.
        super().__init__(model, eos_token_id, args, dtype)
        # `generate` would take all that `respond` leaves out from here: a chat model's repetition penalty, for example.
        model.generation_config = GenerationConfig()
        if args.checkpoint:
            model.activation_checkpointing_enable()
        with torch.no_grad():
            ids = torch.arange(1, 9, device=self.device)[None]
            product, logits = model.base_model(ids).last_hidden_state @ self.head.T, model(ids).logits
        tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
        capped = getattr(model.config, "final_logit_softcapping", None)  # Gemma's; it changes large logits alone
        if capped or not torch.allclose(product.float(), logits.float(), atol=tolerance, rtol=tolerance):
            raise ValueError(f"{type(model).__name__}: its head is not one product, so its kernel would be wrong")

    @torch.no_grad()
    def respond(self, prompts, seed, *, rows=None, max_new_tokens=None, progress=None, with_logps=False, **sampling):
        """One response to each prompt, by `generate`, in batches of prompts of like length, padded on the left."""
        sampling, ends = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling, self.ends
        settings = GenerationConfig(
            do_sample=sampling["temperature"] > 0, num_beams=1, repetition_penalty=1.0, eos_token_id=ends,
            pad_token_id=ends[0], max_new_tokens=max_new_tokens or self.args.max_new_tokens,
            **(sampling if sampling["temperature"] else {}),
        )  # fmt: skip
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result: list[Any] = [None] * len(prompts)
        for first in range(0, len(order), self.args.gen_batch):
            some = order[first : first + self.args.gen_batch]
            ids = self.padded([prompts[i] for i in some], "left")
            mask = self.padded([[1] * len(prompts[i]) for i in some], "left")
            torch.manual_seed(seed_of(seed, (rows or range(len(prompts)))[some[0]], "batch"))
            written = self.model.generate(ids, attention_mask=mask, generation_config=settings)
            for i, response in zip(some, written[:, ids.shape[1] :].tolist()):
                length = next((n for n, token in enumerate(response, 1) if token in ends), 0)  # 0: it was cut
                result[i] = response[: length or None], length > 0
            if progress is not None:
                progress(len(some), sum(len(result[i][0]) for i in some))
        if not with_logps:
            return result
        items = [(prompt, ids) for prompt, (ids, _) in zip(prompts, result)]
        return [(*row, logps) for row, logps in zip(result, self.logps(items, by_token=True))]

    def token_logps(self, items: list[Item], temperature: float = 1.0) -> Tensor:
        """log p of every token of the responses: (R, B, longest) fp32, nats. A row for each response."""
        rows = [(item[0], item[n]) for n in range(1, len(items[0])) for item in items]  # R * B
        # No mask: attention is causal, so that padding on the right changes nothing before it.
        ids, targets = self.padded([p + r[:-1] for p, r in rows]), [t for _, response in rows for t in response]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
            hidden = torch.cat([h[len(p) - 1 : len(p) + len(r) - 1] for h, (p, r) in zip(hidden, rows)])
            logps = linear_logprobs(hidden / temperature, self.head, self._tensor(targets))
        by_row = pad_sequence(logps.split([len(r) for _, r in rows]), batch_first=True)
        return by_row.view(len(items[0]) - 1, len(items), -1)

    def padded(self, rows: list[list[int]], side: str = "right") -> Tensor:
        return pad_sequence([self._tensor(row) for row in rows], batch_first=True, padding_side=side)


@dataclass(frozen=True)
class HubOptions(spin.SpinOptions):
    """SPIN's options; adapters on all linear layers are the default."""

    lora_targets: tuple[str, ...] = spin.option((), "Names of the linear layers that get an adapter; default: all.")

    def check_together(self) -> None:
        super().check_together()
        self.require(self.rank and not self.fsdp, "any_causal_lm.py trains adapters: expected no --rank 0 or --fsdp")


def main(argv: list[str] | None = None) -> int:
    play = lambda *game: spin.play(*game, spin.generate, spin.score, spin.train)  # noqa: E731
    return cli.main("any_causal_lm", play, CausalLM, HubOptions, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
