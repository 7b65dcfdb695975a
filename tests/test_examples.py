"""examples/: SPIN on models of transformers. Log-probabilities and responses are those of the model itself."""

import json
import math

import peft
import pytest
import torch
import transformers as hub
from helpers import ROOT, die_at, flags, refused, rows, tree

from examples import any_causal_lm as example
from runtime.folder import Folder
from runtime.options import combined, parse
from runtime.setup import setup, switch_off_dropout

OPTIONS = combined(example.HubOptions)
TOKENS = dict(vocab_size=396, bos_token_id=393, eos_token_id=393, pad_token_id=393, max_position_embeddings=64)
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
INNER = SMALL | dict(intermediate_size=32)
DROPOUT = dict(hidden_dropout=0.5, attention_dropout=0.5)
MODELS = {
    "gemma": lambda: hub.GemmaForCausalLM(
        hub.GemmaConfig(num_key_value_heads=1, head_dim=8, attention_dropout=0.5, **INNER, **TOKENS)
    ),
    "phi": lambda: hub.PhiForCausalLM(hub.PhiConfig(resid_pdrop=0.5, **INNER, **TOKENS)),  # The only head with a bias.
    # OPT keeps the probability of dropout as a number.
    "opt": lambda: hub.OPTForCausalLM(
        hub.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, init_std=0.3, **SMALL, **TOKENS)
    ),
    # Falcon keeps this probability in its config, too, and its linear layers are of a class of their own.
    "falcon": lambda: hub.FalconForCausalLM(hub.FalconConfig(**DROPOUT, **SMALL, **TOKENS)),
    "gpt2": lambda: hub.GPT2LMHeadModel(
        hub.GPT2Config(n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, **TOKENS)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def start(request, tmp_path_factory):
    """A tiny random model with the embedded task's tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    if request.param == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    tokenizer = str(ROOT / "pronounce/start/tokenizer.json")
    hub.PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    return path


def player_of(start, **options):
    options = dict(model=str(start), max_new_tokens=6, gen_batch=3, device="cpu") | options
    return example.CausalLM(example.HubModel.from_pretrained(start), 393, OPTIONS(**options))


def test_log_probabilities_are_those_of_the_model(start):
    """Items of one and two responses, of ragged lengths, agree with float64 sums over each sequence's logits alone."""
    player = player_of(start)
    items = [([5, 6, 7], [8, 393], [9]), ([1], [2, 3, 4, 5, 393], [6, 393]), ([3] * 9, [4], [5, 6, 7, 8])]
    with torch.no_grad():
        for some in (items, [item[:2] for item in items]):
            got = player.response_logps(some).T
            for row, (prompt, *responses) in zip(got, some):
                for value, response in zip(row, responses):
                    logps = player.model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
                    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
                    assert value.item() == pytest.approx(logps[at, response].sum().item(), abs=1e-4)


def test_responses_are_those_of_each_prompt_alone(start):
    """Padding on the left changes no greedy response; sampled ones depend on the seed and end where they say so."""
    player = player_of(start)
    prompts = [[5], [6, 7, 8, 9], [1, 2], [3] * 12, [4, 5, 6]]
    settings = example.GenerationConfig(max_new_tokens=6, eos_token_id=393, pad_token_id=393)
    for prompt, (ids, finished) in zip(prompts, player.respond(prompts, 0, temperature=0.0)):
        alone = player.model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert ids == alone and finished == (ids[-1] == 393)
    one, same, other = (player.respond(prompts * 3, seed, temperature=1.5) for seed in (1, 1, 2))
    assert one == same != other
    assert all(finished == (ids[-1] == 393) and ids.count(393) <= 1 for ids, finished in one)


def test_settings_of_the_model_do_not_reach_generation(start):
    """A chat model's generation_config.json asks for sampling, filters and penalties; greedy stays greedy."""
    plain = example.AutoModelForCausalLM.from_pretrained(start)
    plain.generation_config = example.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=2, top_p=0.1, repetition_penalty=9.0, suppress_tokens=[5, 6],
        eos_token_id=[4],
    )  # fmt: skip
    prompts = [[5], [6, 7, 8, 9], [3] * 12]
    args = OPTIONS(model=str(start), max_new_tokens=6, gen_batch=3, device="cpu")
    player = example.CausalLM(example.as_linear(plain.eval()), 393, args)
    for temperature in (0.0, 1.0):
        expected = player_of(start).respond(prompts, 0, temperature=temperature)
        assert player.respond(prompts, 0, temperature=temperature) == expected


