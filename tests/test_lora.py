"""lora.py against PEFT and transformers, and each promise of its docstrings."""

import copy
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora

RANK, ALPHA = 3, 7  # alpha / rank is not a power of two
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))  # (B, T)
# Two fp32 programs with the same sums, on logits of order 1, differ by some 1e-6 depending on the processor; a wrong
# scaling or a lost layer changes them by 1e-2 or more.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}
# x (W + BA) and x W + (x A) B are rounded at different places, in two blocks.
REORDERED = {"rtol": 1e-4, "atol": 2e-5}


def gpt_neo(dtype: torch.dtype = torch.float32) -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=4, max_position_embeddings=16, initializer_range=0.2, attention_dropout=0.0, embed_dropout=0.0,
        resid_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).to(dtype).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))


class Tied(nn.Module):
    """An embedding and a head that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(ids))


def randomize(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Gives every B a value, so that the adapters matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: nn.Module, targets: tuple[str, ...] = lora.DEFAULT_TARGETS, dropout: float = 0.0) -> nn.Module:
    lora.add_lora(model, RANK, ALPHA, dropout, targets, torch.Generator().manual_seed(3))
    return randomize(model)


def peft_model(model: nn.Module, targets: tuple[str, ...], **options: object) -> peft.PeftModel:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), **options)
    return randomize(peft.get_peft_model(model, config))


def copy_from_peft(model: nn.Module, reference: peft.PeftModel) -> None:
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, layer in lora.lora_layers(model):
            layer.lora_A.copy_(parameters[f"base_model.model.{name}.lora_A.default.weight"])
            layer.lora_B.copy_(parameters[f"base_model.model.{name}.lora_B.default.weight"])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in lora.lora_layers(model)}


def assert_untouched(model: nn.Module, before: nn.Module) -> None:
    assert repr(model) == repr(before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


# ---------------------------------------------------------------- adding and removing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_initial_model_is_unchanged_bit_for_bit(dtype: torch.dtype) -> None:
    model = gpt_neo(dtype)
    before = logits(model)
    lora.add_lora(model, RANK, ALPHA, dropout=0.5)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.train()), before)


def test_names_keys_and_trainable_parameters() -> None:
    model = gpt_neo()
    keys, parameters = model.state_dict().keys(), dict(model.named_parameters())
    names = lora.add_lora(model, RANK, ALPHA)
    assert len(names) == 12 and names[:2] == [f"transformer.h.0.attn.attention.{part}_proj" for part in "kv"]
    assert [name for name, _ in lora.lora_layers(model)] == names
    added = {f"{name}.lora_{part}" for name in names for part in "AB"}
    assert model.state_dict().keys() == keys | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())  # adopted, not copied


def test_a_name_matches_whole_components() -> None:
    model = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2), "a": nn.ModuleDict({"proj": nn.Linear(2, 2)})}
    )
    assert lora.add_lora(copy.deepcopy(model), 1, 1, targets=["proj"]) == ["proj", "a.proj"]
    assert lora.add_lora(copy.deepcopy(model), 1, 1, targets=["a.proj"]) == ["a.proj"]


def test_a_shared_layer_is_replaced_at_each_of_its_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    lora.add_lora(model, 1, 1, targets=["0"])
    assert isinstance(model[0], lora.LoRALinear) and model[0] is model[2]
    lora.remove_lora(model)
    assert type(model[0]) is nn.Linear and model[0] is model[2]


def test_a_is_drawn_by_the_generator_in_the_models_order() -> None:
    def a_of(targets: list[str], seed: int) -> list[Tensor]:
        model = gpt_neo()
        lora.add_lora(model, RANK, ALPHA, targets=targets, generator=torch.Generator().manual_seed(seed))
        return [layer.lora_A for _, layer in lora.lora_layers(model)]

    state = torch.get_rng_state()
    linear = nn.Linear(4, 4, device="meta")
    lora.LoRALinear(linear, 2, 2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = a_of(["q_proj", "c_fc"], 5), a_of(["c_fc", "q_proj"], 5), a_of(["q_proj", "c_fc"], 6)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cpu_generator_draws_the_same_on_the_gpu() -> None:
    drawn = [
        lora.LoRALinear(nn.Linear(6, 5, device=device), 2, 4, generator=torch.Generator().manual_seed(0)).lora_A
        for device in ("cpu", "cuda")
    ]
    assert drawn[1].is_cuda and torch.equal(drawn[0], drawn[1].cpu())


def test_initial_values() -> None:
    layer = lora.LoRALinear(nn.Linear(400, 300), 100, 1, generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(400)  # Kaiming uniform with a = sqrt(5): sqrt(6 / ((1 + 5) * in))
    assert layer.lora_A.abs().max() <= bound
    # 40,000 draws: the standard error of the standard deviation is below 0.3%
    torch.testing.assert_close(layer.lora_A.std().item(), bound / math.sqrt(3), rtol=0.01, atol=0)
    assert not layer.lora_B.any() and layer.lora_A.shape == (100, 400) and layer.lora_B.shape == (300, 100)


def test_adapters_are_fp32_over_a_bf16_base() -> None:
    model = gpt_neo(torch.bfloat16)
    lora.add_lora(model, RANK, ALPHA)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_carried_both_ways(training: bool) -> None:
    model = perceptron().train(training)
    lora.add_lora(model, 1, 1, targets=["0"])
    assert model[0].training is training
    lora.remove_lora(model)
    assert model[0].training is training


def test_remove_lora_without_merge_restores_the_model() -> None:
    model = gpt_neo()
    before, text, state = logits(model), repr(model), model.state_dict()
    lora.remove_lora(adapted(model))
    assert repr(model) == text and torch.equal(logits(model), before)
    after = model.state_dict()
    assert list(after) == list(state) and all(after[k].data_ptr() == v.data_ptr() for k, v in state.items())


def test_a_merged_and_removed_model_saves_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = adapted(gpt_neo())
    before = logits(model)
    lora.merge(model)
    lora.remove_lora(model)
    model.save_pretrained(tmp_path)
    loaded, report = GPTNeoForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded), before, **REORDERED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"dropout": -0.1}, "dropout = -0.1"),
        ({"targets": ["q_proj", "query"]}, "target 'query' matches no module of GPTNeoForCausalLM"),
        ({"targets": ["proj"]}, "target 'proj' matches no module"),
        ({"targets": ["wte"]}, "'transformer.wte' is a Embedding, not a plain nn.Linear"),
        ({"targets": []}, r"targets = \[\]"),
        ({"targets": "q_proj"}, "targets = 'q_proj'"),
    ],
)
def test_add_lora_refuses(options: dict[str, object], message: str) -> None:
    model = gpt_neo()
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, **({"rank": RANK, "alpha": ALPHA} | options))
    assert_untouched(model, gpt_neo())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=2)).eval()


def test_conv1d_equals_pefts(tmp_path: Path) -> None:
    """GPT-2's layers, whose weights are transposed: outputs, gradients, merge, and adapters in both directions."""
    targets = lora.linear_names(gpt2())
    assert targets == ["c_attn", "c_proj", "c_fc"]
    model, ids = gpt2(), torch.arange(12).view(2, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(ids).logits
    lora.add_lora(model, RANK, ALPHA, targets=targets)
    assert torch.equal(model(ids).logits, plain)
    for _, layer in lora.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.2)
    lora.save_adapter(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True).eval()
    for logits in (model(ids).logits, reference(ids).logits):
        logits.square().mean().backward()
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, **CLOSE)
    theirs = dict(reference.named_parameters())
    for name, layer in lora.lora_layers(model):
        gradient = theirs[f"base_model.model.{name}.lora_A.default.weight"].grad
        torch.testing.assert_close(layer.lora_A.grad, gradient, **CLOSE)
    reference.save_pretrained(tmp_path / "theirs")
    back = gpt2()
    lora.load_adapter(back, tmp_path / "theirs")
    assert torch.equal(back(ids).logits, model(ids).logits)
    lora.merge(model)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, **CLOSE)
    lora.unmerge(model)
    lora.remove_lora(model)
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("c_attn")} == {"Conv1D"}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, plain)


