"""model.py against transformers' GPTNeoForCausalLM, and its own promises about files, masks and dtypes."""

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig as HFConfig
from transformers import GPTNeoForCausalLM

import model as module
from model import GPTNeo, GPTNeoConfig, GPTNeoMLP, GPTNeoSelfAttention, check_weights
from sampling import KVCache

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
    "bos_token_id": 96,
    "eos_token_id": 96,
}
# name: (changes to TINY, T)
CONFIGS = {
    "window shorter than the text": ({}, 40),
    "125M shape": (
        dict(
            vocab_size=50257, max_position_embeddings=2048, hidden_size=768, num_layers=12, num_heads=12,
            attention_types=[[["global", "local"], 6]], window_size=256,
        ),
        300,
    ),
    "odd vocabulary": ({"vocab_size": 1009}, 20),
    "vocabulary of 1": ({"vocab_size": 1, "bos_token_id": 0, "eos_token_id": 0}, 9),
    "window 1": ({"window_size": 1}, 20),
    "window larger than the text": ({"window_size": 256}, 20),
    "window as long as the text": ({"window_size": 20}, 20),
    "global only": ({"attention_types": [[["global"], 2]]}, 40),
    "local only": ({"attention_types": [[["local"], 2]]}, 40),
    "uneven attention_types": ({"num_layers": 5, "attention_types": [[["local", "global"], 2], [["local"], 1]]}, 40),
    "T = 1": ({}, 1),
    "T = max_position_embeddings": ({}, 64),
    "intermediate_size and epsilon": ({"intermediate_size": 48, "layer_norm_epsilon": 1e-3}, 20),
}  # fmt: skip


def pair(changes: dict, tmp_path: Path) -> tuple[GPTNeo, GPTNeoForCausalLM]:
    """Our model and transformers', the weights of the second loaded into the first through its files."""
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(HFConfig(**{**TINY, "initializer_range": 0.1, **changes})).eval()
    # transformers starts biases at 0 and norms at 1, which would hide a parameter that is not used
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return GPTNeo.from_pretrained(tmp_path), theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    changes, T = CONFIGS[name]
    if name == "125M shape":
        changes = changes | {"initializer_range": 0.02}
    ours, theirs = pair(changes, tmp_path)
    ids = torch.randint(ours.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    logits, expected = ours.logits(ours(ids)), theirs(ids).logits
    assert (logits - expected).abs().max() <= 1e-4
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel() ** 0.5
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    reference = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        gradient = reference[key].grad
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * scale, key
    assert {key for key in reference if key != "lm_head.weight"} == {key for key, _ in ours.named_parameters()}


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side, tmp_path):
    """Learned positions count real tokens: a padded row has the logits of the row alone (TRL #6800)."""
    model, _ = pair({}, tmp_path)
    rows = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 20, 12)]
    width = 25
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width)
    for i, row in enumerate(rows):
        offset = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids[i, offset : offset + len(row)] = row
        mask[i, offset : offset + len(row)] = 1
    hidden = model(ids, mask - 1)  # segments: 0 is text, -1 padding
    assert hidden.isfinite().all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(hidden[i, mask[i].bool()], model(row[None])[0], atol=2e-5, rtol=1e-5)


def test_continuations_of_a_prompt_in_one_row(tmp_path):
    """Prompt and three continuations in a row, beyond the window of 8, give what three rows give, gradients too."""
    model, _ = pair({}, tmp_path)
    rng = torch.Generator().manual_seed(0)
    lengths = [[12, 9, 1, 14], [5, 20, 3, 6]]
    parts = [[torch.randint(97, (n,), generator=rng) for n in row] for row in lengths]
    width = max(map(sum, lengths)) + 2
    ids, segments = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), -1)
    for row, row_parts in enumerate(parts):
        ids[row, : sum(lengths[row])] = torch.cat(row_parts)
        segments[row, : sum(lengths[row])] = torch.arange(4).repeat_interleave(torch.tensor(lengths[row]))
    together = model(ids, segments)
    ours, expected = [], []
    for row, (prompt, *continuations) in enumerate(parts):
        end = len(prompt)
        for continuation in continuations:
            alone = model(torch.cat([prompt, continuation])[None])[0]
            ours.append(torch.cat([together[row, : len(prompt)], together[row, end : end + len(continuation)]]))
            expected.append(alone)
            end += len(continuation)
    weights = torch.randn(sum(map(len, ours)), 32, generator=rng)
    grads = []
    for hidden in (torch.cat(ours), torch.cat(expected)):
        grads.append(torch.autograd.grad((hidden * weights).sum(), list(model.parameters())))
    torch.testing.assert_close(torch.cat(ours), torch.cat(expected), atol=2e-5, rtol=1e-5)
    for a, b in zip(*grads):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_right_padding_needs_no_mask(tmp_path):
    model, _ = pair({}, tmp_path)
    row = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([row, torch.zeros(1, 7, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded)[:, :20], model(row), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30])
