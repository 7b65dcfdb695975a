"""lora.py against PEFT and transformers, and each promise of its docstrings."""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

import lora

RANK, ALPHA = 3, 7  # alpha / rank is not a power of two
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))  # (B, T)
# Logits of order 1 from two fp32 programs with the same sums differ by about 1e-6, depending on the processor; a wrong
# scaling or a lost layer changes them by 1e-2 or more.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}
# x (W + BA) and x W + (x A) B are rounded at different places.
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


# ---------------------------------------------------------------- adding and removing


def test_names_keys_dtypes_and_trainable_parameters_of_a_model_that_is_unchanged_at_first() -> None:
    model = gpt_neo(torch.bfloat16)
    before = logits(model)
    keys, parameters = model.state_dict().keys(), dict(model.named_parameters())
    names = lora.add_lora(model, RANK, ALPHA)
    assert len(names) == 12 and names[:2] == [f"transformer.h.0.attn.attention.{part}_proj" for part in "kv"]
    assert [name for name, _ in lora.lora_layers(model)] == names
    added = {f"{name}.lora_{part}" for name in names for part in "AB"}
    assert model.state_dict().keys() == keys | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == added
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())  # adopted, not copied
    assert torch.equal(logits(model), before), "bit for bit"


def test_a_name_matches_whole_components() -> None:
    model = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2), "a": nn.ModuleDict({"proj": nn.Linear(2, 2)})}
    )
    assert lora.add_lora(copy.deepcopy(model), 1, 1, targets=["proj"]) == ["proj", "a.proj"]
    assert lora.add_lora(copy.deepcopy(model), 1, 1, targets=["a.proj"]) == ["a.proj"]


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


def test_remove_lora_without_merge_restores_the_model() -> None:
    """Training flags are carried both ways."""
    model = gpt_neo()
    model.transformer.h[0].train()
    before, text, state = logits(model), repr(model), model.state_dict()
    flags = [module.training for module in model.modules()]
    for change in (adapted, lora.remove_lora):
        change(model)
        assert [module.training for module in model.modules()] == flags
    assert repr(model) == text and torch.equal(logits(model), before)
    after = model.state_dict()
    assert list(after) == list(state) and all(after[k].data_ptr() == v.data_ptr() for k, v in state.items())


