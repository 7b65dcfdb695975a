"""spin.train and family.train against TRL's DPOTrainer with PEFT, sft.py against its SFTTrainer: the same losses."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import random_model, rows
from tokenizers import Tokenizer, models
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast

import lora
import sft
import spin
from methods import family
from model import GPTNeo
from spin import Pair, SpinOptions

pytest.importorskip("trl")
from generation_cases import in_transformers
from training_cases import our_run, trl_trainer

SETTINGS = dict(batch=4, lr=3e-3)


def tiny() -> GPTNeo:
    return random_model(97, 96, hidden_size=32, num_heads=4, window_size=8, initializer_range=0.1)


def random_pairs(count: int) -> list[Pair]:
    """Pairs of ragged lengths, some beyond the local window."""
    rng = torch.Generator().manual_seed(1)

    def ids(longest: int) -> list[int]:
        count = int(torch.randint(1, longest, (), generator=rng))
        return torch.randint(96, (count,), generator=rng).tolist()

    return [Pair(ids(20), [*ids(20), 96], [[*ids(20), 96]], True) for _ in range(count)]


def theirs(pairs: list[Pair], **options) -> tuple[GPTNeo, list[float]]:
    """The losses of TRL's trainer, and our model with the adapters that theirs began with."""
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl_trainer(
            in_transformers(model), pairs, rank=4, alpha=8, targets=list(lora.DEFAULT_TARGETS), **SETTINGS, **options
        )
        names = lora.add_lora(model, 4, 8)
        layers = dict(trainer.model.named_modules())
        for name in names:
            layer = layers[f"base_model.model.{name}"]
            model.get_submodule(name).lora_A.data.copy_(layer.lora_A["default"].weight)
            assert not layer.lora_B["default"].weight.any()
        trainer.train()
    return model, [loss.item() for loss in trainer.losses]


def ours(model: GPTNeo, pairs: list[Pair], monkeypatch, **options) -> list[float]:
    """The losses of spin.train, or with a `loss` those of family.train."""
    train, args_class = (family.train, family.FamilyOptions) if "loss" in options else (spin.train, SpinOptions)
    settings = dict(batch=4, lr=(3e-3,), micro_tokens=100, rank=4, lora_alpha=8.0)
    player, run = our_run(model, False, args_class, **settings, **options)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    spin.score(player, pairs, run)
    train(player, pairs, 0, run)
    return [row["loss"] for row in rows(run.folder.path / "steps-0.jsonl")]


def test_the_first_20_losses_equal_trls(monkeypatch):
    """Losses in fp32, LoRA from the same A, agree within 1e-4 relative. TRL scores with the reference in each step."""
    pairs = random_pairs(80)
    model, expected = theirs(pairs, precompute=False, beta=0.5)
    losses = ours(model, pairs, monkeypatch, beta=(0.5,))
    assert len(losses) == 20
    assert min(losses) < 0.9 * losses[0], "the player learnt little: equal losses would mean little"
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name, trls, beta, factor", [("hinge", "hinge", 0.5, 1), ("ipo", "ipo", 2.0, 1), ("sppo", "sppo_hard", 0.5, 2)]
)
def test_other_losses_equal_trls(monkeypatch, name, trls, beta, factor):
    """Six steps follow TRL's scoring. TRL's SPPO is the sum over both responses, ours (and the authors') half of it."""
    pairs = random_pairs(24)
    model, expected = theirs(pairs, precompute=True, beta=beta, loss=trls)
    losses = ours(model, pairs, monkeypatch, beta=(beta,), loss=name)
    assert len(losses) == 6 and max(losses) / min(losses) > 1.02
    assert [factor * loss for loss in losses] == pytest.approx(expected, rel=1e-4)


def test_losses_of_dynamic_fine_tuning_equal_trls(monkeypatch, tmp_path):
    """Ten steps train all parameters. TRL divides by the tokens of the batch, so here all responses have as many."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    losses = []

    class Trainer(SFTTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # The dataset already holds token ids.

        def compute_loss(self, *args, **kwargs):
            losses.append(super().compute_loss(*args, **kwargs))
            return losses[-1]

    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    pairs = [replace(pair, real_ids=[*([7, 8, 9] + pair.real_ids * 6)[:5], 96]) for pair in random_pairs(40)]
    records = [dict(input_ids=p.prompt_ids + p.real_ids, labels=[-100] * len(p.prompt_ids) + p.real_ids) for p in pairs]
    model = tiny()
    config = SFTConfig(
        str(tmp_path), loss_type="dft", per_device_train_batch_size=4, num_train_epochs=1,
        learning_rate=3e-3, warmup_steps=0, weight_decay=0, report_to=[], disable_tqdm=True, save_strategy="no",
        use_cpu=True, gradient_checkpointing=False, max_length=None, bf16=False,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 96}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    theirs = in_transformers(copy.deepcopy(model))
    Trainer(model=theirs, args=config, train_dataset=Dataset.from_list(records), processing_class=tokenizer).train()
    player, run = our_run(model, False, sft.SftOptions, batch=4, lr=(3e-3,), micro_tokens=100, rank=0, loss="dft")
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    spin.optimize(player, pairs, sft.token_loss(player, pairs, "dft"), 0, run)
    ours = [row["loss"] for row in rows(run.folder.path / "steps-0.jsonl")]
    assert len(ours) == 10 and max(ours) / min(ours) > 1.02
    assert ours == pytest.approx([loss.item() for loss in losses], rel=1e-4)
