#!/usr/bin/env python3
"""SPIN on any causal language model of transformers, with the loss, the loop, LoRA and the kernel of this project.

    python examples/any_causal_lm.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out runs/qwen

Flags are those of spin.py; adapters are trained (--rank 0 is refused), on all linear layers unless --lora-targets
names some. Only this file needs transformers. What is special about it is `CausalLM`, the player; `setup` puts a run
together by hand, as the runtime does for GPT-Neo. A stopped run resumes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lora
import spin
from kernels import linear_logprobs, onednn
from player import Item, Player, head_rows
from runtime import panels, record, report, storage
from runtime.data import as_decoded, digest, draw, encode, fit_context, load_examples, load_tokenizer, split
from runtime.options import Args, changeable, parse
from runtime.run import Run, seed_of
from runtime.setup import choose_device, resolve_model
from runtime.template import choose


class CausalLM(Player):
    """A model of transformers as a player; Player's docstring says what a player does.

    Raises: ValueError where the model's logits are more than hidden states times the head's weight.
    """

    def __init__(self, model: Any, eos_token_id: int, args: Args, dtype: torch.dtype = torch.float32) -> None:
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
            logps = self.logps_by_token([(prompt, ids) for prompt, (ids, _) in zip(prompts, result)])
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


def setup(args: Args) -> tuple[CausalLM, list[Any], Run]:
    """The player with fresh adapters, the training examples, and the run with the held-out ones."""
    if not args.rank or not args.data or not args.model:
        raise ValueError("expected --model and --data, and no --rank 0")
    path, revision = resolve_model(args.model)
    device = choose_device(args)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    for module in model.modules():  # the opponent is scored without dropout: see docs/runs.md
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if args.lora_targets == lora.DEFAULT_TARGETS:
        args = dataclasses.replace(args, lora_targets=tuple(lora.linear_names(model)))
    eos = transformers.AutoTokenizer.from_pretrained(path).eos_token_id  # a chat model's own end of a turn
    tokenizer = load_tokenizer(path, eos, model.get_output_embeddings().weight.shape[0])
    train_set = load_examples(args.data, fields=args.fields)
    if args.eval_data:
        heldout = load_examples(args.eval_data, fields=args.fields)
    else:
        train_set, heldout = split(train_set, args.eval_share)
    heldout = draw(heldout, args.eval_limit)
    template = choose(args.template, path, tokenizer, any(e.turns for e in train_set), args.special_tokens)
    for examples in (train_set, heldout):
        encode(examples, tokenizer, template, eos)
    as_decoded(heldout, tokenizer, eos)
    context = model.config.max_position_embeddings
    train_set, _ = fit_context(train_set, context, args.max_new_tokens, args.overlong)
    heldout, _ = fit_context(heldout, context, args.max_new_tokens, args.overlong)
    generator = torch.Generator().manual_seed(seed_of(args.seed, 0, "lora"))
    lora.add_lora(model, args.rank, args.lora_alpha, args.lora_dropout, args.lora_targets, generator)
    new = {
        "command": "any_causal_lm",
        "args": dataclasses.asdict(args),
        "revision": revision,
        "torch": torch.__version__,
        "template": "chat" if template.chat else template.source,
        "digests": {"data": digest(train_set), "eval-data": digest(heldout)},
    }
    earlier = record.read(Path(args.out))
    if earlier:
        record.check_same(Path(args.out), earlier, new, changeable(Args))
        record.check_same_inputs(Path(args.out), earlier["digests"], new["digests"])
    run = Run(args, tokenizer, eos, device, Path(args.out), path, dtype, heldout, record=earlier or new)
    return CausalLM(model, eos, args, dtype), train_set, run


def main(argv: list[str] | None = None) -> int:
    """Plays, and writes the last iterate to final/ as one plain model."""
    try:
        args = parse("spin", sys.argv[1:] if argv is None else argv, Args, __doc__ or "")
        player, examples, run = setup(args)
    except (ValueError, OSError) as error:
        print(f"any_causal_lm.py: error: {error}", file=sys.stderr)
        return 2
    with record.locked(run.out), onednn.products():
        run.begin()
        spin.play(player, examples, run, spin.generate, spin.score, spin.train)
        storage.write_text(run.out / "metrics.svg", panels.plot(run.rows, str(run.out)))
        print(report.tables(run.rows))
        lora.merge(player.model)
        lora.remove_lora(player.model)
        player.model.save_pretrained(run.out / "final")
        transformers.AutoTokenizer.from_pretrained(run.start).save_pretrained(run.out / "final")
    return 0


if __name__ == "__main__":
    sys.exit(main())
