"""llama.py against transformers' Llama, Mistral, Qwen2 and Qwen3: the network, its cache, its files, a whole game."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import OPTIONS, ROOT, assert_same_logits_and_gradients, flags, player_of, rows, spy
from safetensors.torch import load_file, save_file

import lora
import spin
from llama import Llama, LlamaConfig
from model import GPTNeo
from player import MODELS, Player
from sampling import KVCache, respond

TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
TINY_FIELDS = {name: value for name, value in TINY.items() if name != "pad_token_id"}  # fields of our LlamaConfig
LINEAR = dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0))
LLAMA3 = dict(
    rope_parameters=dict(
        rope_type="llama3", factor=8.0, rope_theta=500.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
)  # fmt: skip
# What is random here are the weights: each config has something that no other has.
CONFIGS = {
    "llama": ("Llama", {}),
    "llama, every head its own": ("Llama", dict(num_key_value_heads=4)),
    "llama, one key/value head": ("Llama", dict(num_key_value_heads=1)),
    "llama, tied, biases": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama, wide heads, epsilon": ("Llama", dict(head_dim=24, rms_norm_eps=0.1)),
    "llama, linear": ("Llama", LINEAR),
    "llama, llama3": ("Llama", LLAMA3),
    "mistral, window 7": ("Mistral", dict(sliding_window=7)),
    "mistral, window 1": ("Mistral", dict(sliding_window=1, tie_word_embeddings=True)),
    "mistral, window beyond the text": ("Mistral", dict(sliding_window=50)),
    "mistral, no window": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, one local layer": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3, tied, biases, groups of 4": (
        "Qwen3", dict(head_dim=8, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True),
    ),
}  # fmt: skip
FEW = ["llama, tied, biases", "mistral, window 7", "qwen2, one local layer", "qwen3"]


def pair(name: str, folder: Path, dtype: torch.dtype = torch.float32, **saving) -> tuple[Llama, torch.nn.Module]:
    """Our model and that of transformers, whose files ours has loaded. No parameter has its neutral value."""
    kind, changes = CONFIGS[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**TINY | changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    theirs.to(dtype).save_pretrained(folder, **saving)
    if dtype != torch.float32:  # The model is read again, since the cast has rounded the frequencies of its positions.
        theirs = type(theirs).from_pretrained(folder, dtype=torch.float32)
    return Llama.from_pretrained(folder), theirs.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory) -> tuple[Llama, torch.nn.Module]:
    return pair(request.param, tmp_path_factory.mktemp("models"))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_logits_and_gradients_equal_those_of_transformers(models):
    assert_same_logits_and_gradients(*models, tokens(2, 40), least=1e-2)  # Queries with a window of 1 have no gradient.


@torch.no_grad()
def test_greedy_responses_and_their_log_probabilities_equal_those_of_transformers(models, monkeypatch):
    """Responses use the cache, in a batch of ragged prompts; a window shorter than the text becomes a ring buffer."""
    ours, theirs = models
    caches = []
    spy(monkeypatch, KVCache, "__init__", lambda a, k: caches.append(a[0]))
    prompts = [tokens(n).tolist() for n in (3, 16, 9)]
    responses = respond(ours, prompts, max_new_tokens=9, eos_token_id=2, temperature=0, batch_size=2)
    assert caches[0].keys[0].shape[1] == ours.config.num_key_value_heads, "queries share keys"
    for prompt, ids, logps in zip(prompts, responses.ids, responses.logps):
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9, do_sample=False,
            pad_token_id=0,
            use_cache=ours.config.window_size > 1,  # For a window of 1 their cache keeps all tokens instead of none.
        )  # fmt: skip
        assert ids == expected[0, len(prompt) :].tolist()
        whole = theirs(expected).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(logps), whole[range(len(ids)), ids], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FEW)
def test_several_responses_in_one_row_are_as_in_a_row_each(name, tmp_path):
    """Three responses to a prompt have equal log-probabilities and gradients, under --checkpoint, too."""
    model, _ = pair(name, tmp_path)
    player = player_of(model)
    items = [tuple(tokens(n + row).tolist() for n in (9, 12, 4, 7)) for row in range(3)]
    together = player.response_logps(items)
    apart = torch.stack([torch.cat([player.response_logps([(i[0], i[n])])[0] for i in items]) for n in (1, 2, 3)])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(0))
    model.checkpointing = True
    again = player.response_logps(items)
    gradients = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (together, apart, again)]
    for a, b, c in zip(*gradients):
        assert (a - b).norm() <= 1e-4 * b.norm() and (a - c).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", FEW)
def test_files_go_to_transformers_and_back(name, tmp_path):
    """Our model loads bf16 from several files; transformers loads our file, with nothing missing or left over."""
    ours, theirs = pair(name, tmp_path / "theirs", torch.bfloat16, max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ids = tokens(2, 30)
    assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() <= 1e-4
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)
    assert LlamaConfig.from_json(tmp_path / "ours" / "config.json") == ours.config


# ---------------------------------------------------------------- weights under other names, a head in the file


def tiny(folder: Path, **changes) -> Llama:
    """A random model, and its files."""
    model = Llama(LlamaConfig(**TINY_FIELDS | changes)).init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "without model."])
def test_wrapped_and_bare_keys_are_read_with_one_line(prefix, tmp_path, capsys):
    ours = tiny(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in list(state):
        other = key.removeprefix("model.") if prefix == "without model." else prefix + key
        state[other] = state.pop(key)
    save_file(state, tmp_path / "model.safetensors")
    again = Llama.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))
    assert capsys.readouterr().out.count("is read as") == 1


def test_a_head_in_the_file_of_a_tied_model(tmp_path):
    """A head with the embedding's numbers is left out; another head would be lost, so it is refused."""
    tiny(tmp_path, tie_word_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    Llama.from_pretrained(tmp_path)
    state["lm_head.weight"][5, 5] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding.*tie_word_embeddings"):
        Llama.from_pretrained(tmp_path)


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "gemma"), ("hidden_act", "gelu"), ("num_key_value_heads", 3), ("head_dim", 7),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}), ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", "linear"), ("partial_rotary_factor", 0.5), ("layer_types", ["full_attention"]),
        ("layer_types", ["chunked_attention"] * 2), ("quantization_config", {"quant_method": "gptq"}),
        ("sliding_window", 0), ("eos_token_id", "2"), ("attention_dropout", 1), ("rope_interleaved", True),
    ],
)  # fmt: skip
def test_an_unsupported_field_is_refused_by_its_name(field, value, tmp_path):
    config = {"model_type": "qwen3", **TINY, field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{field}") as error:
        LlamaConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_rotary_settings_of_transformers_4_and_5_are_the_same(tmp_path):
    new = {"model_type": "llama", **TINY, **LLAMA3}
    old = {"model_type": "llama", **TINY, "rope_theta": 500.0, "rope_scaling": dict(LLAMA3["rope_parameters"])}
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    del old["rope_scaling"]["rope_theta"]
    read = []
    for raw in (new, old):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        read.append(LlamaConfig.from_json(tmp_path / "config.json"))
    assert read[0] == read[1] and read[0].rope_theta == 500


def test_defaults_are_those_of_transformers(tmp_path):
    """The defaults of each model_type are compared: a config.json may leave out what is the default of its class."""
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        theirs = getattr(transformers, f"{kind}Config")()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": theirs.model_type}))
        ours = LlamaConfig.from_json(tmp_path / "config.json")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                     "bos_token_id", "eos_token_id"):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), (kind, name)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
        window = theirs.sliding_window if kind == "Mistral" else None
        assert (ours.window_size if ours.attention_layers[-1] == "local" else None) == window


