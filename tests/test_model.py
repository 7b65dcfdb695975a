"""model.py: the network against transformers' GPTNeoForCausalLM, and the files that it reads and writes."""

import json
import os
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_logits_and_gradients
from safetensors.torch import load_file, save_file
from transformers import GPTNeoConfig as HFConfig
from transformers import GPTNeoForCausalLM

import model as module
from model import GPTNeo, GPTNeoConfig, GPTNeoSelfAttention

TINY = dict(
    vocab_size=97, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4,
    attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=96, eos_token_id=96,
)  # fmt: skip
# name: (changes to TINY, T)
CONFIGS = {
    "window shorter than the text": ({}, 40),
    "12 heads, window 256": (dict(max_position_embeddings=512, hidden_size=48, num_heads=12, window_size=256), 300),
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
    """Our model and that of transformers, whose weights ours has loaded from its files."""
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(HFConfig(**{**TINY, "initializer_range": 0.1, **changes})).eval()
    # transformers initialises biases to 0 and norms to 1, which would hide a parameter that is not used.
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return GPTNeo.from_pretrained(tmp_path), theirs


def tiny(**changes) -> GPTNeo:
    return GPTNeo(GPTNeoConfig(**TINY | changes)).init_weights(torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_those_of_transformers(name, tmp_path):
    changes, T = CONFIGS[name]
    ours, theirs = pair(changes, tmp_path)
    ids = torch.randint(ours.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    assert_same_logits_and_gradients(ours, theirs, ids, least=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing_but_memory(dropout):
    """Checkpointing does not even change what dropout drops."""
    model = tiny(resid_dropout=dropout, attention_dropout=dropout, embed_dropout=dropout).train()
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for model.checkpointing in (False, True):
        kept: list[int] = []

        def pack(tensor, kept=kept):
            kept.append(tensor.nbytes)
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.logits(model(ids)).logsumexp(-1).sum()
        results.append((torch.autograd.grad(loss, list(model.parameters())), sum(kept)))
    (plain, most), (again, less) = results
    assert all(map(torch.equal, plain, again)) and less < most / 2


@pytest.mark.parametrize("name", ["embed_dropout", "resid_dropout"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_embeddings_and_of_residuals_drops_what_transformers_drops(name, training, tmp_path):
    """Both models draw the same random numbers."""
    ours, theirs = (model.train(training) for model in pair({name: 0.5}, tmp_path))
    ids, found = torch.arange(40).view(2, 20), []
    for logits_of in (lambda ids: ours.logits(ours(ids)), lambda ids: theirs(ids).logits):
        torch.manual_seed(0)
        found.append(logits_of(ids))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["global", "local"])
@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_acts_at_every_position(kind, training):
    """If all values are 1, an output is twice the share of the weights that were kept: 0 or 2 at position 0."""
    torch.manual_seed(0)
    config = GPTNeoConfig(**TINY | dict(num_layers=1, attention_types=[[[kind], 1]], attention_dropout=0.5))
    attention = GPTNeoSelfAttention(config, 0).requires_grad_(False)
    for parameter in attention.parameters():
        parameter.zero_()
    attention.v_proj.weight[:, 0] = 1
    attention.out_proj.weight.copy_(torch.eye(32))
    out = attention.train(training)(torch.ones(500, 40, 32), None, None)[:, :, 0]  # (B, T), the first head
    assert set(out[:, 0].tolist()) == ({0.0, 2.0} if training else {1.0})
    spread = out.std(0)
    if training:
        seen = torch.arange(1, 41).clamp(max=8 if kind == "local" else 40)
        torch.testing.assert_close(spread, seen**-0.5, rtol=0.15, atol=0)
    else:
        assert spread.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_16_bit_head_are_fp32(dtype, monkeypatch):
    monkeypatch.setattr(module, "HEAD_BLOCK", 40)  # 97 rows: three blocks, the last one smaller
    model = tiny().to(dtype)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = hidden.double() @ model.head_weight.double().T
    for rows in (hidden, hidden[0], hidden[0, 0], hidden[:0]):
        actual = model.logits(rows)
        assert actual.dtype == torch.float32 and actual.shape == (*rows.shape[:-1], 97)
    torch.testing.assert_close(model.logits(hidden).double(), expected, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(model.logits(hidden).sum(), model.head_weight)
    torch.testing.assert_close(gradient.float(), hidden.float().sum((0, 1)).expand(97, 32), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("V", [1, 63, 64, 97, 128, 50257])
def test_every_product_of_the_head_on_a_gpu_is_aligned(V, monkeypatch):
    """Only CUDA multiplies 16-bit matrices to fp32, so fp32 takes their place. All products but the last, of the
    columns behind the last multiple of 64, have such a multiple of columns."""
    columns, mm = [], torch.mm

    def product(a, b, *, out_dtype):
        assert out_dtype == torch.float32
        columns.append(b.shape[1])
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", product)
    rows, weight = torch.randn(3, 8), torch.randn(V, 8)
    logits = module._aligned_product(rows, weight)
    torch.testing.assert_close(logits, rows @ weight.T)
    assert logits.view(3, 1, V).shape == (3, 1, V)
    assert sum(columns) == V and len(columns) <= 2 and (V < 64 or columns[0] % 64 == 0)


def test_logits_under_autocast_are_fp32_and_those_of_an_fp32_model_are_one_product():
    model = tiny()
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.logits(hidden), F.linear(hidden, model.head_weight))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(hidden)
    expected = hidden.bfloat16().float() @ model.head_weight.bfloat16().float().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_a_norm_keeps_the_dtype_of_its_input_under_autocast():
    """The norm is that of fp32, rounded once. Only on CUDA would autocast cast the input to fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norm = module.LayerNorm(32, device=device).requires_grad_(False)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    norm.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(2)).bfloat16())
    expected = norm(x.float())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(norm(x.float()), expected)
        rounded = norm.bfloat16()(x)
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=2**-7, atol=0)


def same_weights(model: GPTNeo, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_initial_weights():
    again, model = (tiny(initializer_range=0.5) for _ in range(2))
    assert same_weights(again, model.state_dict())
    for name, parameter in model.named_parameters():
        if "ln_" in name or parameter.dim() == 1:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]
        else:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.1) and abs(parameter.mean()) < 0.1


def test_rows_longer_than_the_context_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="max_position_embeddings is 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    segments = torch.zeros(1, 70, dtype=torch.long)
    segments[:, :6] = -1
    many = torch.full((1, 200), -1)
    many[:, 70:130] = 0
    assert model(torch.zeros(1, 200, dtype=torch.long), many).isfinite().all()  # 60 tokens among 140 of padding
    assert model(torch.zeros(1, 70, dtype=torch.long), segments).shape == (1, 70, 32)  # 64 real tokens fit


# ---- the configuration ----


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"), ("tie_word_embeddings", False), ("window_size", 0), ("num_heads", 5),
        ("attention_types", [[["global", "sparse"], 1]]), ("attention_types", [[["global", "local"], 2]]),
        ("attention_types", "global"), ("attention_types", None), ("hidden_size", "32"), ("resid_dropout", 1.5),
        ("eos_token_id", [1, "2"]), ("model_type", "gpt2"),
    ],
)  # fmt: skip
def test_an_unsupported_config_is_refused_in_one_line_that_names_the_field(field, value, tmp_path):
    config = json.loads(GPTNeoConfig(**TINY).to_json()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{field}") as error:
        GPTNeo.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapters_directory_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: an adapter's directory; load the base model"):
        GPTNeo.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    GPTNeo.from_pretrained(tmp_path)  # the directory of a model may hold an adapter too


# ---- reading weights ----

LAYOUTS = ("safetensors", "sharded", "zip", "legacy")


def store(theirs: GPTNeoForCausalLM, folder: Path, layout: str) -> list[Path]:
    """Saves the model in one of LAYOUTS and returns its weight files."""
    theirs.save_pretrained(folder, max_shard_size="20KB" if layout == "sharded" else "1GB")
    if layout in ("zip", "legacy"):
        (folder / "model.safetensors").unlink()
        state = dict(theirs.state_dict())  # includes lm_head.weight
        for layer in range(2):  # old checkpoints hold these buffers too
            state[f"transformer.h.{layer}.attn.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            state[f"transformer.h.{layer}.attn.attention.masked_bias"] = torch.tensor(-1e9)
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "zip")
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_weights_loads_without_a_second_copy(layout, tmp_path, monkeypatch):
    """When a tensor is read, no more than the tensor before it is still alive. The files may change afterwards: they
    are overwritten in place and then emptied, which would be a bus error if the model mapped them."""
    read, alive = module._read_file, []

    def watched(file):
        references = []
        for key, tensor in read(file):
            alive.append(sum(reference() is not None for reference in references))
            references.append(weakref.ref(tensor))
            yield key, tensor

    _, theirs = pair({}, tmp_path / "plain")
    files = store(theirs, tmp_path, layout)
    assert len(files) > 1 if layout == "sharded" else len(files) == 1
    monkeypatch.setattr(module, "_read_file", watched)
    model = GPTNeo.from_pretrained(tmp_path)
    assert len(alive) >= len(model.state_dict()) and max(alive) <= 1
    assert same_weights(model, theirs.state_dict())
    for file in files:
        with open(file, "r+b") as stream:
            stream.write(b"\x55" * file.stat().st_size)
        assert same_weights(model, theirs.state_dict())
        os.truncate(file, 0)
    assert same_weights(model, theirs.state_dict())


def test_weights_have_the_dtype_that_is_asked_for(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path)
    model = GPTNeo.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert not model.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key].bfloat16())


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def resave(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Adds a tensor to model.safetensors or replaces it; None removes it."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name: tensor}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def pickle(folder: Path, content: object) -> None:
    """Replaces model.safetensors with a pickle."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def shard(folder: Path, *names: str) -> None:
    """Replaces model.safetensors with two copies, a and b, and with an index that names shards."""
    write(folder, "b.safetensors", (folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    write(folder, "model.safetensors.index.json", json.dumps(index).encode())


BIAS = "transformer.ln_f.bias"  # (32,)
# name: (what damages the directory, the error)
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda folder: write(folder, "config.json", b"{"), "config.json: not valid JSON"),
    "config is a list": (lambda folder: write(folder, "config.json", b"[]"), "config.json: expected a JSON object"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights, expected one of model.safet"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 9999), "safetensors: cannot be read as w"),
    "garbage": (lambda folder: write(folder, "model.safetensors", b"hello"), "safetensors: cannot be read as weights"),
    "missing tensor": (lambda folder: resave(folder, BIAS, None), f"model.safetensors: .*: missing {BIAS}$"),
    "unexpected tensor": (lambda folder: resave(folder, "extra", torch.ones(1)), "config.json: unexpected 'extra'$"),
    "other shape": (lambda folder: resave(folder, BIAS, torch.ones(5)), rf"{BIAS} has shape \(5,\), expected \(32,\)$"),
    "float8": (lambda folder: resave(folder, BIAS, torch.ones(32).to(torch.float8_e4m3fn)), f"{BIAS} is torch.float8"),
    "shards repeat a tensor": (lambda folder: shard(folder, "a.safetensors", "b.safetensors"), "unexpected .* more$"),
    "shard elsewhere": (lambda folder: shard(folder, "../a.safetensors"), r"'\.\./a.safetensors' is not a plain file"),
    "missing shard": (lambda folder: shard(folder, "c.safetensors"), "index.json: shard 'c.safetensors' is missing"),
    "pickle runs code": (lambda folder: pickle(folder, {BIAS: subprocess.run}), "model.bin: cannot be read as weights"),
    "pickle of numbers": (lambda folder: pickle(folder, {BIAS: 1.0}), "expected a dict from names to tensors"),
    "pickle of a part": (lambda folder: pickle(folder, {BIAS: torch.ones(32)}), "bin: .*: missing .* and 26 more$"),
    "Git LFS": (lambda folder: write(folder, "model.safetensors", module.LFS + b"/spec/v1"), "run git lfs pull"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_clear_line(name, tmp_path):
    damage, message = DAMAGES[name]
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        GPTNeo.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ---- writing weights ----


def test_a_saved_model_loads_in_transformers_with_no_key_missing(tmp_path):
    model = tiny()
    for _ in range(2):  # the second time the files exist
        model.save_pretrained(tmp_path / "new/folder")
    theirs, info = GPTNeoForCausalLM.from_pretrained(tmp_path / "new/folder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(30)[None]
    assert (theirs(ids).logits - model.logits(model(ids))).abs().max() <= 1e-4
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "new/folder").iterdir()}
    assert modes.keys() == {"config.json", "model.safetensors"} and len(set(modes.values())) == 1


def test_a_model_with_parameters_of_adapters_is_not_saved(tmp_path):
    model = tiny()
    model.transformer["ln_f"].lora_A = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="lora_A is no parameter of GPTNeo: merge and remove"):
        model.save_pretrained(tmp_path)
