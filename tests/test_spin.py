"""spin.py: the loss, Algorithm 1 and its phases, the optimizer; among them mistakes that were seen in the wild."""

import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers import TABLES, begin, flags, known_model, player_of, rows, script_responses, spy

import lora
import model as model_module
import player as player_module
import sampling
import spin
from model import GPTNeo
from runtime.run import Run
from runtime.stopping import Stopped
from spin import Pair

LN2 = math.log(2)


# ---------------------------------------------------------------- Eq. 4.7


def test_loss_on_hand_computed_numbers():
    """log-ratios -2 - (-3) = 1 and -5 - (-4) = -1: margin 2; at beta 0.5 the loss is log(1 + e^-1) = 0.31326169, and
    at margin -2 log(1 + e) = 1.31326169."""
    real, generated = torch.tensor([-2.0, -6.0]) + 3, torch.tensor([-5.0, -5.0]) + 4
    assert spin.spin_loss(real, generated, 0.5).tolist() == pytest.approx([0.31326169, 1.31326169], abs=1e-7)
    far = torch.tensor([1e4, -1e4])  # There log(1 + exp(-margin)) is 0 and 10^4; computed naively it would be inf.
    assert spin.spin_loss(far, torch.zeros(2), 1.0).tolist() == [0.0, 1e4]


def test_pair_loss_puts_the_four_log_probabilities_in_their_places(monkeypatch):
    """Pairs and a player that is known give the hand-computed numbers above.

    The two bugs of the seed implementation give other numbers on the same input: with the opponent's generated in
    place of its real log-probability the margin is (-2 + 4) - (-5 + 4) = 3, with the real term's sign flipped 0.
    """
    player = player_of(known_model())
    logps = torch.tensor([[-2.0, -6.0, -8.0], [-5.0, -15.0, -8.0]], requires_grad=True)  # (real, generated) by pair
    asked = []
    monkeypatch.setattr(player, "response_logps", lambda items: (asked.extend(items), logps)[1])
    pairs = [
        Pair([1], [2, 3, 10], [[4, 10]], True, "", -3.0, [-4.0]),
        Pair([5], [6, 10], [[7]], False, "", -9.0, [-12.0]),
        Pair([8], [9, 10], [[9, 10]], True, "", -7.0, [-7.0]),
    ]
    values = spin.pair_loss(player, pairs, 0.5)
    assert asked == [([1], [2, 3, 10], [4, 10]), ([5], [6, 10], [7]), ([8], [9, 10], [9, 10])]
    expected = [math.log(1 + math.exp(-margin)) for margin in (1, 3, 0)]
    assert values["loss"].tolist() == pytest.approx(expected, abs=1e-6)
    assert values["margin"].tolist() == pytest.approx([1.0, 3.0, 0.0])
    assert values["accuracy"].tolist() == [1.0, 1.0, 0.0], "a tie counts as wrong"
    assert values["real_logp"].tolist() == pytest.approx([-2 / 3, -3.0, -4.0])
    assert values["generated_logp"].tolist() == pytest.approx([-2.5, -15.0, -4.0])
    values["loss"].sum().backward()
    weights = [0.5 / (1 + math.exp(margin)) for margin in (1, 3, 0)]
    assert logps.grad.flatten().tolist() == pytest.approx([-w for w in weights] + weights)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_first_gradient_of_an_iteration_is_half_beta_times_the_supervised_one(beta):
    """The gradient is an expectation over a table of responses. test_losses.py has the optimum, at alpha 0."""
    p_data, p_opponent = TABLES
    logits = p_opponent.log().requires_grad_()
    ratios = logits.log_softmax(0) - p_opponent.log()
    losses = spin.spin_loss(ratios[:, None], ratios[None], beta)  # losses by real and generated response
    (gradient,) = torch.autograd.grad((p_data[:, None] * p_opponent * losses).sum(), logits)
    (supervised,) = torch.autograd.grad(-(p_data * logits.log_softmax(0)).sum(), logits)
    torch.testing.assert_close(gradient, beta / 2 * supervised)


# ---------------------------------------------------------------- Algorithm 1


@pytest.fixture(scope="module", params=[4, 0])
def played(request, start, data, tmp_path_factory) -> tuple[Path, int]:
    """(folder, rank) of a run of three iterations."""
    out = tmp_path_factory.mktemp("played") / "run"
    options = dict(rank=request.param, iterations=3, mix_previous=True, lr=3e-3, eval_limit=2)
    assert spin.main(flags(start, data, out, **options)) == 0
    return out, request.param