REFUSED = [
    (gpt_neo, {"rank": 0}, "rank = 0"),
    (gpt_neo, {"dropout": 1.0}, "dropout = 1.0"),
    (gpt_neo, {"targets": ["q_proj", "query"]}, "'query' matches no module of GPTNeo.*; the usual ones are k_proj, v_"),
    (gpt_neo, {"targets": ["proj"]}, "target 'proj' matches no module"),
    (gpt_neo, {"targets": ["wte"]}, "'transformer.wte' is a Embedding, not a plain nn.Linear"),
    (gpt_neo, {"targets": []}, r"targets = \[\]"),
    (gpt_neo, {"targets": "q_proj"}, "targets = 'q_proj'"),
    (lambda: adapted(perceptron(), ("0",)), {"targets": ["2"]}, r"0 has LoRA already: call remove_lora\(model\) first"),
    # A layer whose weight is read by its parent, and which is never called.
    (lambda: nn.MultiheadAttention(8, 2), {"targets": ["out_proj"]}, "'out_proj' is a NonDynamicallyQuantizableLinear"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSED)
def test_add_lora_refuses_and_leaves_the_model_unchanged(
    build: Callable[[], nn.Module], options: dict[str, object], message: str
) -> None:
    model = build()
    before = repr(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, **({"rank": RANK, "alpha": ALPHA} | options))
    assert before == (repr(model), [p.requires_grad for p in model.parameters()])


def test_the_usual_targets_are_the_linear_layers_of_the_blocks() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert lora.linear_names(llama()) == names
    assert set(lora.linear_names(adapted(gpt_neo()))) == set(lora.DEFAULT_TARGETS)


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
    """Gradients are fp32 in all cases."""
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
    ours.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class Casts(TorchDispatchMode):
    """Counts casts of single tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_are_made_ready_change_no_number(dtype: torch.dtype) -> None:
    """Outputs and gradients are equal, two backward passes add up, and no matrix is cast for a product of its own."""
    found = []
    for context in (contextlib.nullcontext, lora.factors_ready):
        model = perceptron().to(dtype)
        lora.add_lora(model, 4, 16, targets=["0", "2"], generator=torch.Generator().manual_seed(3))
        randomize(model)
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with autocast, context(*() if context is contextlib.nullcontext else (model, dtype)), Casts() as casts:
            outputs = [model(x), model(2 * x)]
        assert casts.count == (0 if context is lora.factors_ready or dtype == torch.float32 else 8)
        for output in outputs:
            output.float().square().sum().backward()
        found.append([*outputs, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        # Gradients are rounded once, after the sum over both passes, or twice, before the sum.
        torch.testing.assert_close(one, other, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-6)
    for one, other in zip(*(outputs[:2] for outputs in found), strict=True):
        assert torch.equal(one, other)


def test_factors_are_ready_inside_the_block_only() -> None:
    model = adapted(perceptron(), ("0", "2"))
    with contextlib.suppress(ZeroDivisionError), lora.factors_ready(model, torch.bfloat16):
        assert {factor.dtype for _, layer in lora.lora_layers(model) for factor in layer.ready} == {torch.bfloat16}
        1 / 0  # noqa: B018
    assert all(layer.ready is None for _, layer in lora.lora_layers(model))


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
    """A merge rounds once, from fp32, even under autocast."""
    model = adapted(gpt_neo(dtype))
    before, unmerged, objects = weights(model), logits(model), [layer.weight for _, layer in lora.lora_layers(model)]
    lora.unmerge(model)
    assert all(map(torch.equal, weights(model).values(), before.values()))
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge(model)
    once, merged = weights(model), logits(model)
    model.train().eval()  # Neither call merges or unmerges.
    lora.merge(model)
    assert all(map(torch.equal, weights(model).values(), once.values()))
    assert not any(map(torch.equal, once.values(), before.values()))
    for name, layer in lora.lora_layers(model):
        exact = before[name].float() + ALPHA / RANK * (layer.lora_B @ layer.lora_A)
        assert torch.equal(once[name], exact.to(dtype)) and not layer.weight.requires_grad
    # In bf16 the merged weights are rounded to 8 bits; the sums of the unmerged forward pass are not.
    torch.testing.assert_close(
        merged, unmerged, **(REORDERED if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2})
    )
    lora.unmerge(model)
    lora.unmerge(model)
    assert all(layer.weight is weight for (_, layer), weight in zip(lora.lora_layers(model), objects, strict=True))
    assert all(map(torch.equal, weights(model).values(), before.values()))
    assert torch.equal(logits(model), unmerged)


def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    """Unmerging ties head and embedding again, even in a copy in float64."""
    model = adapted(Tied(), ("lm_head",))
    embedding, unmerged = model.embed.weight.clone(), model(IDS % 11)
    lora.merge(model)
    assert torch.equal(model.embed.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)
    torch.testing.assert_close(model(IDS % 11), unmerged, **REORDERED)
    for other in (copy.deepcopy(model).double(), model):
        lora.unmerge(other)
        assert other.lm_head.weight is other.embed.weight and torch.equal(other.embed.weight.float(), embedding)


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


@pytest.mark.parametrize(("build", "targets", "task_type"), [(*FAMILIES[0], None), (*FAMILIES[1], "CAUSAL_LM")])
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


@pytest.mark.parametrize("merged", [False, True])
def test_the_round_trip_is_exact_and_overwrites(merged: bool, tmp_path: Path) -> None:
    model, other, folder = adapted(gpt_neo(torch.bfloat16), dropout=0.1), gpt_neo(torch.bfloat16), tmp_path / "a/b"
    lora.save_adapter(randomize(adapted(gpt_neo()), 2.0), folder)
    expected = logits(model)
    if merged:
        lora.merge(model)
    lora.save_adapter(model, folder)
    lora.load_adapter(other, folder)  # This call adds layers.
    assert torch.equal(logits(other), expected)
    parameters = list(other.parameters())  # An optimizer may hold these parameters.
    lora.load_adapter(randomize(other, 2.0), folder)  # This call fills the layers.
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    (folder / "adapter_model.safetensors").write_bytes(b"")  # the model does not depend on the file any longer
    assert torch.equal(logits(other), expected)
    assert {layer.lora_A.dtype for _, layer in lora.lora_layers(other)} == {torch.float32}


def test_save_adapter_refuses_a_model_without_or_with_uneven_lora(tmp_path: Path) -> None:
    model = perceptron()
    with pytest.raises(ValueError, match=r"found \[\]"):
        lora.save_adapter(model, tmp_path)
    model[0], model[2] = lora.LoRALinear(model[0], 1, 2), lora.LoRALinear(model[2], 2, 2)
    with pytest.raises(ValueError, match=r"found \[\(1, 2, 0.0\), \(2, 2, 0.0\)\]"):
        lora.save_adapter(model, tmp_path)


UNSUPPORTED = [
    ("peft_type", "IA3"), ("peft_type", None), ("bias", "all"), ("use_dora", True), ("use_rslora", True),
    ("rank_pattern", {"q_proj": 4}), ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]),
    ("init_lora_weights", "pissa"), ("an_option_of_the_future", 1), ("target_modules", "all-linear"),
    ("target_modules", None), ("r", None), ("r", "8"), ("r", 0), ("lora_alpha", None), ("lora_dropout", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_a_config_that_cannot_be_honoured_is_refused(field: str, value: object, tmp_path: Path) -> None:
    lora.save_adapter(adapted(perceptron(), ("0", "2")), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {field: value}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    model = perceptron()
    with pytest.raises(ValueError) as error:
        lora.load_adapter(model, tmp_path)
    assert str(error.value) == f"{file}: {field!r} = {value!r} is not supported"
    assert repr(model) == repr(perceptron())


@pytest.mark.parametrize(
    ("name", "message"),
    [("adapter_model.safetensors", "not a readable safetensors file"), ("adapter_config.json", "not a JSON object")],
)
def test_damaged_and_missing_files_are_named(name: str, message: str, tmp_path: Path) -> None:
    lora.save_adapter(adapted(perceptron(), ("0", "2")), tmp_path)
    whole = (tmp_path / name).read_bytes()
    for content in (b"", b"[]", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            lora.load_adapter(perceptron(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        lora.load_adapter(perceptron(), tmp_path)


@pytest.mark.parametrize("present", [False, True])
def test_tensors_that_do_not_fit_are_named(present: bool, tmp_path: Path) -> None:
    lora.save_adapter(adapted(perceptron(), ("0", "2")), tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.2.lora_B.weight"
    whole = load_file(file)
    rest = {name: tensor for name, tensor in whole.items() if name != key}
    fits, transposed = rf"\('{key}', \(5, 3\)\)", rf"\('{key}', \(3, 5\)\)"
    model = adapted(perceptron(), ("0", "2")) if present else perceptron()
    text, before = repr(model), model(torch.ones(6))
    for tensors, message in (
        (rest, rf"missing \[{fits}\], unexpected \[\]"),
        (whole | {"extra": torch.ones(1)}, r"missing \[\], unexpected \[\('extra', \(1,\)\)\]"),
        (whole | {key: torch.ones(3, 5)}, rf"missing \[{fits}\], unexpected \[{transposed}\]"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"adapter_model.safetensors: {message}"):
            lora.load_adapter(model, tmp_path)
    assert repr(model) == text and torch.equal(model(torch.ones(6)), before)


def test_an_adapter_for_another_model_or_other_layers_is_refused(tmp_path: Path) -> None:
    lora.save_adapter(adapted(gpt_neo(), ("q_proj",)), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: target .* matches no module of Sequential"):
        lora.load_adapter(perceptron(), tmp_path)
    with pytest.raises(ValueError, match=r"missing .*v_proj.* unexpected .*q_proj"):
        lora.load_adapter(adapted(gpt_neo(), ("v_proj",)), tmp_path)
    for rank, alpha in ((RANK + 1, ALPHA), (RANK, ALPHA + 1)):
        model = gpt_neo()
        lora.add_lora(model, rank, alpha)
        with pytest.raises(ValueError, match=f"rank 3, alpha 7; .*k_proj has rank {rank}, alpha {alpha}"):
            lora.load_adapter(model, tmp_path)
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"call unmerge\(model\) first"):
        lora.load_adapter(model, tmp_path)
