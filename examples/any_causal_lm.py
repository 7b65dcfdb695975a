#!/usr/bin/env python3
"""SPIN on any causal language model of transformers, with the loss, the loop, LoRA and the kernel of this project.

    python examples/any_causal_lm.py --model microsoft/phi-2 --data train.jsonl --out runs/phi

Flags are those of spin.py, except --rank 0 and --fsdp; all linear layers get adapters unless --lora-targets names
some. Only this file needs transformers: `CausalLM` is the player, and `HubModel` tells runtime/ how to load its model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spin
from player import Player
from runtime import cli


@dataclass(frozen=True)
class HubConfig:  # A run reads these facts of a model.
    hub: Any  # the config of transformers
    eos_token_id: Any
    vocab_size: int
    max_position_embeddings: int

    to_json = staticmethod(lambda: "{}")  # config.json stays that of the start

    @classmethod
    def from_json(cls, path: Path) -> "HubConfig":
        hub = AutoConfig.from_pretrained(path.parent)
        return cls(hub, hub.eos_token_id, hub.vocab_size, hub.max_position_embeddings)


class HubModel:  # A run makes and loads models with it.
    config_class = HubConfig

    def __new__(cls, config: HubConfig) -> nn.Module:
        return as_linear(AutoModelForCausalLM.from_config(config.hub))

    @staticmethod
    def from_pretrained(path: Path, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Module:
        return as_linear(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval())


def as_linear(model: nn.Module) -> nn.Module:
    """Makes nn.Linear of layers that LoRA does not know: Falcon's, and GPT-2's Conv1D, whose weights are transposed."""
    transposed = []
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Conv1D":
            transposed.append(f"{name}.weight")
            layer.weight = nn.Parameter(layer.weight.detach().t())
        if type(layer).__name__ in ("Conv1D", "FalconLinear"):
            layer.out_features, layer.in_features = layer.weight.shape
            layer.__class__ = nn.Linear
    model.register_state_dict_post_hook(  # Files hold the weights as they were.
        lambda _, state, *rest: state.update({key: state[key].t().contiguous() for key in transposed})
    )
    return model


class CausalLM(Player):
    """A model of transformers as a player. Raises: ValueError if its logits are more than a product and a bias."""

    class_of = staticmethod(lambda folder: HubModel)
    masked_tokens = 0  # Models of transformers know no segments: each response has a row of its own.

    def __init__(self, model: Any, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        head = model.get_output_embeddings()
        weight, self.bias = head.weight, getattr(head, "bias", None)
        if self.bias is not None:  # One more column, and seven of zeros, which keep rows aligned. See `hidden`.
            weight = nn.functional.pad(torch.cat([weight, self.bias[:, None]], 1), (0, 7)).detach()
        object.__setattr__(model, "head_weight", weight)  # It is no further parameter.
        super().__init__(model, eos_token_id, args, dtype)
        model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=eos_token_id)
        if not args.dropout:  # Falcon reads the config in every pass.
            model.config.update({name: 0.0 for name in vars(model.config) if "dropout" in name})
        if args.checkpoint:
            model.activation_checkpointing_enable()
        with torch.no_grad():
            ids = torch.arange(1, 9, device=self.device)[None]
            near = torch.allclose(self.hidden(ids, None) @ weight.T, model(ids).logits, atol=0.02, rtol=0.02)
        if not near or getattr(model.config, "final_logit_softcapping", None):  # A cap changes large logits alone.
            raise ValueError(f"{type(model).__name__}: its head is not one product, so its kernel would be wrong")

    def hidden(self, input_ids: Tensor, segments: None) -> Tensor:
        hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state  # right padding needs no mask
        return hidden if self.bias is None else nn.functional.pad(hidden, (0, 8), value=1.0)

    @torch.no_grad()
    def respond(self, prompts, seed, *, rows=None, max_new_tokens=None, progress=None, with_logps=False, **filters):
        """One response to each prompt, by `generate` without the model's own settings, which may hold penalties."""
        settings = {"do_sample": True, "top_k": 0} | filters if filters.get("temperature", 1.0) else {}
        settings["max_new_tokens"] = max_new_tokens or self.args.max_new_tokens
        result: list[Any] = []
        for first in range(0, len(prompts), self.args.gen_batch):
            some = prompts[first : first + self.args.gen_batch]
            padded = nn.utils.rnn.pad_sequence([self._tensor(prompt) for prompt in some], True, -1, "left")
            torch.manual_seed(seed + (rows[first] if rows else first))
            ids = self.model.generate(padded.clamp(min=0), attention_mask=(padded >= 0).long(), **settings)
            for response in ids[:, padded.shape[1] :].tolist():
                length = next((n for n, token in enumerate(response, 1) if token in self.ends), 0)  # 0: it was cut
                result.append((response[: length or None], length > 0))
            if progress is not None:
                progress(len(some), sum(len(ids) for ids, _ in result[first:]))
        if with_logps:
            logps = self.logps([(prompt, ids) for prompt, (ids, _) in zip(prompts, result)], by_token=True)
            result = [(*row, numbers) for row, numbers in zip(result, logps)]
        return result


class HubOptions(spin.SpinOptions):
    def check_together(self) -> None:
        super().check_together()
        self.require(self.rank and not self.fsdp, "any_causal_lm.py trains adapters: expected no --rank 0 or --fsdp")


def main(argv: list[str] | None = None) -> int:
    play = lambda *game: spin.play(*game, spin.generate, spin.score, spin.train)  # noqa: E731
    return cli.main("any_causal_lm", play, CausalLM, HubOptions, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
