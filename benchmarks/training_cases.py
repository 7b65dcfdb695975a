"""Training and scoring: spin.py beside TRL and PEFT on the same weights, pairs and settings."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Case, Ways, optional, ours
from generation_cases import config_of, gsm8k_like, in_transformers, random_model

import lora
import spin
from model import GPTNeo
from player import Player
from runtime.folder import Folder
from runtime.options import combined
from runtime.run import Run
from runtime.weights import Weights
from runtime.work import Work
from spin import Pair, SpinOptions

RANK, ALPHA = 16, 32.0
BETA, LR = 0.1, 5e-5


def random_pairs(count: int, longest: int, eos: int = 50256) -> list[Pair]:
    """Pairs with GSM8K's lengths: the generated response is as long as another record's real one."""
    prompts, lengths = gsm8k_like(count, longest)
    rng = torch.Generator().manual_seed(1)
    pairs = []
    for i, prompt in enumerate(prompts):
        real, generated = (
            torch.randint(1000, (n - 1,), generator=rng).tolist() + [eos] for n in (lengths[i], lengths[i - 1])
        )
        pairs.append(Pair(prompt, real, [generated], True))
    return pairs


def our_run(model: GPTNeo, bf16: bool, options_class: type = SpinOptions, **options: Any) -> tuple[Player, Run]:
    """The model as a player, and a run that writes no checkpoints, in a temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="bench-"))
    args = combined(options_class)(**{"iterations": 1, "epochs": 1, "warmup": 0.0, "out": str(path)} | options)
    dtype = torch.bfloat16 if bf16 else torch.float32
    player = Player(model, model.config.eos_token_id, args, dtype)
    folder, eos = Folder(path), player.eos_token_id
    weights = Weights(args, None, None, path, None, {}, folder, dtype)
    return player, Run(args, Work(args, None, eos, []), folder, weights, player.device, {})