def test_cached_equals_uncached(cut, tmp_path):
    """Ragged prompts of up to `cut` tokens at once, then one token at a time, past the local window of 8."""
    model, _ = pair({}, tmp_path)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model, 4, 40)
    rows, lengths = torch.tensor([2, 0, 3]), torch.tensor([cut, max(1, cut - 5), max(1, cut // 2)])
    prompts = torch.where(torch.arange(cut) < lengths[:, None], ids[:, :cut], 0)
    hidden = [model(prompts, update_cache=partial(cache.fill, rows, lengths))]
    cache.lengths[rows] = lengths
    expected = model(ids)
    for row in range(3):
        assert (hidden[0][row, : lengths[row]] - expected[row, : lengths[row]]).abs().max() <= 1e-4
    for _ in range(40 - cut):
        at = cache.lengths[rows]
        tokens = torch.zeros(4, dtype=torch.long).index_put((rows,), ids[torch.arange(3), at])
        got = model.decode(tokens, cache.lengths, cache.masks(), cache.append)[rows]
        assert (model.logits(got) - model.logits(expected[torch.arange(3), at])).abs().max() <= 1e-4
        cache.lengths[rows] += 1


def test_checkpointing_changes_nothing_but_memory(tmp_path):
    model, _ = pair({}, tmp_path)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for model.checkpointing in (False, True):
        kept: list[int] = []

        def pack(tensor, kept=kept):
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.logits(model(ids)).logsumexp(-1).sum().backward()
        results.append(([p.grad for p in model.parameters()], sum(kept)))
        model.zero_grad()
    (plain, most), (again, less) = results
    assert all(map(torch.equal, plain, again)) and less < most / 2


def test_checkpointing_repeats_the_same_dropout(tmp_path):
    model, _ = pair({"resid_dropout": 0.3, "attention_dropout": 0.3, "embed_dropout": 0.3}, tmp_path)
    model.train()
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model.checkpointing in (False, True):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model(ids).square().sum(), list(model.parameters())))
    assert all(map(torch.equal, *gradients))


def layer_of(kind, **options):
    """(attention, MLP) of a one-layer model whose values and biases make every output 1 without dropout."""
    config = GPTNeoConfig(**TINY | {"num_layers": 1, "attention_types": [[[kind], 1]]} | options)
    attention, mlp = GPTNeoSelfAttention(config, 0), GPTNeoMLP(config)
    with torch.no_grad():
        for parameter in (*attention.parameters(), *mlp.parameters()):
            parameter.zero_()
        attention.v_proj.weight[:, 0] = 1
        attention.out_proj.weight.copy_(torch.eye(32))
        mlp.c_proj.bias.fill_(1)
    return attention, mlp


@pytest.mark.parametrize("kind", ["global", "local"])
@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_acts_at_every_position(kind, training):
    """With values of 1 an output is the share of the weights that were kept, doubled: 0 or 2 at the first position."""
    attention, _ = layer_of(kind, attention_dropout=0.5)
    out = attention.train(training)(torch.ones(500, 40, 32), None, None)[:, :, 0]  # (B, T), the first head
    assert set(out[:, 0].tolist()) == ({0.0, 2.0} if training else {1.0})
    spread = out.std(0)
    if training:
        seen = torch.arange(1, 41).clamp(max=8 if kind == "local" else 40)
        torch.testing.assert_close(spread, seen**-0.5, rtol=0.15, atol=0)
    else:
        assert spread.max() < 1e-6


@pytest.mark.parametrize("part", ["attention", "MLP"])
def test_residual_dropout_acts_on_the_output_of_either_part(part):
    attention, mlp = layer_of("global", resid_dropout=0.5)
    call = partial(attention, mask=None, update_cache=None) if part == "attention" else mlp
    x = torch.ones(50, 40, 32)
    assert call(x).unique().tolist() == [0.0, 2.0]
    assert abs(call(x).mean() - 1) < 0.02
    attention.eval(), mlp.eval()
    torch.testing.assert_close(call(x), x)


# ---- logits of 16-bit models ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_16_bit_head_are_fp32(dtype, monkeypatch):
    monkeypatch.setattr(module, "HEAD_BLOCK", 40)  # 97 rows: three blocks, the last one smaller
    model = GPTNeo(GPTNeoConfig(**TINY)).init_weights(torch.Generator().manual_seed(0)).to(dtype)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = hidden.double() @ model.head_weight.double().T
    for rows in (hidden, hidden[0], hidden[0, 0], hidden[:0]):
        actual = model.logits(rows)
        assert actual.dtype == torch.float32 and actual.shape == (*rows.shape[:-1], 97)
    torch.testing.assert_close(model.logits(hidden).double(), expected, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(model.logits(hidden).sum(), model.head_weight)
    torch.testing.assert_close(gradient.float(), hidden.float().sum((0, 1)).expand(97, 32), atol=0.05, rtol=0.01)


def test_logits_under_autocast_are_fp32_and_those_of_fp32_models_one_product():
    model = GPTNeo(GPTNeoConfig(**TINY)).init_weights(torch.Generator().manual_seed(0))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.logits(hidden), F.linear(hidden, model.head_weight))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(hidden)
    expected = hidden.bfloat16().float() @ model.head_weight.bfloat16().float().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_dropouts_of_the_config_act_in_training_only(tmp_path):
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in ("embed_dropout", "attention_dropout", "resid_dropout"):
        model, _ = pair({name: 0.5}, tmp_path / name)
        plain = model(ids)
        assert torch.equal(model(ids), plain)
        model.train()
        assert not torch.allclose(model(ids), plain, atol=1e-3), name


def test_saved_model_loads_in_transformers_with_no_key_missing(tmp_path):
    model = GPTNeo(GPTNeoConfig(**TINY)).init_weights(torch.Generator().manual_seed(0)).eval()
    model.save_pretrained(tmp_path)
    theirs, info = GPTNeoForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(30)[None]
    assert (theirs(ids).logits - model.logits(model(ids))).abs().max() <= 1e-4
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def same_weights(a: GPTNeo, b: GPTNeo) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_layout_of_weights_loads(tmp_path):
    """Sharded safetensors, pytorch_model.bin with mask buffers and the tied head, and a sharded .bin."""
    model, theirs = pair({}, tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    assert same_weights(GPTNeo.from_pretrained(tmp_path / "sharded"), model)

    old = dict(theirs.state_dict())
    for layer in range(2):  # what old hub checkpoints carry besides parameters
        old[f"transformer.h.{layer}.attn.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        old[f"transformer.h.{layer}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    for name, zipped in (("bin", True), ("legacy", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((tmp_path / "plain/config.json").read_text())
        torch.save(old, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert same_weights(GPTNeo.from_pretrained(folder), model), name


def test_the_head_is_padded_only_in_memory(tmp_path):
    """Rows of zeros up to a multiple of 64 follow a loaded head; neither state dicts nor files contain them."""
    pair({}, tmp_path)
    model = GPTNeo.from_pretrained(tmp_path)
    weight = model.head_weight.detach()
    assert weight.shape == (97, 32) and weight.is_contiguous()
    whole = weight.as_strided((128, 32), (32, 1))
    assert whole[:97].equal(weight) and not whole[97:].any()
    assert model.head_padding_rows == 31
    assert model.state_dict()["transformer.wte.weight"].shape == (97, 32)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert after["transformer.wte.weight"].equal(before["transformer.wte.weight"])
    assert model.double().head_weight.untyped_storage().nbytes() == 97 * 32 * 8  # a cast drops the padding
    assert model.head_padding_rows == 0


def test_head_padding_rows_are_those_of_the_loaded_storage_only(tmp_path):
    """0 whenever head_weight is not the loaded tensor; the padding is found again when that tensor is put back."""
    pair({}, tmp_path)
    model = GPTNeo.from_pretrained(tmp_path)
    parameter, data = model.head_weight, model.head_weight.data
    assert model.float().head_padding_rows == 31  # nothing to cast, so the storage is the same
    assert copy.deepcopy(model).head_padding_rows == 0
    assert copy.deepcopy(model)._padded_head is None  # it would be a second copy of the head
    others = (data.clone(), data.bfloat16(), data[:96], data.view(32, 97), data[1:], data.view(torch.int32).float())
    others += (data.as_strided(data.shape, (1, 97)),)
    for other in others:
        parameter.data = other
        assert model.head_padding_rows == 0
        parameter.data = data
        assert model.head_padding_rows == 31
    model.load_weights(tmp_path)
    assert model.head_padding_rows == 31
    parameter.data = data.clone()
    model.float()
    parameter.data = data
    assert model.head_padding_rows == 0  # .to() and casts release a padded head that is not in use
    assert GPTNeo(GPTNeoConfig(**TINY)).head_padding_rows == 0


def test_a_head_of_64_rows_is_not_padded(tmp_path):
    pair({"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}, tmp_path)
    model = GPTNeo.from_pretrained(tmp_path)
    assert model.head_padding_rows == 0 and model.head_weight.untyped_storage().nbytes() == 64 * 32 * 4


def test_dtype_and_device_are_asked_for(tmp_path):
    pair({}, tmp_path)
    model = GPTNeo.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert model(torch.arange(20)[None]).isfinite().all()


class Kinds(list):
    """Counts how often it is walked through."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("kinds, walks", [(["global"], 3), (["global"] * 9, 1), ([], 0)])
def test_attention_types_of_any_length_are_refused_at_once(kinds, walks):
    kinds = Kinds(kinds)
    with pytest.raises(ValueError, match="attention_types"):
        GPTNeoConfig(**TINY | {"attention_types": [[kinds, 100_000]]})
    assert kinds.walks == walks


def test_initial_weights():
    config = GPTNeoConfig(**TINY | {"initializer_range": 0.5})
    again, model = (GPTNeo(config).init_weights(torch.Generator().manual_seed(0)) for _ in range(2))
    assert same_weights(again, model)
    for name, parameter in model.named_parameters():
        if "ln_" in name or parameter.dim() == 1:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]
        else:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.1) and abs(parameter.mean()) < 0.1


LAYOUTS = ("safetensors", "sharded", "zip", "legacy")


def store(model: GPTNeo, folder: Path, layout: str) -> list[Path]:
    """Saves the model in one of LAYOUTS and returns its weight files."""
    model.save_pretrained(folder)
    file, state = folder / "model.safetensors", {k: v.clone() for k, v in model.state_dict().items()}
    if layout == "safetensors":
        return [file]
    file.unlink()
    if layout == "sharded":
        names = [f"part-{i}.safetensors" for i in range(2)]
        weight_map = {key: names[i % 2] for i, key in enumerate(state)}
        for name in names:
            save_file({key: state[key] for key in state if weight_map[key] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return [folder / name for name in names]
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "zip")
    return [folder / "pytorch_model.bin"]


@pytest.mark.parametrize("way", ["from_pretrained", "load_weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_outlive_the_file_they_came_from(layout, way, tmp_path):
    """The file is overwritten in place and then emptied, which would be a bus error in a model that maps it."""
    original = GPTNeo(GPTNeoConfig(**TINY)).init_weights(torch.Generator().manual_seed(0))
    files = store(original, tmp_path, layout)
    if way == "from_pretrained":
        model = GPTNeo.from_pretrained(tmp_path)
    else:
        model = GPTNeo(GPTNeoConfig(**TINY))
        model.load_weights(tmp_path)
    for file in files:
        with open(file, "r+b") as stream:
            stream.write(b"\x55" * file.stat().st_size)
            stream.flush()
            os.fsync(stream.fileno())
    assert same_weights(model, original)
    for file in files:
        os.truncate(file, 0)
    assert same_weights(model, original)


@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta", "number", "unnamed"])
def test_pickles_hold_whole_tensors_only(kind, tmp_path):
    """A few bytes could declare a tensor of any size."""
    model = GPTNeo(GPTNeoConfig(**TINY))
    (file,) = store(model, tmp_path, "zip")
    key, value = "transformer.wpe.weight", model.state_dict()["transformer.wpe.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad = {"expanded": value[:1].clone().expand(64, 32), "sparse": value.to_sparse_csr(), "meta": value.to("meta"),
               "number": 1.0, "unnamed": value}[kind]  # fmt: skip
    torch.save(dict(model.state_dict()) | {3 if kind == "unnamed" else key: bad}, file)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: (damaged or )?not a weight file"):
        GPTNeo.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_would_need_scales_are_refused(dtype, tmp_path):
    model = GPTNeo(GPTNeoConfig(**TINY))
    model.save_pretrained(tmp_path)
    key = "transformer.h.0.mlp.c_fc.weight"
    save_file(dict(model.state_dict()) | {key: torch.ones(128, 32).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: '{key}' is {dtype}, expected one of"):
        GPTNeo.from_pretrained(tmp_path)


class Greedy:
    """Unpickling it asks for 10 TB, which torch's safe unpickler allows."""

    def __reduce__(self):
        return bytearray, (10**13,)


def test_a_pickle_that_asks_for_any_amount_of_memory_is_damaged(tmp_path):
    (file,) = store(GPTNeo(GPTNeoConfig(**TINY)), tmp_path, "zip")
    torch.save({"x": Greedy()}, file)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: not a weight file .*MemoryError"):
        GPTNeo.from_pretrained(tmp_path)


def test_load_weights_refuses_what_does_not_fit(tmp_path):
    model = GPTNeo(GPTNeoConfig(**TINY))
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    key = "transformer.ln_f.bias"
    for state in ({k: v for k, v in whole.items() if k != key}, whole | {key: torch.ones(31)}):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"no tensor of the right shape for {key}"):
            model.load_weights(tmp_path)


@pytest.mark.parametrize("reads", ["safe_open", "torch.load"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory (os error 12)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    ],
)
def test_lack_of_memory_is_not_called_damage(reads, error, tmp_path, monkeypatch):
    store(GPTNeo(GPTNeoConfig(**TINY)), tmp_path, "safetensors" if reads == "safe_open" else "zip")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((module, "safe_open") if reads == "safe_open" else (torch, "load")), fail)
    with pytest.raises(type(error)) as raised:
        GPTNeo.from_pretrained(tmp_path)
    assert raised.value is error
    if reads == "safe_open":
        error = MemoryError()
        with pytest.raises(MemoryError):
            GPTNeo.from_pretrained(tmp_path)


# ---- input of any kind and size ----


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_only_regular_files_are_opened(name, tmp_path):
    """Not a device, a directory or a pipe, to which opening it would wait for a writer."""
    original = tmp_path / "original"
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(original)
    makers = (lambda path: path.symlink_to("/dev/null"), Path.mkdir, os.mkfifo)
    for i, make in enumerate(makers):
        folder = Path(shutil.copytree(original, tmp_path / str(i)))
        (folder / "model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(FileNotFoundError, match=r"no such file|no weights") as error:
            GPTNeo.from_pretrained(folder)
        assert "\n" not in str(error.value)
        if name == "config.json":
            continue
        (folder / name).unlink() if i != 1 else (folder / name).rmdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}}))
        make(folder / "shard.safetensors")
        with pytest.raises(FileNotFoundError, match=r"shard 'shard.safetensors' is missing"):
            check_weights(folder, GPTNeoConfig(**TINY))


def sparse(file: Path, header: dict, size: int) -> None:
    """A safetensors file with holes for tensors."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + size)


def test_headers_are_checked_before_weights_are_read(tmp_path):
    """1 TB of holes: as a tensor of its own, as one of a wrong shape, and under a key that is not loaded."""
    config = GPTNeoConfig(**TINY)
    GPTNeo(config).save_pretrained(tmp_path)
    file, size = tmp_path / "model.safetensors", 2**40
    assert check_weights(tmp_path, config) is None
    own, offset = {}, 0
    for key, tensor in load_file(file).items():
        own[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    huge = {"dtype": "F32", "shape": [size // 4], "data_offsets": [offset, offset + size]}
    for header, message in (
        (own | {"extra": huge}, "unexpected 'extra'"),
        ({"transformer.ln_f.bias": huge | {"data_offsets": [0, size]}}, "missing transformer.wte.weight"),
        (own | {"transformer.h.0.attn.attention.bias": huge}, f"masks and a tied head of {size // 4} numbers"),
        (own | {"lm_head.weight": huge}, f"masks and a tied head of {size // 4} numbers"),
    ):
        sparse(file, header, size if len(header) == 1 else offset + size)
        for call in (partial(check_weights, tmp_path, config), partial(GPTNeo.from_pretrained, tmp_path)):
            with pytest.raises(ValueError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
    sparse(file, own, offset)
    check_weights(tmp_path, config)
    with pytest.raises(ValueError, match=r"wte.weight has shape \(97, 32\), expected \(97, 64\)"):
        check_weights(tmp_path, GPTNeoConfig(**TINY | {"hidden_size": 64}))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        check_weights(tmp_path, config)


def test_headers_of_shards_are_checked_together_and_bin_files_not_opened(tmp_path):
    model = GPTNeo(GPTNeoConfig(**TINY))
    shards = store(model, tmp_path / "sharded", "sharded")
    check_weights(tmp_path / "sharded", model.config)
    save_file({"transformer.extra": torch.ones(1)}, shards[1])
    with pytest.raises(ValueError, match=r"missing .*; missing .*; missing .* and 13 more"):
        check_weights(tmp_path / "sharded", model.config)
    (file,) = store(model, tmp_path / "bin", "zip")
    file.write_bytes(b"hello")
    check_weights(tmp_path / "bin", model.config)


def test_json_of_absurd_size_or_depth_is_refused(tmp_path):
    """A config that could not be saved again, since Python's limit on recursion stands in the way, is not accepted."""
    config = json.loads(GPTNeoConfig(**TINY).to_json())
    file = tmp_path / "config.json"
    nested = 96
    for _ in range(48):
        nested = {"x": [nested]}  # 96 levels
    file.write_text(json.dumps(config | {"anything": nested}))
    with pytest.raises(ValueError, match=r"config.json: values are nested more than 50 deep"):
        GPTNeoConfig.from_json(file)
    for levels in (700, 100_000):
        file.write_text(json.dumps(config)[:-1] + ', "bos_token_id": ' + "[" * levels + "]" * levels + "}")
        with pytest.raises(ValueError, match=r"nested more|not valid JSON"):
            GPTNeoConfig.from_json(file)
    nested = 96
    for _ in range(49):  # the object around it is one more
        nested = [nested]
    file.write_text(json.dumps(config | {"anything": nested}))
    assert GPTNeoConfig.from_json(file) == GPTNeoConfig(**TINY)
    for path in (file, tmp_path / "model.safetensors.index.json"):
        path.write_text("{")
        os.truncate(path, 2**24 + 1)
        with pytest.raises(ValueError, match=f"{path.name}: 16777217 bytes, expected at most 16777216"):
            GPTNeoConfig.from_json(path) if path == file else module.weight_files(tmp_path)


def test_messages_quote_little_of_what_files_hold(tmp_path):
    """Values, keys, shapes and names of a megabyte each; nothing breaks the line."""
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    own, config, long = load_file(file), json.loads((tmp_path / "config.json").read_text()), "x\n" * 500_000
    messages = []

    def refuse() -> None:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            GPTNeo.from_pretrained(tmp_path)
        messages.append(str(error.value))

    for field in ("model_type", "hidden_size", "resid_dropout", "layer_norm_epsilon", "activation_function",
                  "intermediate_size", "eos_token_id", "attention_types"):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | {field: [long]}))
        refuse()
        assert field in messages[-1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(own | {long: torch.ones(1)}, file)
    refuse()
    save_file(own | {"transformer.ln_f.bias": torch.ones([1] * 100_000)}, file)
    refuse()
    sparse(file, {long: long}, 0)
    refuse()
    file.unlink()
    for name in (long, f"/{long}"):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        refuse()
    index.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(own | {long: torch.ones(3, dtype=torch.int64)}, tmp_path / "pytorch_model.bin")
    refuse()
    assert len(messages) == 14
    for message in messages:
        assert len(message) < 700 + len(str(tmp_path)) and "\n" not in message


def test_a_key_in_two_shards_is_quoted(tmp_path):
    key = "x" * 1000
    for name in ("a.bin", "b.bin"):
        torch.save({key: torch.ones(1)}, tmp_path / name)
    (tmp_path / "config.json").write_text(GPTNeoConfig(**TINY).to_json())
    index = {"weight_map": {"a": "a.bin", "b": "b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b.bin: holds 'x{199}, and so does a file before it"):
        GPTNeo.from_pretrained(tmp_path)


def test_an_adapters_directory_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    message = "an adapter's directory; load the base model and put the adapter on top"
    for call in (GPTNeo.from_pretrained, lambda path: GPTNeoConfig.from_json(str(path / "config.json"))):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}: {message}"):
            call(tmp_path)
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    GPTNeo.from_pretrained(tmp_path)  # a model, whatever else lies there


# ---- saving ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_only_what_was_there(place, error, tmp_path, monkeypatch):
    """At that moment all that is new lies in a directory .tmp-*, which is what a killed process leaves."""
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    before = contents(tmp_path)
    seen = []

    def fail(*args, **kwargs):
        if place == "save_file":
            save_file(*args, **kwargs)
        seen.extend(os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(*((module, place) if place == "save_file" else (os, place)), fail)
    with pytest.raises(type(error), match="disk full" if isinstance(error, OSError) else None):
        GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    (new,) = set(seen) - before.keys()
    assert new.startswith(".tmp-") and len(new) > 10
    assert contents(tmp_path) == before and sorted(os.listdir(tmp_path)) == sorted(before)


def test_files_are_synced_whole(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle)))
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    assert {len(content) for content in contents(tmp_path).values()} <= set(sizes)


def test_a_planted_link_is_not_followed_and_modes_are_the_umasks(tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "model"
    victim.write_text("precious")
    folder.mkdir()
    names = ["config.json", "model.safetensors"]
    for name in [*names, *(f"{name}.tmp" for name in names)]:
        (folder / name).symlink_to(victim)
    umask = os.umask(0o027)
    try:
        GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(folder)
    finally:
        os.umask(umask)
    assert victim.read_text() == "precious"
    for name in names:
        assert not (folder / name).is_symlink() and (folder / name).stat().st_mode & 0o777 == 0o640
    GPTNeo.from_pretrained(folder)


def test_the_temporary_directory_is_new_and_its_name_unknown(tmp_path, monkeypatch):
    """A directory or link that has the name already is not used."""
    names = iter(["taken", "link", "free"])
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / ".tmp-taken").mkdir()
    (tmp_path / ".tmp-link").symlink_to(victim)
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path)
    assert not any(victim.iterdir()) and not any((tmp_path / ".tmp-taken").iterdir())
    assert not (tmp_path / ".tmp-free").exists() and next(names, None) is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"), ("tie_word_embeddings", False), ("window_size", 0), ("num_heads", 5),
        ("attention_types", [[["global", "sparse"], 1]]), ("attention_types", [[["global", "local"], 2]]),
        ("attention_types", "global"), ("hidden_size", "32"), ("resid_dropout", 1.5), ("intermediate_size", -1),
        ("layer_norm_epsilon", 0), ("model_type", "gpt2"), ("attention_types", None),
    ],
)  # fmt: skip
def test_unsupported_config_is_refused_by_name(field, value, tmp_path):
    config = json.loads(GPTNeoConfig(**TINY).to_json()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field) as error:
        GPTNeo.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


