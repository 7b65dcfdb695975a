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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import spin
from player import Player
from runtime import cli
from runtime.work import seed_of


@dataclass(frozen=True)
class HubConfig:  # what a run asks about a model
    hub: Any  # the config of transformers
    eos_token_id: int

    @classmethod
    def from_json(cls, path: Path) -> "HubConfig":
        eos = AutoTokenizer.from_pretrained(path.parent).eos_token_id  # a chat model's own end of a turn
        return cls(AutoConfig.from_pretrained(path.parent), eos)

    def __getattr__(self, name: str) -> Any:
        if name == "hub":  # It is not there yet while a copy is made.
            raise AttributeError(name)
        return getattr(self.hub, name)  # vocab_size, hidden_size and max_position_embeddings

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
    """Makes layers that LoRA does not know linear ones: Falcon's, and GPT-2's Conv1D, whose weights are transposed."""
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    convs = [name for name, kind in kinds.items() if kind == "Conv1D"]
    for name in [*convs, *(name for name, kind in kinds.items() if kind == "FalconLinear")]:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().t() if name in convs else layer.weight.detach()
        linear = nn.Linear(*weight.t().shape, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), layer.bias
        model.set_submodule(name, linear)

    def transpose(_: nn.Module, state: dict[str, Tensor], *rest: Any) -> None:  # what is saved is as it was
        state.update({key: state[key].t().contiguous() for key in (f"{name}.weight" for name in convs)})

    model.register_state_dict_post_hook(transpose)
    return model


class CausalLM(Player):
    """A model of transformers as a player. Raises: ValueError if its logits are more than one product."""

    class_of = staticmethod(lambda folder: HubModel)
    masked_tokens = 0  # Models of transformers know no segments: each response has a row of its own.

    def __init__(self, model: Any, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        object.__setattr__(model, "head_weight", model.get_output_embeddings().weight)  # It is no further parameter.
        super().__init__(model, eos_token_id, args, dtype)
        # `generate` would take all that `respond` leaves out from here: a chat model's repetition penalty, for example.
        model.generation_config = GenerationConfig()
        if not args.dropout:  # Falcon reads the config in every pass.
            model.config.update({name: 0.0 for name in vars(model.config) if "dropout" in name})
        if args.checkpoint:
            model.activation_checkpointing_enable()
        with torch.no_grad():
            ids = torch.arange(1, 9, device=self.device)[None]
            product, logits = self.hidden(ids, None) @ model.head_weight.T, model(ids).logits
        tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
        capped = getattr(model.config, "final_logit_softcapping", None)  # Gemma's; it changes large logits alone
        if capped or not torch.allclose(product.float(), logits.float(), atol=tolerance, rtol=tolerance):
            raise ValueError(f"{type(model).__name__}: its head is not one product, so its kernel would be wrong")

    @torch.no_grad()
    def respond(self, prompts, seed, *, rows=None, max_new_tokens=None, progress=None, with_logps=False, **filters):
        """One response to each prompt, by `generate`, in batches of prompts of like length, padded on the left."""
        filters, ends = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | filters, self.ends
        settings = GenerationConfig(
            do_sample=filters["temperature"] > 0, num_beams=1, repetition_penalty=1.0, eos_token_id=ends,
            pad_token_id=ends[0], max_new_tokens=max_new_tokens or self.args.max_new_tokens,
            **(filters if filters["temperature"] else {}),
        )  # fmt: skip
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result: list[Any] = [None] * len(prompts)
        for first in range(0, len(order), self.args.gen_batch):
            some = order[first : first + self.args.gen_batch]
            padding = [len(prompts[some[-1]]) - len(prompts[i]) for i in some]
            ids = self._tensor([[0] * n + prompts[i] for n, i in zip(padding, some)])
            mask = self._tensor([[0] * n + [1] * len(prompts[i]) for n, i in zip(padding, some)])
            torch.manual_seed(seed_of(seed, (rows or range(len(prompts)))[some[0]], "batch"))
            written = self.model.generate(ids, attention_mask=mask, generation_config=settings)
            for i, response in zip(some, written[:, ids.shape[1] :].tolist()):
                length = next((n for n, token in enumerate(response, 1) if token in ends), 0)  # 0: it was cut
                result[i] = response[: length or None], length > 0
            if progress is not None:
                progress(len(some), sum(len(result[i][0]) for i in some))
        if not with_logps:
            return result
        logps = self.logps([(prompt, ids) for prompt, (ids, _) in zip(prompts, result)], by_token=True)
        return [(*row, numbers) for row, numbers in zip(result, logps)]

    def hidden(self, input_ids: Tensor, segments: None) -> Tensor:
        return self.model.base_model(
            input_ids, use_cache=False
        ).last_hidden_state  # Padding on the right needs no mask.


class HubOptions(spin.SpinOptions):
    def check_together(self) -> None:
        super().check_together()
        self.require(self.rank and not self.fsdp, "any_causal_lm.py trains adapters: expected no --rank 0 or --fsdp")


def main(argv: list[str] | None = None) -> int:
    play = lambda *game: spin.play(*game, spin.generate, spin.score, spin.train)  # noqa: E731
    return cli.main("any_causal_lm", play, CausalLM, HubOptions, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