def trl_trainer(model: Any, pairs: list[Pair], *, batch: int, beta: float, lr: float, precompute: bool,
                rank: int, alpha: float, targets: list[str], bf16: bool = False,
                loss: str = "sigmoid", micro: int | None = None) -> Any:  # fmt: skip
    """TRL's DPOTrainer over the pairs in their order, with new PEFT adapters, constant data and no logging.

    `micro`: pairs computed at once, all of a batch by default.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        losses: list[float]

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # already token ids

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._compute_loss(*args, **kwargs)
            self.losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<eos>": model.config.eos_token_id}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-"), per_device_train_batch_size=micro or batch, num_train_epochs=1,
        gradient_accumulation_steps=batch // (micro or batch),
        beta=beta, loss_type=[loss],
        learning_rate=lr, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0, optim="adamw_torch",
        precompute_ref_log_probs=precompute, max_length=None, bf16=bf16, gradient_checkpointing=False,
        report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no", use_cpu=model.device.type == "cpu",
    )  # fmt: skip
    data = Dataset.from_list(
        [{"prompt_ids": p.prompt_ids, "chosen_ids": p.real_ids, "rejected_ids": p.generated_ids[0]} for p in pairs]
    )
    peft = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft)
    trainer.losses = []
    return trainer


def parts(shape: str, dtype: torch.dtype, device: torch.device, count: int, longest: int = 256, **options: Any) -> Any:
    """(our player, transformers' model on the same weights or None, pairs, our run, notes with the reason for None)."""
    model = random_model(config_of(shape), dtype, device)
    other, notes = None, {}
    with optional(notes, "transformers"):
        other = in_transformers(model)
    lora.add_lora(model, RANK, ALPHA, targets=lora.linear_names(model))
    player, run = our_run(model, dtype == torch.bfloat16, beta=(BETA,), lr=(LR,), **options)
    return player, other, random_pairs(count, longest, player.eos_token_id), run, notes


def peer_settings(model: torch.nn.Module, dtype: torch.dtype, device: torch.device, batch: int) -> dict[str, Any]:
    """For trl_trainer, as `parts` sets ours. On a GPU 32 pairs at once would need more than 80 GB at the 1.3B shape."""
    settings = dict(batch=batch, beta=BETA, lr=LR, rank=RANK, alpha=ALPHA, targets=lora.linear_names(model))
    return settings | dict(bf16=dtype == torch.bfloat16, micro=min(batch, 8) if device.type == "cuda" else None)


def step_case(estimate: float, shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int) -> Case:
    """One pass of LoRA training over `count` pairs, without and with the opponent's log-probabilities."""
    name = f"training: LoRA on the {shape} shape, {str(dtype).removeprefix('torch.')}, {count} pairs with GSM8K's "
    build = partial(step_ways, shape, dtype, device, count, batch)
    return Case(name + f"lengths, {batch} a step", build, estimate=estimate)


def step_ways(shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int) -> Ways:
    player, other, pairs, run, notes = parts(shape, dtype, device, count, batch=batch)

    def train(with_scores: bool = False) -> None:
        if with_scores:
            spin.score(player, pairs, run)
        spin.train(player, pairs, 0, run)

    def train_at_once() -> None:
        player.micro_tokens *= 4
        train()
        player.micro_tokens //= 4

    spin.score(player, pairs, run)
    ways = ours(train, device)
    if device.type == "cuda":  # whether the default is too small for a large GPU
        ways["ours, four times the tokens per pass"] = train_at_once
    settings = peer_settings(player.model, dtype, device, batch)
    with optional(notes, "TRL, reference precomputed before"):
        first = trl_trainer(other, pairs, precompute=True, **settings)
        ways["TRL, reference precomputed before"] = first.train
    ways["ours, opponent scored too"] = partial(ways["ours"], True)
    with optional(notes, "TRL, reference in each step"):
        another = in_transformers(random_model(config_of(shape), dtype, device))
        second = trl_trainer(another, pairs, precompute=False, **settings)
        ways["TRL, reference in each step"] = second.train
    return Ways(ways, notes, dict.fromkeys(ways, (count, "pairs")), rounds=3)


def scoring_case(estimate: float, shape: str, dtype: torch.dtype, device: torch.device, count: int) -> Case:
    """Log-probabilities of both responses of `count` pairs, without gradient."""
    name = f"scoring: {shape} shape, {str(dtype).removeprefix('torch.')}, {count} pairs with GSM8K's lengths"
    return Case(name, partial(scoring_ways, shape, dtype, device, count), estimate=estimate)


def scoring_ways(shape: str, dtype: torch.dtype, device: torch.device, count: int) -> Ways:
    player, other, pairs, run, notes = parts(shape, dtype, device, count)
    ways = ours(partial(spin.score, player, pairs, run), device)
    if other is not None:
        ways["transformers"] = transformers_scores(other, pairs, player.micro_tokens, device)
    return Ways(ways, notes, dict.fromkeys(ways, (count, "pairs")), rounds=3)


def transformers_scores(model: Any, pairs: list[Pair], micro_tokens: int, device: torch.device) -> Callable:
    """The model of transformers on rows of like length, padded on the right, and log_softmax of their responses."""
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in pair.responses]
    rows.sort(key=lambda row: len(row[0] + row[1]))

    @torch.no_grad()
    def score() -> list[float]:
        sums, left = [], list(rows)
        while left:
            width = len(left[-1][0] + left[-1][1])
            some, left = left[-(micro_tokens // width or 1) :], left[: -(micro_tokens // width or 1)]
            ids = torch.tensor([p + r + [0] * (width - len(p + r)) for p, r in some], device=device)
            logits = model(ids, use_cache=False).logits
            for row, (prompt, response) in zip(logits, some, strict=True):
                of_response = row[len(prompt) - 1 : len(prompt + response) - 1].float().log_softmax(-1)
                sums.append(of_response.gather(1, torch.tensor(response, device=device)[:, None]).sum())
        return torch.stack(sums).tolist()

    return score


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        return [step_case(0, "tiny", fp32, device, 8, 4), scoring_case(0, "tiny", fp32, device, 8)]
    if device.type == "cpu":
        steps = [step_case(0, shape, fp32, device, 8, 4) for shape in ("125M", "SmolLM2")]
        return [*steps, scoring_case(0, "SmolLM2", fp32, device, 16)]
    large = [replace(step_case(80, "2.7B", bf16, device, 32, batch), extra=True) for batch in (8, 16)]
    return [step_case(60, "1.3B", bf16, device, 64, 32), step_case(35, "125M", bf16, device, 64, 32), *large]