def test_the_class_of_a_model_is_that_of_its_model_type(tmp_path):
    for name, expected in {"gpt_neo": GPTNeo, "llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        assert Player.class_of(tmp_path) is expected
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match=f"model_type is 'gemma', expected {' or '.join(MODELS)}"):
        Player.class_of(tmp_path)


def test_attention_dropout_acts_in_training_only(tmp_path):
    model, ids = tiny(tmp_path, attention_dropout=0.5).eval(), tokens(1, 9)
    plain = model(ids)
    assert torch.equal(model(ids), plain) and not torch.allclose(model.train()(ids), plain, atol=1e-2)


# ---------------------------------------------------------------- a game


def tiny_start(start: Path, folder: Path, **changes) -> LlamaConfig:
    """A random model of the family with the tokenizer of the start of all tests; returns its config."""
    theirs = json.loads((start / "config.json").read_text())
    like = dict(vocab_size=theirs["vocab_size"], eos_token_id=theirs["eos_token_id"], initializer_range=0.2)
    config = tiny(folder, **like | changes).config
    (folder / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())
    return config


@pytest.mark.parametrize("recipe, model_type", [("zephyr-7b", "mistral"), ("qwen3-0.6b", "qwen3")])
def test_a_dry_run_of_the_recipes(recipe, model_type, start, data, tmp_path, monkeypatch, capsys):
    """The model is a tiny random one of the recipe's type, with a chat template; nothing is written."""
    monkeypatch.chdir(tmp_path)
    tiny_start(start, tmp_path / "start", model_type=model_type)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ 'assistant: ' }}"
    (tmp_path / "start" / "chat_template.jinja").write_text(template)
    words = f"--model start --data {data} --eval-share 0.2 --max-new-tokens 8 --out run --device cpu --dry-run"
    words += " --prompts 8 --batch 4 --gen-batch 4 --eval-limit 4"
    assert spin.main([f"@{ROOT}/recipes/{recipe}.args", *words.split()]) == 0
    assert "peak" in capsys.readouterr().out and not Path("run").exists()


