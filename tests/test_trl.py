"""spin.train against TRL's DPOTrainer with PEFT: the same losses on the same pairs in the same order."""

import json
import warnings

import pytest
import torch

import lora
import spin
from model import GPTNeo, GPTNeoConfig

pytest.importorskip("trl")
from generation_cases import in_transformers
from training_cases import our_run, trl_trainer


def test_the_first_20_losses_equal_trls(monkeypatch):
    """fp32, LoRA from the same A, ragged pairs beyond the local window: within 1e-4 relative, precomputed or not."""
    config = GPTNeoConfig(
        vocab_size=97, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
        attention_types=((("global", "local"), 1),), initializer_range=0.1, bos_token_id=96, eos_token_id=96,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(1)

    def ids(longest: int) -> list[int]:
        count = int(torch.randint(1, longest, (), generator=rng))
        return torch.randint(96, (count,), generator=rng).tolist()

    pairs = [spin.Pair(ids(20), [*ids(20), 96], [*ids(20), 96], True) for _ in range(80)]
    settings = dict(batch=4, beta=0.5, lr=3e-3)
    losses = []
    for precompute in (True, False):
        model = GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trl_trainer(
                in_transformers(model), pairs, precompute=precompute, rank=4, alpha=8,
                targets=list(lora.DEFAULT_TARGETS),
                **settings,
            )  # fmt: skip
            names = lora.add_lora(model, 4, 8)
            theirs = dict(trainer.model.named_modules())
            for name in names:
                layer = theirs[f"base_model.model.{name}"]
                model.get_submodule(name).lora_A.data.copy_(layer.lora_A["default"].weight)
                assert not layer.lora_B["default"].weight.any()
            trainer.train()
        losses.append([loss.item() for loss in trainer.losses])
    run = our_run(
        model, torch.device("cpu"), False, batch=4, beta=(0.5,), lr=(3e-3,), micro_tokens=100, rank=4, alpha=8.0
    )
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    spin.score(model, pairs, run)
    spin.train(model, pairs, 0, run)
    ours = [row["loss"] for row in map(json.loads, (run.out / "steps-0.jsonl").read_text().splitlines())]
    assert len(ours) == len(losses[0]) == 20
    assert min(ours) < 0.9 * ours[0], "the player learnt little: equal losses would mean little"
    for theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-4)