def test_every_iteration_starts_at_ln_2_with_a_gradient(played):
    """At t = 0, 1, 2 the player begins as its opponent: the commonest LoRA bug (uclaml #29) shows from t = 1 on.

    In float32 the margins are zero but for rounding of sums of some -30 nats.
    """
    for t in range(3):
        steps = rows(played[0] / f"steps-{t}.jsonl")
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert abs(steps[0]["margin"]) < 1e-5
        assert steps[0]["grad_norm"] > 1e-2
        assert steps[-1]["loss"] < LN2 - 1e-3, "nothing was learned: the test would pass without training"


def test_opponent_of_iteration_1_is_the_player_after_iteration_0(played, start, data, tmp_path):
    """The log-probabilities stored with every pair of t = 1 are those of the saved iterate 1, not of the base."""
    out, rank = played
    player, _, _ = begin(start, data, tmp_path / "again", rank=rank)
    pairs = rows(out / "pairs-1.jsonl")
    items = [(p["prompt_ids"], p["real_ids"], *p["generated_ids"]) for p in pairs]
    stored = torch.tensor([(p["opponent_real_logp"], *p["opponent_generated_logps"]) for p in pairs])
    base = torch.tensor(player.logps(items))
    if rank:
        lora.load_adapter(player.model, out / "iterate-1")
    else:
        player.model = GPTNeo.from_pretrained(out / "iterate-1")
    torch.testing.assert_close(torch.tensor(player.logps(items)), stored, atol=1e-4, rtol=0)
    assert (base - stored).abs().amax(0).min() > 0.1


def test_scoring_happens_once_before_training_and_with_the_one_model(start, data, tmp_path, monkeypatch):
    """There is no second model: every forward pass of a whole run goes through the same module."""
    models, phases, merges = set(), [], []
    spy(monkeypatch, GPTNeo, "forward", lambda a, k: models.add(id(a[0])))
    for where, name in ((spin, "generate"), (spin, "score"), (spin, "train"), (Run, "evaluate")):
        spy(monkeypatch, where, name, lambda a, k, name=name: phases.append(name))
    spy(monkeypatch, lora, "merge", lambda a, k: merges.append(len(phases)))
    assert spin.main(flags(start, data, tmp_path / "run", iterations=2, prompts=8, eval_limit=2)) == 0
    assert phases == ["evaluate"] + ["generate", "score", "train", "evaluate"] * 2
    assert len(models) == 1
    assert merges == [len(phases)], "adapters are merged once, after the loop, never to change roles"


def test_previous_pairs_are_mixed_in_on_request(played):
    """Only pairs of the last iteration are mixed in: the third iteration has none of the first."""
    pairs, steps = ([len(rows(played[0] / f"{name}-{t}.jsonl")) for t in range(3)] for name in ("pairs", "steps"))
    assert steps == [math.ceil(count / 16) for count in (pairs[0], pairs[0] + pairs[1], pairs[1] + pairs[2])]


