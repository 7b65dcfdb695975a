"""model.py against transformers' GPTNeoForCausalLM, and its own promises about files, masks and dtypes."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig as HFConfig
from transformers import GPTNeoForCausalLM

from model import GPTNeo, GPTNeoConfig
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
    assert not list(tmp_path.glob("*.tmp"))


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
    others = (data.clone(), data.bfloat16(), data[:96], data.view(32, 97), data[1:], data.view(torch.int32).float())
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
        ("unexpected tensor", "unexpected transformer.extra"), ("wrong shape", r"ln_f.weight has shape \(5,\)"),
        ("index leaves the directory", r"\.\./x.safetensors"), ("index names a missing shard", "x.safetensors"),
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


def test_loading_holds_one_copy_of_the_weights(tmp_path):
    """Peak memory of loading 128 MB of fp32 weights as bf16 stays below one and a half times 64 MB, plus 24 MB."""
    code = """
import resource, sys, torch
from model import GPTNeo, GPTNeoConfig
config = GPTNeoConfig(vocab_size=1000, max_position_embeddings=16, hidden_size=512, num_layers=10, num_heads=8,
                      attention_types=((("global", "local"), 5),))
if sys.argv[1] == "save":
    GPTNeo(config).save_pretrained(sys.argv[2])
else:
    GPTNeo.from_pretrained(sys.argv[3])  # imports and allocator pools are warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    GPTNeo.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    GPTNeo(GPTNeoConfig(**TINY)).save_pretrained(tmp_path / "tiny")

    def child(*args) -> str:
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    child("save", tmp_path / "big")
    assert float(child("load", tmp_path / "big", tmp_path / "tiny")) < 1.5 * 64 + 24