def test_a_target_that_is_not_there_is_told_the_usual_ones() -> None:
    usual = {gpt2: "c_attn, c_proj, c_fc", llama: "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"}
    for build, names in usual.items():
        with pytest.raises(ValueError, match=f"'query' matches no module of .*; the usual ones are {names}$"):
            lora.add_lora(build(), RANK, ALPHA, targets=["query"])


def test_a_subclass_that_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        lora.add_lora(nn.MultiheadAttention(8, 2), RANK, ALPHA, targets=["out_proj"])


@pytest.mark.parametrize("targets", [["q_proj"], ["c_fc"]])
def test_a_model_with_lora_is_refused(targets: list[str]) -> None:
    model = gpt_neo()
    lora.add_lora(model, RANK, ALPHA, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.attention.q_proj has LoRA already"):
        lora.add_lora(model, RANK, ALPHA, targets=targets)


# ---------------------------------------------------------------- forward and backward, against PEFT

FAMILIES = [(gpt_neo, lora.DEFAULT_TARGETS), (llama, ("q_proj", "v_proj"))]


@pytest.mark.parametrize(("build", "targets"), FAMILIES)
def test_logits_and_gradients_equal_pefts(build: Callable[[], nn.Module], targets: tuple[str, ...]) -> None:
    model, reference = build(), peft_model(build(), targets)
    lora.add_lora(model, RANK, ALPHA, targets=targets)
    copy_from_peft(model, reference)
    ours, theirs = model(IDS, labels=IDS), reference(IDS, labels=IDS)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    assert (ours.logits - logits(build())).abs().max() > 0.1  # the adapters matter
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(gradients)
    for name, gradient in trained:
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[f"base_model.model.{name}.default.weight"], **CLOSE)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_dropout_equal_pefts(dtype: torch.dtype, autocast: bool) -> None:
    model, reference = gpt_neo(dtype), peft_model(gpt_neo(dtype), lora.DEFAULT_TARGETS, lora_dropout=0.3)
    lora.add_lora(model, RANK, ALPHA, dropout=0.3)
    copy_from_peft(model, reference)
    base = gpt_neo(dtype)(IDS).logits.float()
    results = []
    for each in (model.train(), reference.train()):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(each(IDS).logits)
    ours, theirs = results
    assert ours.dtype == theirs.dtype
    # The sum is rounded at another place. Other dropout masks would change the adapters' share by more than half.
    tolerance = 0.1 if torch.bfloat16 in (dtype, ours.dtype) else 1e-5
    assert (ours.float() - theirs.float()).norm() <= tolerance * (theirs.float() - base).norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_dtype_is_the_base_layers_and_gradients_are_fp32(dtype: torch.dtype, autocast: bool) -> None:
    linear = nn.Linear(6, 5, dtype=dtype)
    layer = randomize(lora.LoRALinear(linear, 2, 4))
    x = torch.randn(3, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, base = layer(x), linear(x)
    assert output.dtype == base.dtype == (torch.bfloat16 if autocast else dtype)
    output.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    exact = linear(x).float() + 2 * x.float() @ (layer.lora_B @ layer.lora_A).T
    tolerance = 2e-2 if torch.bfloat16 in (dtype, output.dtype) else 1e-6  # a few roundings to 8 bits
    torch.testing.assert_close(output.float(), exact, rtol=tolerance, atol=tolerance)


def test_a_bf16_base_rounds_the_sum_and_the_small_product_only() -> None:
    """x (A^T) to 8 bits, and base and sum: three roundings, of which none is of the adapters themselves."""
    layer = randomize(lora.LoRALinear(nn.Linear(6, 5, dtype=torch.bfloat16), 2, 4))
    x = torch.randn(50, 6, dtype=torch.bfloat16)
    base = nn.functional.linear(x, layer.weight, layer.bias).float()
    update = 2 * ((x.float() @ layer.lora_A.T) @ layer.lora_B.T)
    largest = base.abs() + 2 * ((x.float() @ layer.lora_A.T).abs() @ layer.lora_B.abs().T)
    assert ((layer(x).float() - (base + update)).abs() <= 4 * 2**-9 * largest).all()


def test_a_plain_sequential_trains() -> None:
    model = perceptron()
    before = {name: p.clone() for name, p in model.named_parameters()}
    lora.add_lora(model, 2, 4, targets=["0", "2"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(64, 6)
    y, losses = x[:, :5], []
    for _ in range(50):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_dropout_acts_in_training_only_and_on_the_adapter_path_only() -> None:
    linear = nn.Linear(40, 30)
    layer = randomize(lora.LoRALinear(linear, 4, 4, dropout=0.5))
    x = torch.randn(8, 40)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    update = layer(x) - linear(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(update, dropped @ layer.lora_A.T @ layer.lora_B.T, **CLOSE)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, False)])
def test_no_random_numbers_are_drawn_without_dropout(dropout: float, training: bool) -> None:
    layer = lora.LoRALinear(nn.Linear(4, 4), 2, 2, dropout).train(training)
    state = torch.get_rng_state()
    layer(torch.randn(3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- switching off


def test_disabled_is_the_base_model_bit_for_bit() -> None:
    model = gpt_neo()
    base = logits(model)
    enabled = logits(adapted(model, dropout=0.5))
    assert not torch.equal(enabled, base)
    with lora.lora_disabled(model):
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(model.train()), base)
    assert torch.equal(logits(model.eval()), enabled)


def test_disabling_nests_survives_exceptions_and_restores_each_flag() -> None:
    model = adapted(perceptron(), ("0", "2"))
    model[2].enabled = False

    def flags() -> list[bool]:
        return [layer.enabled for _, layer in lora.lora_layers(model)]

    with lora.lora_disabled(model):
        with lora.lora_disabled(model):
            assert flags() == [False, False]
        assert flags() == [False, False]
    assert flags() == [True, False]
    with pytest.raises(KeyError), lora.lora_disabled(model):
        raise KeyError
    assert flags() == [True, False]


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_are_idempotent_and_restore_the_bits(dtype: torch.dtype) -> None:
    model = adapted(gpt_neo(dtype))
    before, unmerged, objects = weights(model), logits(model), [layer.weight for _, layer in lora.lora_layers(model)]
    lora.unmerge(model)
    assert all(map(torch.equal, weights(model).values(), before.values()))
    lora.merge(model)
    once, merged = weights(model), logits(model)
    lora.merge(model)
    assert all(map(torch.equal, weights(model).values(), once.values()))
    assert not any(map(torch.equal, once.values(), before.values()))
    for name, layer in lora.lora_layers(model):
        exact = before[name].double() + ALPHA / RANK * layer.lora_B.double() @ layer.lora_A.double()
        torch.testing.assert_close(
            once[name].double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
        assert once[name].dtype == dtype and not layer.weight.requires_grad
    # bf16: the merged weights are rounded to 8 bits, the sums of the unmerged forward are not
    torch.testing.assert_close(
        merged, unmerged, **(REORDERED if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2})
    )
    lora.unmerge(model)
    lora.unmerge(model)
    assert all(layer.weight is weight for (_, layer), weight in zip(lora.lora_layers(model), objects, strict=True))
    assert all(map(torch.equal, weights(model).values(), before.values()))
    assert torch.equal(logits(model), unmerged)


def test_a_bf16_merge_rounds_once_from_fp32_even_under_autocast() -> None:
    layer = randomize(lora.LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), 16, 32))
    exact = layer.weight.float() + 2.0 * (layer.lora_B @ layer.lora_A)
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge(layer)
    assert torch.equal(layer.weight, exact.bfloat16())