def test_checkpoint_recomputes_activations(start):
    """The gradients are the same, and each layer runs again in the backward pass."""
    items, calls = [([5, 6, 7], [8, 393])], []
    found = []
    for checkpoint in (False, True):
        player = player_of(start, checkpoint=checkpoint)
        switch_off_dropout(player.model)
        player.model.train()
        layers = next(m for m in player.model.modules() if isinstance(m, torch.nn.ModuleList))
        next(layers[0].children()).register_forward_pre_hook(
            lambda *args, checkpoint=checkpoint: calls.append(checkpoint)
        )
        player.response_logps(items).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in player.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)
    assert calls.count(False) == 1 and calls.count(True) == 2


def test_a_run_starts_every_iteration_at_ln_2_and_resumes_bit_for_bit(start, data, here):
    """Dropout of the model's config is off. final/ loads without adapters and scores as the last iterate did."""
    options = dict(iterations=2, max_new_tokens=6, eval_limit=4, prompts=32)
    argv = flags(start, data, "run", save_minutes=0, **options)
    assert example.main(argv) == 0
    for t in (0, 1):
        steps = rows(here / f"run/steps-{t}.jsonl")
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and steps[-1]["loss"] < math.log(2) - 0.01
    first, *_, last = metrics = rows(here / "run/metrics.jsonl")
    assert last["nll"] < first["nll"]
    final = example.AutoModelForCausalLM.from_pretrained(here / "run/final")
    assert not [name for name, _ in final.named_parameters() if "lora" in name]
    configs = [example.AutoConfig.from_pretrained(path) for path in (start, here / "run/final")]
    assert len({json.dumps({k: v for k, v in vars(c).items() if "dropout" in k}) for c in configs}) == 1
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        base = example.AutoModelForCausalLM.from_pretrained(start)
        theirs = peft.PeftModel.from_pretrained(base, here / "run/iterate-2").eval()  # GPT-2's weights are transposed
        torch.testing.assert_close(final.eval()(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    args = parse(OPTIONS, flags(start, data, "other", **options), "any_causal_lm.py")
    _, _, run = setup(args, "any_causal_lm", example.CausalLM.class_of)
    player = example.CausalLM(final.eval(), 393, run.args)
    items = [(e.prompt_ids, e.real_ids) for e in run.work.heldout]
    total, tokens = sum(logp for (logp,) in player.logps(items)), sum(len(real) for _, real in items)
    assert -total / tokens == pytest.approx(last["nll"], abs=1e-4)
    if "gpt2" not in start.name:
        return  # Resuming does not depend on the model.
    again = [word if word != "run" else "again" for word in argv]
    die_at(
        Folder, "write_rows", again, lambda _, name, rows: name == "metrics.jsonl" and len(rows) == 3, script=example
    )
    assert example.main(again) == 0
    assert rows(here / "again/metrics.jsonl") == metrics
    for name, content in tree(here / "run/iterate-2").items():
        assert tree(here / "again/iterate-2")[name] == content


def test_what_is_refused(start, data, tmp_path, capsys):
    for options, says in ((dict(rank=0), "trains adapters: expected no --rank 0"),
                          (dict(lora_targets="query"), "the usual ones are ")):  # fmt: skip
        out = tmp_path / "run"
        assert says in refused(flags(start, data, out, **options), out, capsys, example)


def test_a_head_that_is_more_than_a_product_is_refused(tmp_path):
    torch.manual_seed(0)
    config = hub.Gemma2Config(head_dim=8, num_key_value_heads=1, **INNER, **TOKENS)
    hub.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match="Gemma2ForCausalLM: its head is not one product"):
        example.CausalLM(example.HubModel.from_pretrained(tmp_path / "g", torch.bfloat16), 393, OPTIONS())
    hub.GraniteForCausalLM(hub.GraniteConfig(logits_scaling=8.0, **INNER, **TOKENS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GraniteForCausalLM: its head is not one product"):
        player_of(tmp_path)
