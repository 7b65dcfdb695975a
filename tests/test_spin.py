"""spin.py: the loss, Algorithm 1, and one test for every row of the list of mistakes seen in the wild."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import lora
import options
import report
import spin
from data import Example, encode, fit_context, held_out, load_examples, load_tokenizer
from model import GPTNeo, GPTNeoConfig

LN2 = math.log(2)


def flags(start, data, out, **options) -> list[str]:
    """A command line for a run of seconds; `options` override it."""
    defaults = {
        "model": start, "data": data, "out": out, "eval_share": 0.2, "iterations": 1, "max_new_tokens": 8, "rank": 4,
        "lr": 1e-2, "epochs": 1, "batch": 16, "micro_tokens": 800, "beta": 1.0, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    argv = []
    for name, value in (defaults | options).items():
        if value is None:
            continue
        argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv


def begin(start, data, out, command="spin", **options):
    """(player, training examples, held-out examples, run) of a tiny run."""
    return spin.setup(spin.parse([command, *flags(start, data, out, **options)])[1], command)


def spy(monkeypatch, where, name, look):
    """Replaces where.name by itself, after a look at its arguments."""
    original = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: (look(a, k), original(*a, **k))[1])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- Eq. 4.7


def test_loss_on_hand_computed_numbers():
    """log-ratios -2 - (-3) = 1 and -5 - (-4) = -1: margin 2; at beta 0.5 the loss is log(1 + e^-1) = 0.31326169.

    The two bugs of the seed implementation give other numbers on the same input: with the opponent's generated in
    place of its real log-probability the margin is (-2 + 4) - (-5 + 4) = 3, with the real term's sign flipped 0.
    """
    args = [torch.tensor([x]) for x in (-2.0, -5.0, -3.0, -4.0)]
    assert spin.spin_loss(*args, beta=0.5).item() == pytest.approx(0.31326169, abs=1e-7)
    assert spin.spin_loss(*args, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(-0.2)), abs=1e-7)
    two = [torch.cat([x, x * 3]) for x in args]
    expected = [math.log(1 + math.exp(-2 * b)) for b in (1, 3)]
    assert spin.spin_loss(*two, beta=1.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_gradient_raises_the_real_and_lowers_the_generated_response():
    args = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-2.0, -5.0, -3.0, -4.0)]
    spin.spin_loss(*args, beta=0.5).sum().backward()
    weight = 0.5 / (1 + math.exp(0.5 * 2))  # beta * sigmoid(-beta * margin)
    assert [x.grad.item() for x in args] == pytest.approx([-weight, weight, weight, -weight])


def test_loss_is_finite_and_not_flat_far_out():
    """log(1 + exp(-z)) at z = -+ 10^4 is 10^4 and 0; computed naively it would be inf."""
    far = torch.tensor([1e4, -1e4])
    zero = torch.zeros(2)
    assert spin.spin_loss(far, zero, zero, zero, 1.0).tolist() == [0.0, 1e4]


def expected_loss(logits, p_data, p_opponent, beta):
    """The loss of one iteration in expectation over y ~ p_data, y' ~ p_opponent, for a table of responses."""
    logp, opponent = logits.log_softmax(0), p_opponent.log()
    real, generated = (i.flatten() for i in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    losses = spin.spin_loss(logp[real], logp[generated], opponent[real], opponent[generated], beta)
    return (p_data[real] * p_opponent[generated] * losses).sum()


TABLES = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05], [0.1, 0.2, 0.3, 0.15, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_expected_gradient_at_the_start_is_half_beta_times_the_supervised_one(beta):
    p_data, p_opponent = TABLES
    logits = p_opponent.log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(logits, p_data, p_opponent, beta), logits)
    (supervised,) = torch.autograd.grad(-(p_data * logits.log_softmax(0)).sum(), logits)
    torch.testing.assert_close(gradient, beta / 2 * supervised)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_minimiser_of_an_iteration_is_the_closed_form(beta):
    """p_{t+1} is proportional to p_t (p_data / p_t)^(1/beta): one step to the data at beta = 1."""
    p_data, p_opponent = TABLES
    logits = p_opponent.log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits, p_data, p_opponent, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = p_opponent * (p_data / p_opponent) ** (1 / beta)
    torch.testing.assert_close(logits.softmax(0).detach(), expected / expected.sum(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("rank", [4, 0])
def test_every_iteration_starts_at_ln_2_with_a_gradient(start, data, tmp_path, rank):
    """At t = 0, 1, 2 the player begins as its opponent: the commonest LoRA bug (uclaml #29) shows from t = 1 on.

    In float32 the margins are zero but for rounding of sums of some -30 nats.
    """
    argv = flags(start, data, tmp_path / "run", rank=rank, iterations=3, mix_previous=True, lr=3e-3)
    assert spin.main(argv) == 0
    for t in range(3):
        steps = rows(tmp_path / f"run/steps-{t}.jsonl")
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert abs(steps[0]["margin"]) < 1e-5
        assert steps[0]["grad_norm"] > 1e-2
        assert steps[-1]["loss"] < LN2 - 1e-3, "nothing was learned: the test would pass without training"


@pytest.mark.parametrize("rank", [4, 0])
def test_opponent_of_iteration_1_is_the_player_after_iteration_0(start, data, tmp_path, rank):
    """The log-probabilities stored with the pairs of t = 1 are those of the saved iterate 1, not of the base."""
    argv = flags(start, data, tmp_path / "run", rank=rank, iterations=2, lr=3e-3)
    assert spin.main(argv) == 0
    player, _, _, run = begin(start, data, tmp_path / "again", rank=rank)
    pairs = rows(tmp_path / "run/pairs-1.jsonl")
    sequences = [(p["prompt_ids"], p["generated_ids"]) for p in pairs]
    stored = torch.tensor([p["opponent_generated_logp"] for p in pairs])
    base = torch.tensor(spin.sequence_logps(player, sequences, run))
    if rank:
        lora.load_adapter(player, tmp_path / "run/iterate-1")
    else:
        player = GPTNeo.from_pretrained(tmp_path / "run/iterate-1")
    torch.testing.assert_close(torch.tensor(spin.sequence_logps(player, sequences, run)), stored, atol=1e-4, rtol=0)
    assert (base - stored).abs().max() > 0.1


def test_pairs_of_the_iteration_before_are_scored_again(start, data, tmp_path):
    """Mixed-in pairs get log p_t of the new opponent, as in the official code."""
    player, train_set, _, run = begin(start, data, tmp_path / "run", rank=0)
    pairs, _ = spin.generate(player, train_set[:8], 0, run)
    spin.score(player, pairs, run)
    before = [pair.opponent_real_logp for pair in pairs]
    spin.train(player, pairs, 0, run)
    spin.score(player, pairs, run)
    assert all(abs(a - pair.opponent_real_logp) > 1e-3 for a, pair in zip(before, pairs))


def test_scoring_happens_once_before_training_and_with_the_one_model(start, data, tmp_path, monkeypatch):
    """No second model: every forward pass of a whole run goes through the same module."""
    models, phases = set(), []
    forward = GPTNeo.forward
    monkeypatch.setattr(GPTNeo, "forward", lambda self, *a, **k: (models.add(id(self)), forward(self, *a, **k))[1])
    for name in ("generate", "score", "train", "evaluate"):
        original = getattr(spin, name)
        monkeypatch.setattr(spin, name, lambda *a, f=original, n=name, **k: (phases.append(n), f(*a, **k))[1])
    merges = []
    monkeypatch.setattr(lora, "merge", lambda model, f=lora.merge: (merges.append(len(phases)), f(model)))
    assert spin.main(flags(start, data, tmp_path / "run", iterations=2)) == 0
    assert phases == ["evaluate"] + ["generate", "score", "train", "evaluate"] * 2
    assert len(models) == 1
    assert merges == [len(phases)], "adapters are merged once, after the loop, never to change roles"


def test_training_moves_only_what_is_trainable(start, data, tmp_path):
    player, train_set, _, run = begin(start, data, tmp_path / "run")
    before = {name: p.clone() for name, p in player.named_parameters()}
    pairs, _ = spin.generate(player, train_set, 0, run)
    spin.score(player, pairs, run)
    spin.train(player, pairs, 0, run)
    for name, parameter in player.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_training_raises_real_and_lowers_generated_responses(start, data, tmp_path):
    """After one iteration the mean of log p(y) - log p(y') has risen, above all by the fall of log p(y')."""
    player, train_set, _, run = begin(start, data, tmp_path / "run", rank=0, lr=1e-3)
    pairs, _ = spin.generate(player, train_set, 0, run)
    spin.score(player, pairs, run)
    spin.train(player, pairs, 0, run)
    real = spin.sequence_logps(player, [(p.prompt_ids, p.real_ids) for p in pairs], run)
    generated = spin.sequence_logps(player, [(p.prompt_ids, p.generated_ids) for p in pairs], run)
    assert spin.mean([a - p.opponent_real_logp for a, p in zip(real, pairs)]) > 0.1
    assert spin.mean([a - p.opponent_generated_logp for a, p in zip(generated, pairs)]) < -0.1


def test_margins_are_zero_for_every_pair_at_the_start_of_an_iteration(start, data, tmp_path, monkeypatch):
    """Not in the mean alone: each pair's, with adapters that have already moved (t = 1)."""
    player, train_set, _, run = begin(start, data, tmp_path / "run", lr=1e-2)
    for t in range(2):
        pairs, _ = spin.generate(player, train_set, t, run)
        spin.score(player, pairs, run)
        real = spin.response_logps(player, [(p.prompt_ids, p.real_ids) for p in pairs], run)
        generated = spin.response_logps(player, [(p.prompt_ids, p.generated_ids) for p in pairs], run)
        stored = torch.tensor([(p.opponent_real_logp, p.opponent_generated_logp) for p in pairs])
        assert spin.spin_margins(real, generated, *stored.T).abs().max() < 1e-4
        spin.train(player, pairs, t, run)


def test_previous_pairs_are_mixed_in_on_request(start, data, tmp_path):
    for option, steps in ((True, 2), (None, 1)):
        out = tmp_path / str(option)
        argv = flags(start, data, out, iterations=2, mix_previous=option, batch=30, prompts=30, lr=1e-4)
        assert spin.main(argv) == 0
        first, second = (len(rows(out / f"steps-{t}.jsonl")) for t in range(2))
        assert (first, second) == (1, steps)


def test_options_reach_what_they_are_for(start, data, tmp_path, monkeypatch):
    """Sampling options the opponent's sampling and no other; beta, clip, fresh prompts and noise each iteration."""
    sampled, betas, clips, chosen = [], [], [], []
    spy(monkeypatch, spin, "sample_responses", lambda a, k: sampled.append((k, k["seed"])))
    spy(monkeypatch, spin, "spin_loss", lambda a, k: betas.append(a[-1]))
    spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", lambda a, k: clips.append(a[1]))
    spy(monkeypatch, spin, "generate", lambda a, k: chosen.append([e.prompt for e in a[1]]))
    options = {
        "temperature": 1.5,
        "top_k": 7,
        "top_p": 0.9,
        "beta": "0.5,2",
        "clip": 0.25,
        "prompts": 10,
        "iterations": 2,
    }
    assert spin.main(flags(start, data, tmp_path / "run", **options)) == 0
    settings = [(k["temperature"], k["top_k"], k["top_p"]) for k, _ in sampled]
    evaluation = [(0.0, 0, 1.0), (1.0, 0, 1.0)]
    assert settings == [(1.0, 0, 1.0), *evaluation] + [(1.5, 7, 0.9), *evaluation] * 2
    assert sampled[3][1] != sampled[6][1], "the opponent's noise is the same in every iteration"
    assert sampled[1][1] == sampled[4][1], "evaluation noise is shared by all iterates"
    assert set(betas[: len(betas) // 2]) == {0.5} and set(betas[len(betas) // 2 :]) == {2.0}
    assert set(clips) == {0.25}
    assert len(chosen[0]) == len(chosen[1]) == 10 and set(chosen[0]) != set(chosen[1])


def test_evaluation_sees_held_out_prompts_only(start, data, tmp_path, monkeypatch):
    seen = []
    spy(monkeypatch, spin, "evaluate", lambda a, k: seen.append([e.prompt for e in a[1]]))
    assert spin.main(flags(start, data, tmp_path / "run")) == 0
    _, _, heldout, _ = begin(start, data, tmp_path / "again")
    assert seen == [[e.prompt for e in heldout]] * 2


def test_micro_batches_change_nothing(start, data, tmp_path):
    """16 pairs a step, cut into single pairs, a few or not at all, give the same weights, the last small step's too."""
    ends = []
    for size in (1, 500, 10**6):
        player, train_set, _, run = begin(start, data, tmp_path / f"run{size}", micro_tokens=size, rank=0, lr=1e-3)
        pairs, _ = spin.generate(player, train_set[:40], 0, run)
        spin.score(player, pairs, run)
        spin.train(player, pairs, 0, run)
        ends.append(torch.cat([p.flatten() for p in player.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=2e-5, rtol=0)


def test_micro_batches_hold_rows_of_like_length_within_the_budget():
    tokens = [5, 30, 7, 6, 100, 9, 8, 31]
    chunks = list(spin.micro_batches(tokens, 30))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(8))
    assert [[tokens[i] for i in chunk] for chunk in chunks] == [[5, 6, 7], [8, 9], [30], [31], [100]]
    assert list(spin.micro_batches([], 30)) == []


@pytest.mark.parametrize("option", ["checkpoint", "compile"])
def test_options_for_memory_and_speed_change_nothing(start, data, tmp_path, option):
    """The same losses, step by step; the compiler's own products and sums differ by rounding."""
    if option == "compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    losses = []
    for value in (None, True):
        out = tmp_path / str(value)
        assert spin.main(flags(start, data, out, prompts=32, eval_limit=4, **{option: value})) == 0
        losses.append([row["loss"] for row in rows(out / "steps-0.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) > 1


def test_schedule_is_ten_percent_rise_then_linear_fall_to_zero():
    factors = [spin.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[55] == pytest.approx(45 / 90) and factors[99] == pytest.approx(1 / 90)
    assert [spin.schedule(step, 2, 0.0) for step in range(2)] == [1.0, 0.5]
    assert spin.schedule(0, 1, 1.0) == 1.0


def test_lists_hold_one_value_an_iteration(start, data, tmp_path):
    argv = flags(start, data, tmp_path / "run", iterations=2, lr="1e-3,5e-4", beta="0.1,5.0", epochs="1,2", warmup=0)
    assert spin.main(argv) == 0
    first, second = (rows(tmp_path / f"run/steps-{t}.jsonl") for t in range(2))
    assert first[0]["lr"] == pytest.approx(1e-3) and second[0]["lr"] == pytest.approx(5e-4)
    assert len(second) == 2 * len(first)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_optimizers_are_torch_s_over_trainable_parameters(name):
    args = spin.Args(optimizer=name, weight_decay=0.1)
    optimizer = spin.make_optimizer([torch.nn.Parameter(torch.ones(1))], args, lr=1e-3)
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[name]
    plain = kind(optimizer.param_groups[0]["params"], lr=1e-3, weight_decay=0.1 if name == "adamw" else 0)
    assert type(optimizer) is kind and optimizer.param_groups == plain.param_groups


# ---------------------------------------------------------------- mistakes seen in the wild


def known_model() -> GPTNeo:
    """No attention, no MLP, no positions: the next token depends on the current one alone, by a known table."""
    config = GPTNeoConfig(
        vocab_size=11, max_position_embeddings=32, hidden_size=8, num_layers=1, num_heads=2,
        attention_types=((("global",), 1),), bos_token_id=10, eos_token_id=10,
    )  # fmt: skip
    model = GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.transformer["wpe"].weight.zero_()
        for module in (model.transformer["h"][0].attn.attention.out_proj, model.transformer["h"][0].mlp.c_proj):
            module.weight.zero_()
    return model


def plain_run(model: GPTNeo, tmp_path, bf16=False) -> spin.Run:
    device = torch.device("cpu")
    return spin.Run(
        spin.Args(micro_tokens=20), None, model.config.eos_token_id, device,
        torch.bfloat16 if bf16 else torch.float32, tmp_path, tmp_path,
    )  # fmt: skip


def test_each_response_token_is_predicted_from_the_token_before_it(tmp_path):
    """The one-token shift, on a model whose next-token table is known: lucidrains' spin.py gathered without it."""
    model = known_model()
    wte = model.transformer["wte"].weight.detach()
    table = (torch.nn.functional.layer_norm(wte, (8,)) @ wte.T).log_softmax(-1)  # (current, next)
    sequences = [([3, 1, 4], [1, 5, 10]), ([9], [2, 6]), ([5, 3], [10])]
    expected = [table[4, 1] + table[1, 5] + table[5, 10], table[9, 2] + table[2, 6], table[3, 10]]
    got = spin.response_logps(model, sequences, plain_run(model, tmp_path))
    torch.testing.assert_close(got.detach(), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked_tokens", [1024, 20])
def test_a_prompt_shared_by_two_responses(start, data, tmp_path, monkeypatch, masked_tokens):
    """Both in one row, or, beyond MASKED_TOKENS, a row each: the same log-probabilities and gradients as one by one."""
    monkeypatch.setattr(spin, "MASKED_TOKENS", masked_tokens)
    player, train_set, _, run = begin(start, data, tmp_path / "run", rank=0)
    pairs, _ = spin.generate(player, train_set[:7], 0, run)
    items = [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs]
    items[0] = (items[0][0][:1], items[0][1][-1:], items[0][2])  # a prompt of one token, a response of one
    params = [p for p in player.parameters() if p.requires_grad]
    together = spin.response_logps(player, items, run)
    apart = torch.cat([spin.response_logps(player, [(item[0], item[n])], run) for n in (1, 2) for item in items])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    weights = torch.randn(len(apart), generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad((logps * weights).sum(), params) for logps in (together, apart))):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert spin.sequence_logps(player, items, run) == pytest.approx(apart.tolist(), abs=2e-5)


def test_logps_do_not_depend_on_batch_or_padding(start, tmp_path, data):
    player, train_set, _, run = begin(start, data, tmp_path / "run", rank=0)
    sequences = [(e.prompt_ids, e.real_ids) for e in train_set[:9]]
    alone = torch.cat([spin.response_logps(player, [s], run) for s in sequences])
    torch.testing.assert_close(spin.response_logps(player, sequences, run), alone, atol=2e-5, rtol=0)
    assert spin.sequence_logps(player, sequences, run) == pytest.approx(alone.tolist(), abs=2e-5)


def test_sums_and_log_ratios_are_fp32_under_bf16(start, data, tmp_path):
    """Under bf16 autocast a response's log-probability is fp32, and 20 equal terms sum without bf16's 8 bits."""
    model = known_model()
    sequences = [([3], [7] * 20)]
    run = plain_run(model, tmp_path, bf16=True)
    one = spin.response_logps(model, [([7], [7])], run)
    total = spin.response_logps(model, sequences, run)
    first = spin.response_logps(model, [([3], [7])], run)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx((first + 19 * one).item(), rel=1e-5)


def tokenizer_of(start):
    eos = json.loads((start / "config.json").read_text())["eos_token_id"]
    return load_tokenizer(start, eos, 10**6), eos


def test_prompt_and_response_are_encoded_apart(start):
    """'H' at the end of the prompt and 'H' at the start of the response would merge into 'HH' (TRL #1679)."""
    tokenizer, eos = tokenizer_of(start)
    assert len(tokenizer.encode("HH", add_special_tokens=False).ids) == 1
    example = Example("x:1", "H", "H", ["H"])
    encode([example], tokenizer, "{prompt}", eos)
    assert example.prompt_ids + example.real_ids == [*tokenizer.encode("H").ids * 2, eos]


@pytest.mark.parametrize("text", ["HH AH0", "HH AH0<|endoftext|>", "HH AH0<|endoftext|><|endoftext|>"])
def test_real_responses_end_with_exactly_one_eos(start, text):
    tokenizer, eos = tokenizer_of(start)
    example = Example("x:1", "a", text, [text])
    encode([example], tokenizer, "{prompt}", eos)
    assert example.real_ids == [*tokenizer.encode("HH AH0").ids, eos]


def test_eos_inside_a_response_is_refused(start):
    tokenizer, eos = tokenizer_of(start)
    with pytest.raises(ValueError, match=r"x:7: .*end-of-sequence token inside"):
        encode([Example("x:7", "a", "HH<|endoftext|>AH0", [])], tokenizer, "{prompt}", eos)


class Scripted:
    """Stands in for sampling: returns given ids."""

    def __init__(self, monkeypatch, ids, finished):
        from sampling import Samples

        samples = Samples(ids, finished, [[0.0] * len(i) for i in ids])
        monkeypatch.setattr(spin, "sample_responses", lambda *a, **k: samples)


def test_sampled_ids_are_scored_as_sampled(start, data, tmp_path, monkeypatch):
    """Ids that decoding and encoding would change ('H', 'H' -> 'HH') stay; a cut response gets no end token."""
    player, train_set, _, run = begin(start, data, tmp_path / "run")
    h = run.tokenizer.encode("H").ids[0]
    assert run.tokenizer.encode(run.tokenizer.decode([h, h])).ids != [h, h]
    ids = [[h, h, run.eos_token_id], [h] * 8]
    Scripted(monkeypatch, ids, [True, False])
    pairs, counts = spin.generate(player, train_set[:2], 0, run)
    assert [pair.generated_ids for pair in pairs] == ids
    assert counts["truncated"] == 0.5 and counts["generated_length"] == 5.5
    seen = []
    monkeypatch.setattr(spin, "linear_logprobs", lambda hidden, w, targets: seen.append(targets) or targets.float())
    spin.score(player, pairs[:1], run)
    assert [h, h, run.eos_token_id] in [seen[0].tolist()[-3:], seen[0].tolist()[:3]]


def test_end_token_equal_to_the_padding_id_is_still_scored(start, data, tmp_path, monkeypatch):
    """Padding is told by length, never by id: a response that holds the id 0 used as filler counts in full."""
    player, _, _, run = begin(start, data, tmp_path / "run", rank=0)
    seen = []
    real = spin.linear_logprobs
    monkeypatch.setattr(spin, "linear_logprobs", lambda h, w, targets: seen.append(targets) or real(h, w, targets))
    spin.response_logps(player, [([5, 0, 0], [0, 0, run.eos_token_id]), ([7], [0])], run)
    assert seen[0].tolist() == [0, 0, run.eos_token_id, 0]


def test_unfinished_responses_keep_drop_cut(start, data, tmp_path, monkeypatch):
    for option, pairs_left, real_length in (("keep", 2, None), ("drop", 1, None), ("cut", 2, 3)):
        player, train_set, _, run = begin(start, data, tmp_path / option, unfinished=option)
        long = [e for e in train_set if len(e.real_ids) > 5][:2]
        Scripted(monkeypatch, [[1, 2, run.eos_token_id], [1, 2, 3]], [True, False])
        pairs, counts = spin.generate(player, long, 0, run)
        assert len(pairs) == pairs_left and counts["truncated"] == 0.5
        assert pairs[0].real_ids == long[0].real_ids, "a finished pair is left alone"
        if option != "drop":
            assert pairs[1].real_ids == long[1].real_ids[:real_length]


def test_identical_pairs_are_dropped_and_counted(start, data, tmp_path, monkeypatch):
    player, train_set, _, run = begin(start, data, tmp_path / "run")
    Scripted(monkeypatch, [train_set[0].real_ids, [1, run.eos_token_id]], [True, True])
    pairs, counts = spin.generate(player, train_set[:2], 0, run)
    assert counts["identical"] == 1 and counts["pairs"] == 1 and pairs[0].generated_ids == [1, run.eos_token_id]


def test_nothing_but_identical_pairs_ends_the_run_in_words(start, data, tmp_path, monkeypatch):
    player, train_set, _, run = begin(start, data, tmp_path / "run")
    Scripted(monkeypatch, [train_set[0].real_ids], [True])
    with pytest.raises(spin.Stopped, match="iteration 0: no pair is left"):
        spin.generate(player, train_set[:1], 0, run)


def test_generation_and_training_see_the_same_prompt(start, data, tmp_path, monkeypatch):
    """One template, encoded once: the ids that were sampled from are the ids that are trained on (uclaml #33)."""
    prompts = []
    original = spin.sample_responses
    monkeypatch.setattr(spin, "sample_responses", lambda m, p, **k: (prompts.extend(p), original(m, p, **k))[1])
    player, train_set, _, run = begin(start, data, tmp_path / "run", template="Say {prompt}: ")
    pairs, _ = spin.generate(player, train_set[:4], 0, run)
    assert [pair.prompt_ids for pair in pairs] == prompts
    assert run.tokenizer.decode(prompts[0]) == f"Say {train_set[0].prompt}: "


def test_over_long_examples_are_an_error_or_counted(start):
    tokenizer, eos = tokenizer_of(start)
    examples = [Example("f:1", "ab", "HH", []), Example("f:2", "a" * 60, "HH", [])]
    encode(examples, tokenizer, "{prompt}", eos)
    with pytest.raises(ValueError, match=r"f:2: needs 68 tokens .*context is 64"):
        fit_context(examples, 64, 8, "error")
    kept, skipped = fit_context(examples, 64, 8, "skip")
    assert [e.where for e in kept] == ["f:1"] and skipped == 1
    assert examples[1].real_ids[-1] == eos, "nothing was cut"


def test_scoring_is_free_of_dropout_and_of_the_global_generator(start, data, tmp_path):
    player, train_set, _, run = begin(start, data, tmp_path / "run", lora_dropout=0.5)
    for parameter in player.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    player.train()
    state = torch.random.get_rng_state()
    sequences = [(e.prompt_ids, e.real_ids) for e in train_set[:4]]
    assert spin.sequence_logps(player, sequences, run) == spin.sequence_logps(player, sequences, run)
    assert torch.equal(state, torch.random.get_rng_state())


def test_generators_are_private_to_seed_iteration_and_purpose():
    draws = {
        torch.rand((), generator=spin.generator(seed, t, purpose)).item()
        for seed in (0, 1) for t in (0, 1) for purpose in ("generate", "shuffle")
    }  # fmt: skip
    assert len(draws) == 8
    assert torch.rand((), generator=spin.generator(1, 1, "x")) == torch.rand((), generator=spin.generator(1, 1, "x"))


def test_signs_of_degeneration_are_logged(start, data, tmp_path):
    assert spin.main(flags(start, data, tmp_path / "run")) == 0
    step = rows(tmp_path / "run/steps-0.jsonl")[0]
    assert {"loss", "margin", "accuracy", "real_logp", "generated_logp", "grad_norm", "lr"} <= set(step)
    first, last = rows(tmp_path / "run/metrics.jsonl")
    assert {"truncated", "identical", "real_length", "generated_length", "kl", "kl_se"} <= set(last)
    assert first["kl"] == 0 and last["kl"] > 0


def test_kl_to_the_start_is_that_of_the_whole_distribution(tmp_path):
    """One-token responses, where KL(theta_0 || theta) is a sum over 11 tokens: the estimate agrees within 5 se."""
    model = known_model()
    run = plain_run(model, tmp_path)
    prompt = [3]
    before = model.logits(model(torch.tensor([prompt])))[0, -1].detach().log_softmax(-1)
    draws = torch.multinomial(before.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    sequences = [(prompt, [token]) for token in draws.tolist()]
    start_logps = spin.sequence_logps(model, sequences, run)
    with torch.no_grad():
        model.transformer["ln_f"].weight.mul_(3.0)
    after = model.logits(model(torch.tensor([prompt])))[0, -1].detach().log_softmax(-1)
    exact = (before.exp() * (before - after)).sum().item()
    now = spin.sequence_logps(model, sequences, run)
    estimate = report.with_se("kl", [a - b for a, b in zip(start_logps, now)])
    assert exact > 1e-3
    assert abs(estimate["kl"] - exact) <= 5 * estimate["kl_se"]


def test_same_seed_same_run_other_seed_other_run(start, data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert spin.main(flags(start, data, tmp_path / name, seed=seed, iterations=2)) == 0
    a, b, c = (rows(tmp_path / name / "pairs-1.jsonl") for name in "abc")
    assert a == b != c


def test_a_rerun_appends_nothing(start, data, tmp_path, capsys):
    """The same command once more says that the run is finished and changes nothing (uclaml #10: duplicate rows)."""
    argv = flags(start, data, tmp_path / "run")
    assert spin.main(argv) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert spin.main(argv) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert not [p for p in before if p.suffix == ".tmp"]
    assert len(rows(tmp_path / "run/metrics.jsonl")) == 2


# ---------------------------------------------------------------- evaluation, files, sft


def test_edit_distance_on_known_pairs():
    assert (
        report.distance("kitten", "sitting") == 3
        and report.distance("", "abc") == 3
        and report.distance("abc", "") == 3
    )
    assert report.nearest_edits("A B C", ["A B", "A B C D"]) == (1, 4)
    assert report.nearest_edits("A B", ["X", "A B"]) == (0, 2)


def test_standard_errors_of_mean_and_ratio():
    """Of a mean: sqrt(p (1 - p) / n). Of a ratio: against the spread over 2000 resampled data sets."""
    row = report.with_se("x", [1.0, 0.0, 0.0, 0.0])
    assert row["x"] == 0.25 and row["x_se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    rng = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (300,), generator=rng).double()
    values = weights * 2 + torch.randn(300, generator=rng)
    row = report.with_se("x", values.tolist(), weights.tolist())
    index = torch.randint(300, (2000, 300), generator=rng)
    resampled = values[index].sum(1) / weights[index].sum(1)
    assert row["x_se"] == pytest.approx(resampled.std().item(), rel=0.1)


def test_evaluation_counts_any_reference_as_right(start, data, tmp_path, monkeypatch):
    player, _, heldout, run = begin(start, data, tmp_path / "run")
    base = spin.StartSamples([(heldout[0].prompt_ids, heldout[0].real_ids)], [0.0])
    heldout = [dataclasses.replace(heldout[0], references=["A B", "HH AH0"]), heldout[1]]
    right = [*run.tokenizer.encode("HH AH0").ids, run.eos_token_id]
    Scripted(monkeypatch, [right, [1, 2]], [True, False])
    row = spin.evaluate(player, heldout, base, run, iterate=0)
    assert row["greedy"] == row["sampled"] == 0.5
    logps = spin.sequence_logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], run)
    assert row["nll"] == pytest.approx(-sum(logps) / sum(len(e.real_ids) for e in heldout))


def test_perfect_responses_count_as_right_whatever_surrounds_them(start, tmp_path):
    """White space or an end-of-sequence text around a reference is not asked of the player."""
    path = tmp_path / "x.jsonl"
    texts = ["HH AH0\n", " HH AH0", "HH AH0<|endoftext|>", "HH AH0"]
    path.write_text("".join(json.dumps({"prompt": f"w{i}", "response": t}) + "\n" for i, t in enumerate(texts * 9)))
    _, _, heldout, run = begin(start, path, tmp_path / "run")
    for example in heldout:
        assert spin.decode(example.real_ids, run.tokenizer, run.eos_token_id) in example.references == ["HH AH0"]


def test_recipes_hold_out_the_same_words():
    """Of the start's making, of the default run and of its supervised rival, so that none is trained on anywhere."""
    from conftest import ROOT

    parsed = [
        spin.parse([command, f"@{ROOT}/recipes/{name}.args"])[1]
        for command, name in (("sft", "pronounce-sft"), ("spin", "pronounce"), ("sft", "pronounce-continue"))
    ]
    assert len({(a.eval_share, a.data, a.template, a.eval_data) for a in parsed}) == 1
    assert spin.parse([])[1] == parsed[1] and spin.parse(["sft"])[1] == parsed[0]


def test_recipes_work_in_a_folder_with_a_space(tmp_path, monkeypatch):
    from conftest import ROOT

    monkeypatch.setattr(options, "HERE", tmp_path / "a b")
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/recipes").symlink_to(ROOT / "recipes")
    assert spin.parse([])[1].model == f"{tmp_path}/a b/pronounce/start"


def test_no_held_out_word_is_ever_trained_on(start, data, tmp_path):
    _, train_set, heldout, _ = begin(start, data, tmp_path / "a")
    _, sft_train, sft_heldout, _ = begin(
        start, data, tmp_path / "b", command="sft", from_scratch=True, rank=0, beta=None
    )
    assert not {e.prompt for e in train_set} & {e.prompt for e in heldout}
    assert [e.prompt for e in heldout] == [e.prompt for e in sft_heldout]
    assert [e.prompt for e in train_set] == [e.prompt for e in sft_train]
    share = sum(held_out(f"word{i}", 0.1) for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 0.01


def test_official_layout_equals_the_plain_one(tmp_path):
    plain, official = tmp_path / "plain.jsonl", tmp_path / "official.jsonl"
    plain.write_text('{"prompt": "q", "response": "a"}\n\n')
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    official.write_text(json.dumps({"real": turns, "generated": turns}) + "\n")
    (a,), (b,) = load_examples(plain), load_examples(official)
    assert (a.prompt, a.response, a.references) == (b.prompt, b.response, b.references) == ("q", "a", ["a"])


def test_gpt2_style_tokenizer_equals_tokenizer_json(tmp_path):
    """vocab.json + merges.txt in a directory gives the ids that transformers' GPT-2 tokenizer gives."""
    from conftest import ROOT
    from transformers import GPT2TokenizerFast

    tokenizer = json.loads((ROOT / "pronounce/start/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] | {"<|endoftext|>": len(tokenizer["model"]["vocab"])}
    merges = ["#version: 0.2"] + [" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    ours = load_tokenizer(tmp_path, vocab["<|endoftext|>"], len(vocab))
    theirs = GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in ("HH AH0 L OW1", "### Instruction: x\n\n### Response: ", "caf\u00e9 \u4f60 12", " <|endoftext|>"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_final_model_is_the_last_iterate_in_plain_layout(start, data, tmp_path):
    """final/ loads without adapters, here and in transformers, and scores as the last iterate does."""
    from transformers import GPTNeoForCausalLM

    assert spin.main(flags(start, data, tmp_path / "run")) == 0
    player, _, heldout, _ = begin(start, data, tmp_path / "again")
    lora.load_adapter(player, tmp_path / "run/iterate-1")
    final = GPTNeo.from_pretrained(tmp_path / "run/final")
    ids = torch.tensor([heldout[0].prompt_ids])
    expected = player.logits(player(ids))
    torch.testing.assert_close(final.logits(final(ids)), expected, atol=1e-4, rtol=0)
    theirs = GPTNeoForCausalLM.from_pretrained(tmp_path / "run/final")
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=0)


def test_sft_minimises_the_mean_token_loss(start, data, tmp_path):
    """The logged loss of the first step is the NLL of its batch over the mean length; training lowers held-out NLL."""
    out = tmp_path / "run"
    assert spin.main(["sft", *flags(start, data, out, rank=0, epochs=5, lr=1e-2, batch=500, beta=None)]) == 0
    player, train_set, _, run = begin(start, data, tmp_path / "again", rank=0)
    logps = spin.sequence_logps(player, [(e.prompt_ids, e.real_ids) for e in train_set], run)
    tokens = sum(len(e.real_ids) for e in train_set)
    assert rows(out / "steps-0.jsonl")[0]["loss"] == pytest.approx(-sum(logps) / tokens, rel=1e-5)
    before, after = rows(out / "metrics.jsonl")
    assert after["nll"] < before["nll"] - 0.1


def test_bf16_run_keeps_small_updates(start, data, tmp_path):
    """bf16: the frozen base is bf16 under LoRA, everything trained is fp32, in full-parameter training too."""
    for rank in (4, 0):
        player, _, _, _ = begin(start, data, tmp_path / f"run{rank}", rank=rank, precision="bf16")
        trained = {p.dtype for p in player.parameters() if p.requires_grad}
        frozen = {p.dtype for p in player.parameters() if not p.requires_grad}
        assert trained == {torch.float32} and frozen == ({torch.bfloat16} if rank else set())
        assert spin.main(flags(start, data, tmp_path / f"main{rank}", rank=rank, precision="bf16", lr=1e-3)) == 0
        first = rows(tmp_path / f"main{rank}/steps-0.jsonl")[0]
        assert first["loss"] == pytest.approx(LN2, abs=5e-3)


def test_final_model_of_a_bf16_run_keeps_the_fp32_base(start, data, tmp_path):
    """The adapter is merged into the base as it is on disk, not into the bf16 copy that was trained on."""
    assert spin.main(flags(start, data, tmp_path / "run", precision="bf16", lr=1e-4)) == 0
    expected = GPTNeo.from_pretrained(start)
    lora.load_adapter(expected, tmp_path / "run/iterate-1")
    lora.merge(expected)
    lora.remove_lora(expected)
    final = GPTNeo.from_pretrained(tmp_path / "run/final")
    for name, parameter in final.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    wte = final.transformer["wte"].weight
    assert not torch.equal(wte, wte.bfloat16().float()), "nothing would be lost in bf16: the test would prove nothing"


# ---------------------------------------------------------------- help and flags


def test_every_option_has_help_and_one_default(capsys):
    assert len(options.field_comments(spin.Args)) == len(dataclasses.fields(spin.Args))
    with pytest.raises(SystemExit) as done:
        spin.parse(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(spin.Args):
        assert ("--" + field.name.replace("_", "-") in text) == (field.name != "from_scratch")


def test_published_recipe_parses_to_the_published_values():
    from conftest import ROOT

    _, args = spin.parse([f"@{ROOT}/recipes/paper.args", "--model", "m", "--data", "d"])
    assert args.lr == (5e-7, 5e-7, 1e-7, 1e-7) and args.beta == (0.1, 0.1, 0.1, 5.0) and args.epochs == (2,)
    assert args.optimizer == "rmsprop" and args.rank == 0 and args.batch == 64 and args.mix_previous
    assert args.prompts == 50000 and args.max_new_tokens == 256 and args.model == "m"


def test_model_may_be_a_hub_id(start, data, tmp_path, monkeypatch, capsys):
    """owner/name is fetched once for safetensors, and again for .bin files only where there are none.

    The commit that the hub answers with is in the run's record, and a run that goes on asks for that one.
    """
    import huggingface_hub

    asked, commit = [], "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(start, tmp_path / commit)

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, [p for p in allow_patterns if "model" in p]))
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    finish = spin.finish
    monkeypatch.setattr(spin, "finish", lambda *a: 1 / 0)  # dies before its end
    with pytest.raises(ZeroDivisionError):
        spin.main(flags("owner/gpt-neo.tiny", data, tmp_path / "run"))
    assert json.loads((tmp_path / "run/run.json").read_text())["revision"] == commit
    monkeypatch.setattr(spin, "finish", finish)
    assert spin.main(flags("owner/gpt-neo.tiny", data, tmp_path / "run")) == 0
    assert spin.main(flags("owner/gpt-neo.tiny@v2", data, tmp_path / "other")) == 0
    weights = ["model*.safetensors*"]
    assert asked == [("owner/gpt-neo.tiny", revision, weights) for revision in (None, commit, "v2")]
    (tmp_path / commit / "model.safetensors").rename(tmp_path / "away")
    assert spin.main(flags("owner/old", data, tmp_path / "again")) == 2
    assert asked[-1] == ("owner/old", commit, ["pytorch_model*.bin*"])

    def offline(name, **options):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    capsys.readouterr()
    assert spin.main(flags("owner/name", data, tmp_path / "again")) == 2
    error = capsys.readouterr().err
    assert "--model owner/name" in error and "no network" in error and error.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [4, 0])
def test_whole_run_on_cuda(start, data, tmp_path, precision, rank):
    argv = flags(start, data, tmp_path / "run", device="cuda", precision=precision, rank=rank, iterations=2, lr=1e-3)
    assert spin.main(argv) == 0
    for t in range(2):
        first = rows(tmp_path / f"run/steps-{t}.jsonl")[0]
        assert first["loss"] == pytest.approx(LN2, abs=1e-5 if precision == "fp32" else 1e-2)