def test_a_bf16_merge_loses_updates_below_half_a_unit_in_the_last_place() -> None:
    linear = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(linear.weight)
    layer = lora.LoRALinear(linear, 1, 1)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    with torch.no_grad():
        layer.lora_A.copy_(signs)
        layer.lora_B.fill_(1 / 600)  # the next bf16 above 1 is 1 + 1/128, the one below it 1 - 1/256
    x = signs.bfloat16()  # the base output cancels
    assert layer(x).item() == pytest.approx(64 / 600, rel=2**-8)
    lora.merge(layer)
    assert torch.equal(layer.weight, torch.ones_like(layer.weight)) and layer(x).item() == 0
    lora.unmerge(layer)
    layer.float()
    lora.merge(layer)
    assert layer(signs).item() == pytest.approx(64 / 600, rel=1e-4)


def test_train_and_eval_neither_merge_nor_unmerge() -> None:
    model = adapted(gpt_neo())
    model.train().eval()
    assert not any(layer.merged for _, layer in lora.lora_layers(model))
    lora.merge(model)
    model.train()
    assert all(layer.merged for _, layer in lora.lora_layers(model))
    model.eval()
    assert all(layer.merged for _, layer in lora.lora_layers(model))


def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    model = adapted(Tied(), ("lm_head",))
    embedding, unmerged = model.embed.weight.clone(), model(IDS % 11)
    lora.merge(model)
    assert torch.equal(model.embed.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)
    torch.testing.assert_close(model(IDS % 11), unmerged, **REORDERED)
    lora.unmerge(model)
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, embedding)


