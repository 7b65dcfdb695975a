"""Training and scoring: spin.py beside TRL and PEFT on the same weights, pairs and settings."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Case, Ways, ours
from generation_cases import BF16, CONFIGS, FP32, gsm8k_like, in_transformers, random_model

import lora
import spin
from model import GPTNeo, LanguageModel
from player import Player
from runtime.folder import Folder
from runtime.options import combined
from runtime.run import Run
from runtime.weights import Weights
from runtime.work import Work
from spin import Pair, SpinOptions

RANK, ALPHA = 16, 32.0
BETA, LR = 0.1, 5e-5


def random_pairs(count: int, longest: int, eos: int) -> list[Pair]:
    """Pairs with GSM8K's lengths: the generated response is as long as another record's real one."""
    prompts, lengths = gsm8k_like(count, longest)
    rng = torch.Generator().manual_seed(1)
    pairs = []
    for i, prompt in enumerate(prompts):
        real, generated = (torch.randint(1000, (lengths[j] - 1,), generator=rng).tolist() for j in (i, i - 1))
        pairs.append(Pair(prompt, [*real, eos], [[*generated, eos]], True))
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
            return dataset  # The dataset already holds token ids.

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


def parts(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    count: int,
    longest: int = 256,
    rank: int = RANK,
    **options: Any,
) -> tuple[Player, Run, list[Pair], Callable[[], Any]]:
    """Our player with adapters, its run, pairs, and a function that makes transformers' model with the same weights."""

    def model() -> LanguageModel:
        return random_model(CONFIGS[shape], dtype, device)

    mine = model()
    if rank:
        lora.add_lora(mine, rank, ALPHA, targets=lora.linear_names(mine))
    player, run = our_run(mine, dtype == BF16, beta=(BETA,), lr=(LR,), **options)
    return player, run, random_pairs(count, longest, player.eos_token_id), lambda: in_transformers(model())


def peer_trainer(other: Any, player: Player, pairs: list[Pair], batch: int, precompute: bool) -> Any:
    """Trainer with the settings of `parts`. On a GPU 32 pairs at once would need more than 80 GB at the 1.3B shape."""
    return trl_trainer(
        other, pairs, precompute=precompute, batch=batch, micro=min(batch, 8) if other.device.type == "cuda" else None,
        beta=BETA, lr=LR, rank=RANK, alpha=ALPHA, targets=lora.linear_names(player.model), bf16=other.dtype == BF16,
    )  # fmt: skip


def step(shape: str, dtype: torch.dtype, count: int, batch: int, estimate: float = 0.0, extra: bool = False) -> Case:
    """One pass of LoRA training over `count` pairs, without and with the opponent's log-probabilities."""

    def build(device: torch.device) -> Ways:
        player, run, pairs, peer = parts(shape, dtype, device, count, batch=batch)

        def train(scored: bool = False, tokens: int = player.micro_tokens) -> None:
            player.micro_tokens = tokens
            if scored:
                spin.score(player, pairs, run)
            spin.train(player, pairs, 0, run)

        spin.score(player, pairs, run)
        calls = ours(train, device)
        calls["ours, opponent scored too"] = partial(calls["ours"], True)
        if device.type == "cuda":  # This way shows whether the default is too small for a large GPU.
            calls["ours, four times the tokens per pass"] = partial(train, tokens=4 * player.micro_tokens)
        peers = {
            "TRL, reference precomputed before": lambda: peer_trainer(peer(), player, pairs, batch, True).train,
            "TRL, reference in each step": lambda: peer_trainer(peer(), player, pairs, batch, False).train,
        }
        return Ways(calls, peers, (count, "pairs"), rounds=3)

    name = f"training: LoRA on the {shape} shape, {str(dtype).removeprefix('torch.')}, {count} pairs with GSM8K's "
    return Case(name + f"lengths, {batch} a step", build, estimate, extra)


def scoring(shape: str, dtype: torch.dtype, count: int) -> Case:
    """Log-probabilities of both responses of `count` pairs, without gradient."""

    def build(device: torch.device) -> Ways:
        player, run, pairs, peer = parts(shape, dtype, device, count)
        calls = ours(partial(spin.score, player, pairs, run), device)
        peers = {"transformers": lambda: transformers_scores(peer(), pairs, player.micro_tokens)}
        return Ways(calls, peers, (count, "pairs"), rounds=3)

    name = f"scoring: {shape} shape, {str(dtype).removeprefix('torch.')}, {count} pairs with GSM8K's lengths"
    return Case(name, build)


def transformers_scores(model: Any, pairs: list[Pair], micro_tokens: int) -> Callable:
    """The model of transformers on rows of like length, padded on the right, and log_softmax of their responses."""
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in pair.responses]
    rows.sort(key=lambda row: len(row[0] + row[1]))

    @torch.no_grad()
    def score() -> list[float]:
        sums, left = [], list(rows)
        while left:
            width = len(left[-1][0] + left[-1][1])
            some, left = left[-(micro_tokens // width or 1) :], left[: -(micro_tokens // width or 1)]
            ids = torch.tensor([p + r + [0] * (width - len(p + r)) for p, r in some], device=model.device)
            logits = model(ids, use_cache=False).logits
            for row, (prompt, response) in zip(logits, some, strict=True):
                of_response = row[len(prompt) - 1 : len(prompt + response) - 1].float().log_softmax(-1)
                sums.append(of_response.gather(1, torch.tensor(response, device=model.device)[:, None]).sum())
        return torch.stack(sums).tolist()

    return score


CASES = {
    "quick": [step("tiny", FP32, 8, 4), scoring("tiny", FP32, 8)],
    "cpu": [step("125M", FP32, 8, 4), step("SmolLM2", FP32, 8, 4), scoring("SmolLM2", FP32, 16)],
    "cuda": [
        step("1.3B", BF16, 64, 32, estimate=60),
        step("125M", BF16, 64, 32, estimate=35),
        step("2.7B", BF16, 32, 8, estimate=80, extra=True),
        step("2.7B", BF16, 32, 16, estimate=80, extra=True),
    ],
}