def broken(kind: str, folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    match kind:
        case "truncated safetensors":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "garbage safetensors":
            weights.write_bytes(b"\xff" * 100)
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "config is no JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
        case "missing tensor":
            del tensors["transformer.ln_f.weight"]
            save_file(tensors, weights)
        case "unexpected tensor":
            save_file(tensors | {"transformer.extra": torch.ones(1)}, weights)
        case "wrong shape":
            save_file(tensors | {"transformer.ln_f.weight": torch.ones(5)}, weights)
        case "index leaves the directory":
            weights.rename(folder / "x.safetensors")
            save_file(tensors, folder.parent / "x.safetensors")
            index = {"weight_map": {"transformer.ln_f.weight": "../x.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "index names a missing shard":
            weights.unlink()
            index = {"weight_map": {"transformer.ln_f.weight": "x.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "pickle that runs code":
            weights.unlink()
            torch.save({"x": subprocess.run}, folder / "pytorch_model.bin")
        case "bin of garbage":
            weights.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"hello")


@pytest.mark.parametrize(
    "kind, names",
    [
        ("truncated safetensors", "model.safetensors"), ("garbage safetensors", "model.safetensors"),
        ("no weights", "pytorch_model.bin"), ("no config", "config.json"), ("config is no JSON", "config.json"),
        ("config is a list", "object"), ("missing tensor", "missing transformer.ln_f.weight"),
        ("unexpected tensor", "unexpected 'transformer.extra'"), ("wrong shape", r"ln_f.weight has shape \(5,\)"),
        ("index leaves the directory", r"'\.\./x.safetensors' is not a plain"),
        ("index names a missing shard", "x.safetensors"),
        ("pickle that runs code", "pytorch_model.bin"), ("bin of garbage", "pytorch_model.bin"),
    ],
)  # fmt: skip
def test_damaged_directory_is_one_clear_line(kind, names, tmp_path):
    pair({}, tmp_path)
    broken(kind, tmp_path)
    with pytest.raises((ValueError, OSError), match=names) as error:
        GPTNeo.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_rows_longer_than_the_context_are_refused(tmp_path):
    model, _ = pair({}, tmp_path)
    with pytest.raises(ValueError, match="max_position_embeddings is 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    segments = torch.zeros(1, 70, dtype=torch.long)
    segments[:, :6] = -1
    many = torch.full((1, 200), -1)
    many[:, 70:130] = 0
    assert model(torch.zeros(1, 200, dtype=torch.long), many).isfinite().all()  # 60 tokens among 140 of padding
    assert model(torch.zeros(1, 70, dtype=torch.long), segments).shape == (1, 70, 32)  # 64 real tokens fit


def test_the_file_alone_imports_elsewhere(tmp_path):
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    program = "import model, sys; assert not {'spin', 'lora', 'sampling', 'kernels', 'transformers'} & set(sys.modules)"
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


@pytest.mark.skipif("TINYSTORIES_1M" not in os.environ, reason="TINYSTORIES_1M names no directory with the checkpoint")
def test_public_checkpoint():
    from sampling import respond

    model = GPTNeo.from_pretrained(os.environ["TINYSTORIES_1M"])
    prompt = [7454, 2402, 257, 640]
    last = model.logits(model(torch.tensor([prompt])))[0, -1]
    torch.testing.assert_close(last[:4], torch.tensor([8.4062, 9.2780, -2.2560, -6.6768]), atol=1e-3, rtol=0)
    responses = respond(model, [prompt], max_new_tokens=8, eos_token_id=None, temperature=0)
    assert responses.ids == [[11, 612, 373, 257, 1310, 2576, 3706, 20037]]


LOAD = """
import sys, threading, time, torch
from model import GPTNeo

def anonymous():  # MB; pages of a mapped file do not count, since they can be dropped at any time
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def watch():
    while watching:
        seen.append(anonymous())
        time.sleep(0.001)

GPTNeo.from_pretrained(sys.argv[1])  # imports and allocator pools are warm
before, watching, seen = anonymous(), True, []
thread = threading.Thread(target=watch)
thread.start()
model = GPTNeo.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
watching = False
thread.join()
print(max(seen) - before)
"""


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy"])
def test_loading_holds_one_copy_of_the_weights(layout, tmp_path):
    """Peak memory of loading 64 MB of fp32 weights as such, and as bf16: an old pickle is never mapped."""
    config = GPTNeoConfig(**TINY | {"hidden_size": 512, "num_layers": 5, "attention_types": [[["local"], 5]]})
    original = GPTNeo(config)
    size = sum(p.nbytes for p in original.parameters()) / 2**20
    assert 60 < size < 64
    store(original, tmp_path / "big", layout)
    store(GPTNeo(GPTNeoConfig(**TINY)), tmp_path / "tiny", layout)
    for dtype, limit in (("float32", size), ("bfloat16", size if layout == "legacy" else size / 2)):
        command = [sys.executable, "-c", LOAD, tmp_path / "tiny", tmp_path / "big", dtype]
        peak = float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        assert 0.9 * size / (1 if dtype == "float32" else 2) < peak < limit + 12