def test_a_copied_or_cast_merged_model_unmerges_too() -> None:
    model = adapted(Tied(), ("lm_head",))
    lora.merge(model)
    model = copy.deepcopy(model).double()
    lora.unmerge(model)
    assert model.lm_head.weight is model.embed.weight and model.embed.weight.dtype == torch.float64


def test_merged_and_disabled_raises_and_says_what_to_do() -> None:
    model = adapted(perceptron(), ("0",))
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"call unmerge\(model\) first"), lora.lora_disabled(model):
        model(torch.ones(6))
    model(torch.ones(6))


def test_the_state_dict_of_a_merged_model_cannot_apply_the_update_twice() -> None:
    model, unmerged = adapted(perceptron(), ("0", "2")), adapted(perceptron(), ("0", "2"))
    plain = perceptron()
    lora.merge(model)
    state = model.state_dict()
    assert torch.equal(state["0.weight"], model[0].weight) and torch.equal(state["0.base_weight"], plain[0].weight)
    for other in (plain, unmerged):
        with pytest.raises(RuntimeError, match=r"0.base_weight"):
            other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0.base_weight"):
        model.load_state_dict(adapted(perceptron(), ("0", "2")).state_dict())
    lora.remove_lora(model)
    assert model.state_dict().keys() == plain.state_dict().keys()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("build", "targets"), FAMILIES)