def test_options_reach_what_they_are_for(start, data, tmp_path, monkeypatch):
    """The opponent samples as asked, nothing else does; beta, lr, epochs, clip and checkpoint act; prompts and noise
    are new every time. Lists hold one value per iteration. Signs of degeneration are logged."""
    sampled, betas, clips, chosen, recomputed = [], [], [], [], []
    spy(monkeypatch, sampling, "respond", lambda a, k: sampled.append(k))
    spy(monkeypatch, spin, "pair_loss", lambda a, k: betas.append(a[2]))
    spy(monkeypatch, torch.nn.utils, "clip_grad_norm_", lambda a, k: clips.append(a[1]))
    spy(monkeypatch, spin, "generate", lambda a, k: chosen.append([e.prompt for e in a[1]]))
    spy(monkeypatch, model_module, "checkpoint", lambda a, k: recomputed.append(a[0]))
    options = dict(temperature=1.5, top_k=7, top_p=0.9, beta=[0.5, 2], clip=0.25, prompts=10, checkpoint=True, batch=5)
    options |= dict(lr=[1e-3, 5e-4], epochs=[1, 2], warmup=0, gen_batch=3, gen_tokens=999)
    assert spin.main(flags(start, data, tmp_path / "run", iterations=2, eval_limit=4, **options)) == 0
    settings = [(k["temperature"], k.get("top_k", 0), k.get("top_p", 1.0)) for k in sampled]
    evaluation = [(0.0, 0, 1.0), (1.0, 0, 1.0)]
    assert settings == [(1.0, 0, 1.0), *evaluation, (0.8, 0, 1.0)] + [(1.5, 7, 0.9), *evaluation] * 2
    assert sampled[4]["seed"] != sampled[7]["seed"], "the opponent's noise is the same in every iteration"
    assert sampled[1]["seed"] == sampled[5]["seed"], "evaluation noise is shared by all iterates"
    assert {(k["max_new_tokens"], k["batch_size"], k["cache_tokens"]) for k in sampled} == {(8, 3, 999)}
    first, second = (rows(tmp_path / f"run/steps-{t}.jsonl") for t in range(2))
    assert betas == [0.5] * betas.count(0.5) + [2.0] * betas.count(2.0) and set(betas) == {0.5, 2.0}
    assert (first[0]["lr"], second[0]["lr"]) == pytest.approx((1e-3, 5e-4)) and len(second) == 2 * len(first)
    assert {"loss", "margin", "accuracy", "real_logp", "generated_logp", "grad_norm", "lr"} <= set(first[0])
    before, after, _ = rows(tmp_path / "run/metrics.jsonl")
    assert {"truncated", "identical", "real_length", "generated_length", "kl", "kl_se"} <= set(after)
    assert before["kl"] == 0 < after["kl"]
    assert set(clips) == {0.25} and recomputed
    assert len(chosen[0]) == len(chosen[1]) == 10 and set(chosen[0]) != set(chosen[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [4, 0])
def test_whole_run_on_cuda(start, data, tmp_path, precision, rank):
    argv = flags(start, data, tmp_path / "run", device="cuda", precision=precision, rank=rank, iterations=2, lr=1e-3)
    assert spin.main(argv) == 0
    for t in range(2):
        first = rows(tmp_path / f"run/steps-{t}.jsonl")[0]
        assert first["loss"] == pytest.approx(LN2, abs=1e-5 if precision == "fp32" else 1e-2)


# ---------------------------------------------------------------- generate and select


def test_sampled_ids_are_scored_as_sampled(start, data, tmp_path, monkeypatch):
    """Ids that decoding and encoding would change ('H', 'H' -> 'HH') stay; a cut response gets no end token."""
    player, examples, run = begin(start, data, tmp_path / "run")
    h = run.work.tokenizer.encode("H").ids[0]
    assert run.work.tokenizer.encode(run.work.tokenizer.decode([h, h])).ids != [h, h]
    ids = [[h, h, run.work.eos_token_id], [h] * 8]
    script_responses(monkeypatch, ids, [True, False])
    pairs, counts = spin.generate(player, examples[:2], 0, run)
    assert [pair.generated_ids for pair in pairs] == [[i] for i in ids]
    assert (counts["truncated"], counts["generated_length"]) == (0.5, 5.5)
    assert counts["real_length"] == fmean(len(e.real_ids) for e in examples[:2]) != 5.5
    seen = []
    spy(monkeypatch, player_module, "linear_logprobs", lambda a, k: seen.append(a[2].tolist()))
    spin.score(player, pairs[:1], run)
    assert [h, h, run.work.eos_token_id] in [seen[0][-3:], seen[0][:3]]


def test_generation_and_training_see_the_same_prompt(start, data, tmp_path, monkeypatch):
    """The template is encoded once: the ids that were sampled from are the ids that are trained on (uclaml #33)."""
    prompts = []
    spy(monkeypatch, sampling, "respond", lambda a, k: prompts.extend(a[1]))
    player, examples, run = begin(start, data, tmp_path / "run", template="Say {prompt}: ")
    pairs, _ = spin.generate(player, examples[:4], 0, run)
    assert [pair.prompt_ids for pair in pairs] == prompts
    assert run.work.tokenizer.decode(prompts[0]) == f"Say {examples[0].prompt}: "


@pytest.mark.parametrize("option, pairs_left, real_length", [("keep", 2, None), ("drop", 1, None), ("cut", 2, 3)])
def test_unfinished_responses(option, pairs_left, real_length, start, data, tmp_path, monkeypatch):
    player, examples, run = begin(start, data, tmp_path / option, unfinished=option)
    long = [e for e in examples if len(e.real_ids) > 5][:2]
    script_responses(monkeypatch, [[1, 2, run.work.eos_token_id], [1, 2, 3]], [True, False])
    pairs, counts = spin.generate(player, long, 0, run)
    assert len(pairs) == counts["pairs"] == pairs_left
    assert (counts["truncated"], counts["identical"]) == (0.5, 0)
    assert pairs[0].real_ids == long[0].real_ids, "a finished pair is left alone"
    if option != "drop":
        assert pairs[1].real_ids == long[1].real_ids[:real_length]


def test_identical_pairs_are_dropped_and_counted(start, data, tmp_path, monkeypatch):
    player, examples, run = begin(start, data, tmp_path / "run")
    script_responses(monkeypatch, [examples[0].real_ids, [1, run.work.eos_token_id]], [True, True])
    pairs, counts = spin.generate(player, examples[:2], 0, run)
    assert counts["identical"] == counts["pairs"] == 1
    assert pairs[0].generated_ids == [[1, run.work.eos_token_id]]
    script_responses(monkeypatch, [examples[0].real_ids], [True])
    pairs, counts = spin.generate(player, examples[:1], 0, run)
    assert pairs == [] and counts["identical"] == 1
    with pytest.raises(Stopped, match="iteration 0: nothing is left to train on"):
        spin.train(player, pairs, 0, run)


# ---------------------------------------------------------------- score and train


def scored(player, examples, run, t: int = 0) -> list[Pair]:
    pairs, _ = spin.generate(player, examples, t, run)
    spin.score(player, pairs, run)
    return pairs


def test_training_raises_real_and_lowers_generated_responses(start, data, tmp_path):
    """After one iteration the mean of log p(y) - log p(y') has risen, above all by the fall of log p(y').

    Scored again, as pairs of --mix-previous are, all pairs get log p_t of the new opponent, as in the official code.
    """
    player, examples, run = begin(start, data, tmp_path / "run", rank=0, lr=1e-3)
    pairs = scored(player, examples, run)
    before = [(p.opponent_real_logp, *p.opponent_generated_logps) for p in pairs]
    spin.train(player, pairs, 0, run)
    real = player.logps([(p.prompt_ids, p.real_ids) for p in pairs])
    generated = player.logps([(p.prompt_ids, *p.generated_ids) for p in pairs])
    assert fmean(now - old for (now,), (old, _) in zip(real, before)) > 0.1
    assert fmean(now - old for (now,), (_, old) in zip(generated, before)) < -0.1
    spin.score(player, pairs, run)
    assert [p.opponent_real_logp for p in pairs] == pytest.approx([now for (now,) in real], abs=1e-4)


# ---------------------------------------------------------------- the optimizer


def test_micro_batches_change_nothing(start, data, tmp_path, monkeypatch):
    """16 pairs per step, cut into single pairs, a few or not at all, give the same weights, the last small step's too.

    Neither the mean loss nor the norm of its gradient, before it is clipped, depends on the cut.
    """
    ends, logs = [], []
    for size in (1, 150, 10**6):
        out = tmp_path / f"run{size}"
        player, examples, run = begin(start, data, out, micro_tokens=size, rank=0, lr=1e-3)
        pairs = scored(player, examples[:40], run)
        counts = []
        spy(monkeypatch, player, "response_logps", lambda a, k, counts=counts: counts.append(len(a[0])))
        spin.train(player, pairs, 0, run)
        ends.append(torch.cat([p.flatten() for p in player.model.parameters()]))
        logs.append([value for row in rows(out / "steps-0.jsonl") for value in (row["loss"], row["grad_norm"])])
        assert (max(counts) == 1, max(counts) == 16) == (size == 1, size == 10**6)
        assert size != 150 or len(set(counts)) > 1, "micro-batches of one size would hide a wrong weight"
    for end, log in zip(ends[1:], logs[1:]):
        torch.testing.assert_close(end, ends[0], atol=2e-5, rtol=0)
        assert log == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_every_step_is_at_the_rate_of_the_schedule(start, data, tmp_path, monkeypatch, name):
    """The optimizer steps with --lr times the schedule's factor, over all parameters that are trained and no other."""
    kind = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[name]
    used, kinds = [], []
    spy(monkeypatch, kind, "step", lambda a, k: (used.append(a[0].param_groups[0]["lr"]), kinds.append(a[0])))
    options = dict(optimizer=name, lr=2e-3, epochs=2, warmup=0.25, weight_decay=0.1)
    player, examples, run = begin(start, data, tmp_path / "run", **options)
    pairs = scored(player, examples[:40], run)
    spin.train(player, pairs, 0, run)
    steps = 2 * math.ceil(len(pairs) / 16)
    assert used == pytest.approx([2e-3 * spin.schedule(step, steps, 0.25) for step in range(steps)])
    (group,) = kinds[0].param_groups
    assert group["weight_decay"] == (0.1 if name == "adamw" else 0), "weight decay reaches AdamW alone"
    assert not group.get("fused"), "one kernel for all parameters is for GPUs: on a CPU it would round differently"
    assert {id(p) for p in group["params"]} == {id(p) for p in player.model.parameters() if p.requires_grad}