def test_a_game_of_a_llama_ends_in_a_model_of_transformers(start, data, tmp_path, monkeypatch):
    """LoRA is on all linear layers by default; final/ and the adapter give transformers and PEFT the same logits."""
    monkeypatch.chdir(tmp_path)
    config = tiny_start(start, tmp_path / "start", attention_dropout=0.5)
    assert spin.main(flags("start", data, "run", iterations=2, prompts=16, eval_limit=4)) == 0
    assert rows(Path("run/steps-1.jsonl"))[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "without dropout"
    ours = Llama.from_pretrained("start")
    lora.load_adapter(ours, "run/iterate-2")
    assert len(dict(lora.lora_layers(ours))) == 2 * 7
    ids = tokens(2, 12) % config.vocab_size
    logits = ours.logits(ours(ids))
    final, info = transformers.LlamaForCausalLM.from_pretrained("run/final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(final(ids).logits, logits, atol=1e-4, rtol=1e-4)
    base = transformers.LlamaForCausalLM.from_pretrained("start")
    wrapped = peft.PeftModel.from_pretrained(base, "run/iterate-2")
    torch.testing.assert_close(wrapped(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert transformers.AutoConfig.from_pretrained("run/final").eos_token_id == config.eos_token_id


def test_any_of_several_end_tokens_ends_a_response(start, data, tmp_path, monkeypatch, capsys):
    """End tokens are listed in config.json or, as Qwen's, in generation_config.json; final/ keeps the list."""
    monkeypatch.chdir(tmp_path)
    config = tiny_start(start, tmp_path / "start")
    ends = [config.eos_token_id, 40, 41]
    Path("start/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = Llama.from_pretrained("start")
    assert model.config.eos_token_id == ends
    player = Player(model, config.eos_token_id, OPTIONS["spin"](max_new_tokens=60))
    drawn = player.respond([[50 + i] for i in range(40)], 0)
    assert {ids[-1] for ids, finished in drawn if finished} & {40, 41}
    assert all((ids[-1] in ends) == finished and not {*ids[:-1]} & {*ends} for ids, finished in drawn)
    assert spin.main(flags("start", data, "run", prompts=40, eval_limit=2)) == 0
    assert "responses end at '<|endoftext|>', " in capsys.readouterr().out
    assert Llama.from_pretrained("run/final").config.eos_token_id == ends
    text = [row["generated"] for row in rows(Path("run/pairs-0.jsonl")) if row["generated_ids"][0][-1] in ends[1:]]
    tokenizer = transformers.AutoTokenizer.from_pretrained("start")
    assert text and not any(one.endswith(tokenizer.decode([end])) for one in text for end in ends)