def test_peft_loads_what_is_saved_here(
    build: Callable[[], nn.Module], targets: tuple[str, ...], tmp_path: Path
) -> None:
    model = adapted(build(), targets)
    lora.save_adapter(model, tmp_path, "some/base")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    reference = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(reference), logits(model), **CLOSE)
    config = reference.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, ALPHA, "some/base")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(("build", "targets"), FAMILIES)
def test_what_peft_saves_loads_here(
    build: Callable[[], nn.Module], targets: tuple[str, ...], task_type: str | None, tmp_path: Path
) -> None:
    reference = peft_model(build(), targets, lora_dropout=0.25, task_type=task_type).eval()
    reference.save_pretrained(tmp_path)
    model = build()
    lora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    assert {layer.dropout for _, layer in lora.lora_layers(model)} == {0.25}
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}


def test_peft_loads_the_adapter_of_a_plain_sequential(tmp_path: Path) -> None:
    model = adapted(perceptron(), ("0", "2"))
    lora.save_adapter(model, tmp_path)
    x = torch.randn(3, 6)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(perceptron(), tmp_path)(x), model(x), **CLOSE)


@pytest.mark.parametrize("merged", [False, True])
def test_round_trip_is_exact_and_overwrites(merged: bool, tmp_path: Path) -> None:
    model, other = adapted(gpt_neo(torch.bfloat16), dropout=0.1), gpt_neo(torch.bfloat16)
    lora.save_adapter(randomize(adapted(gpt_neo()), 2.0), tmp_path / "deep" / "folder")
    expected = logits(model)
    if merged:
        lora.merge(model)
    lora.save_adapter(model, tmp_path / "deep" / "folder")
    lora.load_adapter(other, tmp_path / "deep" / "folder")  # adds
    assert torch.equal(logits(other), expected)
    randomize(other, 2.0)
    lora.load_adapter(other, tmp_path / "deep" / "folder")  # fills
    assert torch.equal(logits(other), expected)
    assert {layer.lora_A.dtype for _, layer in lora.lora_layers(other)} == {torch.float32}


def test_a_bf16_file_loads_into_the_fp32_parameters_that_an_optimizer_may_hold(tmp_path: Path) -> None:
    model = adapted(gpt_neo())
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [p.detach().bfloat16().float() for p in parameters]
    lora.load_adapter(randomize(model, 2.0), tmp_path)
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    assert all(map(torch.equal, parameters, expected)) and {p.dtype for p in parameters} == {torch.float32}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}  # a directory would be an error


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_files(
    place: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At that moment all that is new lies in a directory .tmp-*, which is what a killed process leaves."""
    model = adapted(gpt_neo())
    lora.save_adapter(model, tmp_path)
    before, seen = contents(tmp_path), []

    def interrupted(*_: object) -> None:
        seen.extend(os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(os, place, interrupted)
    with pytest.raises(type(error), match="cannot be written .disk full" if isinstance(error, OSError) else None):
        lora.save_adapter(randomize(model, 2.0), tmp_path)
    (new,) = set(seen) - before.keys()
    assert new.startswith(".tmp-") and len(new) > 10
    assert contents(tmp_path) == before


def test_files_are_synced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle)))
    lora.save_adapter(adapted(perceptron(), ("0",)), tmp_path)
    assert sorted(sizes) == sorted(len(content) for content in contents(tmp_path).values())


def test_planted_links_are_not_followed_and_modes_are_the_umasks(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("precious")
    folder.mkdir()
    names = ["adapter_config.json", "adapter_model.safetensors"]
    for name in [*names, *(f"{name}.tmp" for name in names)]:
        (folder / name).symlink_to(victim)
    umask = os.umask(0o027)
    try:
        lora.save_adapter(adapted(gpt_neo()), folder)
    finally:
        os.umask(umask)
    assert victim.read_text() == "precious"
    for name in names:
        assert not (folder / name).is_symlink() and (folder / name).stat().st_mode & 0o777 == 0o640
    lora.load_adapter(gpt_neo(), folder)


@pytest.mark.parametrize("present", [False, True])
def test_a_loaded_adapter_outlives_its_file(present: bool, tmp_path: Path) -> None:
    original, model = adapted(gpt_neo()), gpt_neo()
    if present:
        lora.add_lora(model, RANK, ALPHA)
    lora.save_adapter(original, tmp_path)
    lora.load_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(b"\x55" * file.stat().st_size)
    assert torch.equal(logits(model), logits(original))
    os.truncate(file, 0)
    assert torch.equal(logits(model), logits(original))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_only_regular_files_are_opened(name: str, tmp_path: Path) -> None:
    """Not a device, a directory or a pipe, to which opening it would wait for a writer."""
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    file = tmp_path / name
    file.unlink()
    for make in (lambda path: path.symlink_to("/dev/null"), Path.mkdir, os.mkfifo):
        make(file)
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            lora.load_adapter(gpt_neo(), tmp_path)
        file.rmdir() if file.is_dir() else file.unlink()


def test_files_of_absurd_size_are_refused_unread(tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole = config.read_bytes()
    os.truncate(config, 2**20 + 1)
    with pytest.raises(ValueError, match=r"adapter_config.json: 1048577 bytes, expected at most 1048576"):
        lora.load_adapter(gpt_neo(), tmp_path)
    config.write_bytes(whole)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + 2**40)  # 1 TB of holes
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: missing .* unexpected \[\('x', \(274877906944,"):
        lora.load_adapter(gpt_neo(), tmp_path)


def test_messages_quote_little_of_what_files_hold(tmp_path: Path) -> None:
    """Values, names and keys of half a megabyte; nothing breaks the line, and no value takes long to refuse."""
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    fields, tensors, long = json.loads(config.read_text()), load_file(file), "x\n" * 150_000
    nested = "[" * 800 + "]" * 800
    messages = []

    def refuse(model: nn.Module) -> None:
        with pytest.raises(ValueError) as error:
            lora.load_adapter(model, tmp_path)
        messages.append(str(error.value))

    changes = [{name: [long]} for name in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type", "unknown")]
    changes += [{"target_modules": long}, {long: 1}, {"r": 10**4000}]
    start = time.perf_counter()
    for change in changes:
        config.write_text(json.dumps(fields | change))
        refuse(gpt_neo())
        refuse(adapted(gpt_neo()))
    for names in ([long], [f"{i}" for i in range(100_000)]):
        config.write_text(json.dumps(fields | {"target_modules": names}))
        refuse(gpt_neo())
    config.write_text(json.dumps(fields)[:-1] + f', "unknown": {nested}}}')
    refuse(gpt_neo())
    config.write_text(json.dumps(fields))
    for other in (tensors | {long: torch.ones(1)}, {"x": torch.ones(1)}):
        save_file(other, file)
        refuse(gpt_neo())
    file.write_bytes(save({"x": torch.ones(1)}).replace(b'"F32"', json.dumps(long).encode()))
    refuse(gpt_neo())
    header = json.dumps({long: long}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    refuse(gpt_neo())
    assert time.perf_counter() - start < 30
    for message in messages:
        assert len(message) < 700 + len(str(tmp_path)) and "\n" not in message


def test_lack_of_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    for error in (MemoryError("Cannot allocate memory (os error 12)"), RuntimeError("can't allocate memory")):
        for name in ("safe_open", "load_file"):

            def fail(*_: object, error: Exception = error, **__: object) -> None:
                raise error

            with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
                patch.setattr(lora, name, fail)
                lora.load_adapter(gpt_neo(), tmp_path)
            assert raised.value is error


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_only_floats_of_16_bits_or_more_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] = tensors[next(iter(tensors))].to(dtype)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds other numbers than floating-point ones"):
        lora.load_adapter(gpt_neo(), tmp_path)


def test_save_adapter_refuses_a_model_without_or_with_uneven_lora(tmp_path: Path) -> None:
    model = perceptron()
    with pytest.raises(ValueError, match=r"found \[\]"):
        lora.save_adapter(model, tmp_path)
    model[0], model[2] = lora.LoRALinear(model[0], 1, 2), lora.LoRALinear(model[2], 2, 2)
    with pytest.raises(ValueError, match=r"found \[\(1, 2, 0.0\), \(2, 2, 0.0\)\]"):
        lora.save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("bias", "all"),
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("exclude_modules", ["lm_head"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3]),
        ("an_option_of_the_future", 1),
        ("target_modules", "all-linear"),
        ("target_modules", r".*q_proj"),
        ("target_modules", None),
        ("r", None),
        ("r", "8"),
        ("r", 0),
        ("r", 2**31),
        ("lora_alpha", None),
        ("lora_alpha", 2**31),
        ("lora_alpha", -math.inf),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", False),
        ("target_modules", ["q_proj", 3]),
    ],
)
def test_config_that_cannot_be_honoured_is_refused(field: str, value: object, tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    model = gpt_neo()
    with pytest.raises(ValueError) as error:
        lora.load_adapter(model, tmp_path)
    assert str(error.value) == f"{file}: {field!r} = {value!r} is not supported"
    assert_untouched(model, gpt_neo())


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"])
def test_config_without_a_needed_field_is_refused(field: str, tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != field}))
    with pytest.raises(ValueError, match=f"adapter_config.json: '{field}' = None is not supported"):
        lora.load_adapter(gpt_neo(), tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    for name, message in (("adapter_model.safetensors", "damaged"), ("adapter_config.json", "not a JSON object")):
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 7, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=rf"{name}: {message}"):
                lora.load_adapter(gpt_neo(), tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            lora.load_adapter(gpt_neo(), tmp_path)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        lora.load_adapter(gpt_neo(), tmp_path)


@pytest.mark.parametrize("present", [False, True])
def test_tensors_that_do_not_fit_are_named(present: bool, tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    whole = load_file(file)
    cases = {
        f"missing .*{key}.*unexpected .*extra": {"extra" if k == key else k: v for k, v in whole.items()},
        rf"missing \[\('{key}', \(128, 3\)\)\], unexpected \[\('{key}', \(3, 128\)\)\]": whole
        | {key: torch.ones(3, 128)},
        rf"missing \[\('{key}', \(128, 3\)\)\], unexpected \[\]": {k: v for k, v in whole.items() if k != key},
        r"missing \[\], unexpected \[\('extra', \(1,\)\)\]": whole | {"extra": torch.ones(1)},
    }
    model = adapted(gpt_neo()) if present else gpt_neo()
    before, state = copy.deepcopy(model), logits(model)
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"adapter_model.safetensors: {message}"):
            lora.load_adapter(model, tmp_path)
    assert_untouched(model, before)
    assert torch.equal(logits(model), state)


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo(), ("q_proj",)), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: target .* matches no module of LlamaForCausalLM"):
        lora.load_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"missing .*v_proj"):
        lora.load_adapter(adapted(gpt_neo(), ("q_proj", "v_proj")), tmp_path)
    with pytest.raises(ValueError, match=r"missing .*v_proj.* unexpected .*q_proj"):
        lora.load_adapter(adapted(gpt_neo(), ("v_proj",)), tmp_path)


def test_lora_already_there_must_agree_and_be_unmerged(tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo()), tmp_path)
    for rank, alpha in ((RANK + 1, ALPHA), (RANK, ALPHA + 1)):
        model = gpt_neo()
        lora.add_lora(model, rank, alpha)
        with pytest.raises(ValueError, match=f"rank 3, alpha 7; .*k_proj has rank {rank}, alpha {alpha}"):
            lora.load_adapter(model, tmp_path)
    model = adapted(gpt_neo())
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"call unmerge\(model\) first"):
        lora.load_adapter(model, tmp_path)


# ---------------------------------------------------------------- vendoring


def test_the_file_alone_imports_and_runs_elsewhere(tmp_path: Path) -> None:
    shutil.copy(lora.__file__, tmp_path / "lora.py")
    program = (
        "import sys, torch; state = torch.get_rng_state(); import lora; "
        "assert torch.equal(torch.get_rng_state(), state); "
        "assert not {'peft', 'transformers', 'model', 'spin'} & sys.modules.keys(); "
        "model = torch.nn.Sequential(torch.nn.Linear(3, 2)); lora.add_lora(model, 1, 2, targets=['0']); "
        "lora.save_adapter(model, 'adapter'); lora.load_adapter(model, 'adapter')"
    )
    command = [sys.executable, "-c", program]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["adapter", "lora.py"]
