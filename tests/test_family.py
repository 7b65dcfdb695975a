"""methods/family.py: the methods against a float64 implementation, their pairs, references and options in whole runs.

The optima of their losses are in test_losses.py, steps against TRL in test_trl.py.
"""

import contextlib
import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import assert_resumes, begin, die_at, exact_logps, flags, refused, rows, spy, write_rows
from torch import Tensor

import lora
import sampling
import sft
import spin
from methods import family
from model import GPTNeo
from runtime.stopping import Stopped
from runtime.training import Training
from runtime.work import Work
from spin import Pair

# ---------------------------------------------------------------- ten steps in float64


def exact_steps(model: GPTNeo, batches: Sequence[Tensor], loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """(steps, 2): loss and norm of its gradient before each step of AdamW, at a rate that falls from 3e-3 to 0."""
    optimizer, found = torch.optim.AdamW(model.parameters(), weight_decay=0.0), []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        found.append([loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()])
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / len(batches))
        optimizer.step()
    return torch.tensor(found)


def logged_steps(path: Path) -> Tensor:
    """Loss and norm of the gradient of each step, from the log of a run."""
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows(path)])


def logistic(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-x))


def space_by_hand(real, generated, mu=3.0, beta=0.7):
    s = [1 / (1 + mu * torch.exp(-beta * ratios)) for ratios in (real, generated)]
    return (-torch.log(s[0]) - mu * torch.log(1 - s[1])).mean()


def iris_by_hand(real, generated, order=2, beta=0.7):
    risks = [torch.exp(a * beta * ratios).mean().log() / a for a, ratios in ((order, generated), (order - 1, real))]
    return risks[0] - risks[1]


# Options, and the loss of a batch from the ratios (R, B) of its responses, real ones first.
METHODS = {
    "space": (dict(loss="space", mu=3), lambda r: space_by_hand(r[0], r[1])),
    "gsil": (dict(loss="gsil"), lambda r: (logistic(0.7 * r[0]) + logistic(-0.7 * r[1])).mean()),
    "gsil, brier": (
        dict(loss="gsil", form="brier"),
        lambda r: (1 / (1 + torch.exp(0.7 * r[0])) ** 2 + 1 / (1 + torch.exp(-0.7 * r[1])) ** 2).mean(),
    ),
    "gsil, kliep": (dict(loss="gsil", form="kliep"), lambda r: (torch.exp(0.7 * r[1]) - 0.7 * r[0]).mean()),
    "gsil, lsif": (
        dict(loss="gsil", form="lsif"),
        lambda r: (torch.exp(1.4 * r[1]) / 2 - torch.exp(0.7 * r[0])).mean(),
    ),
    "spif": (dict(loss="spif"), lambda r: ((0.7 * r[0] - 1) ** 2 + (0.7 * r[1] + 1) ** 2).mean() / 2),
    "tspin": (
        dict(loss="tspin", historical=0.4),
        lambda r: (logistic(0.7 * (r[0] - r[1])) + 0.4 * logistic(0.7 * (r[1] - r[2]))).mean(),
    ),
    "iris": (dict(loss="iris", order=2, samples=2), lambda r: iris_by_hand(r[0], r[1:])),
    "nll": (dict(samples=3, nll_weight=0.5), lambda r: logistic(0.7 * (r[0] - r[1:])).mean()),
    "sampled": (dict(reference="sampled", temperature=1.5), lambda r: logistic(0.7 * (r[0] - r[1])).mean()),
}


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_equal_an_implementation_in_float64(start, data, tmp_path, monkeypatch, method):
    """The whole step is compared: references, loss, AdamW and schedule, micro-batches that cut the batches. The other
    implementation uses no kernel, and its equations are those of the papers."""
    options, loss_of = METHODS[method]
    # IRIS weighs a pair by its share of a micro-batch, which the equations take for the whole batch.
    micro_tokens = 10**6 if options.get("loss") == "iris" else 100
    settings = dict(rank=0, lr=3e-3, warmup=0, batch=4, micro_tokens=micro_tokens, beta=0.7, iterations=2)
    player, examples, run = begin(start, data, tmp_path / "run", "family", **settings, **options)
    t = 1 if options.get("loss") == "tspin" else 0
    pairs, _ = family.generate(player, examples[:48], t, run)
    pairs = pairs[:40]
    family.score(player, pairs, run)
    exact = copy.deepcopy(player.model).double()
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    signals = family.train(player, pairs, t, run)
    ours = logged_steps(run.folder.path / f"steps-{t}.jsonl")

    items = [(p.prompt_ids, *p.responses) for p in pairs]
    assert {len(item) for item in items} == {2 + options.get("samples", 1) + t}
    with torch.no_grad():
        reference = 0 * exact_logps(exact, items) if t else exact_logps(exact, items, run.args.temperature)

    def loss_of_batch(batch: Tensor) -> Tensor:
        logps = exact_logps(exact, [items[i] for i in batch])
        lengths = torch.tensor([len(items[i][1]) for i in batch])
        return loss_of(logps - reference[:, batch]) - options.get("nll_weight", 0) * (logps[0] / lengths).mean()

    assert len(ours) == 10 and ours[:, 0].max() - ours[:, 0].min() > 0.01
    expected = exact_steps(exact, torch.arange(40).split(4), loss_of_batch)
    torch.testing.assert_close(ours, expected, rtol=5e-4, atol=2e-4)
    assert signals.get("order") == (run.args.order if run.args.loss == "iris" else None)


def test_the_adaptive_order_grows_with_the_gap():
    """The order is 1/2 for an opponent that writes like the data, and 2 at most."""
    pairs = [Pair([1], [2, 3], [[4, 5, 6, 7]], True, "", -2.0, [-4.0]) for _ in range(2)]
    assert family.adaptive_order(pairs) == 0.5
    orders = []
    for gap in (0.2, -0.2, 4.0, 1000.0):
        pairs[0].opponent_real_logp = -2.0 - 4 * gap  # The gap is a mean over two tokens and two pairs.
        orders.append(family.adaptive_order(pairs))
    assert orders[0] == orders[1] == pytest.approx(2 - 1.5 * math.exp(-0.2)) and orders[0] < orders[2] < orders[3] <= 2


# ---------------------------------------------------------------- several responses to a prompt


def test_pairs_hold_all_responses(start, data, tmp_path):
    """--samples 3 adds two responses, mostly others than the first; previous pairs are mixed in, IRIS has its order."""
    options = dict(samples=3, iterations=2, mix_previous=True, temperature=1.3, loss="iris", adaptive_order=True)
    assert family.main(flags(start, data, tmp_path / "run", eval_limit=4, **options)) == 0
    pairs, metrics = rows(tmp_path / "run/pairs-0.jsonl"), rows(tmp_path / "run/metrics.jsonl")
    assert all(len(p["generated_ids"]) == len(p["opponent_generated_logps"]) == 3 for p in pairs)
    assert sum(ids == p["generated_ids"][0] for p in pairs for ids in p["generated_ids"][1:]) < len(pairs) / 2
    count = len(rows(tmp_path / "run/steps-1.jsonl"))
    assert count == math.ceil((metrics[1]["pairs"] + metrics[2]["pairs"]) / 16), "previous pairs are mixed in"
    assert 0.5 < metrics[1]["order"] < 2


def test_every_response_is_drawn_with_random_numbers_of_its_own_by_the_player_or_the_start(
    start, data, tmp_path, monkeypatch
):
    """Responses are the opponent's, its further samples and, from iteration 1 on, those of theta_0, whose weights the
    model has for that time only."""
    asked = []

    def respond(work, player, examples, name, seed, temperature, **options):
        asked.append((name, seed, player.model.head_weight.detach().clone()))
        return [([5], True) for _ in examples]

    monkeypatch.setattr(Work, "respond", respond)
    player, examples, run = begin(start, data, tmp_path / "run", "family", loss="tspin", samples=3, rank=0)
    head = player.model.head_weight
    first = head.detach().clone()
    with torch.no_grad():
        head += 1
    for t, responses in ((0, 3), (1, 4)):
        pairs, _ = family.generate(player, examples[:2], t, run)
        assert len(pairs[0].generated_ids) == responses
    assert len({seed for _, seed, _ in asked}) == len(asked) == 7
    assert all(seen.equal(first if name == "proto" else first + 1) for name, _, seen in asked)
    assert asked[-1][0] == "proto" and head.equal(first + 1)


def test_a_pair_is_identical_if_all_its_responses_are_and_finished_if_all_are(start, data, tmp_path, monkeypatch):
    player, examples, run = begin(start, data, tmp_path / "run", "family", samples=2)
    reals = [e.real_ids for e in examples[:3]]
    answers = iter([[(ids, True) for ids in reals], [(reals[0], True), ([5], True), ([6], False)]])
    monkeypatch.setattr(run, "sample", lambda *args: next(answers))
    pairs, counts = family.generate(player, examples[:3], 0, run)
    found = [(p.generated_ids, p.finished) for p in pairs]
    assert found == [([reals[1], [5]], True), ([reals[2], [6]], False)]
    assert counts["identical"] == 1
    assert not family.pair_of(examples[0], ([1], False), ([2], True)).finished, "as in self-reinforcement"


# ---------------------------------------------------------------- alpha-SPIN in runs


@pytest.fixture(scope="module")
def tuned(start, data, tmp_path_factory):
    """An adapter that sft made."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    argv = flags(start, data, out, rank=8, lr=3e-2, epochs=10, beta=None)
    assert sft.main(argv) == 0
    return out / "iterate-1"


def stored_logps(pairs: list[dict]) -> Tensor:
    """(2, n): the reference's log-probabilities of the real and the generated responses in pairs-<t>.jsonl."""
    return torch.tensor([[p["opponent_real_logp"], *p["opponent_generated_logps"]] for p in pairs]).T


@pytest.mark.parametrize("kind", ["adapters", "all parameters", "adapters of the start"])
def test_base_policy_is_the_start_in_every_iteration(start, data, tmp_path, tuned, kind):
    """At t = 1 the stored mixture is that of the start with 0.4 and of the saved iterate with 0.6, recomputed here. The
    start is theta_0 with the adapter that it came with, not the model below it."""
    out, options = tmp_path / "run", dict(iterations=2, lr=3e-3, alpha=0.4, beta=2, eval_limit=4)
    options |= {"all parameters": dict(rank=0), "adapters of the start": dict(rank=None, adapter=tuned)}.get(kind, {})
    assert family.main(flags(start, data, out, **options)) == 0
    player, *_ = begin(start, data, tmp_path / "again", "family", **options)
    pairs = rows(out / "pairs-1.jsonl")
    items = [(p["prompt_ids"], p["real_ids"], *p["generated_ids"]) for p in pairs]
    base = torch.tensor(player.logps(items)).T  # (2, n): real, generated
    if kind == "all parameters":
        player.model.load_weights(out / "iterate-1")
    else:
        lora.load_adapter(player.model, out / "iterate-1")
    opponent = torch.tensor(player.logps(items)).T
    torch.testing.assert_close(stored_logps(pairs), 0.6 * opponent + 0.4 * base, atol=1e-4, rtol=0)
    assert (base - opponent).abs().max() > 0.1, "else the two exchanged would have this mixture too"
    assert rows(out / "steps-0.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---------------------------------------------------------------- fictitious play


def test_the_history_of_a_prompt(start, data, tmp_path):
    """--history 0 draws from the opponents that met the prompt, in each iteration with random numbers of its own; with
    2 from the last two, evenly."""
    _, examples, run = begin(start, data, tmp_path / "run", "family", history=0)
    run.folder.begin()

    def draw(examples, t):  # The result is each example's opponent; theta_t responds [t], unfinished if t is odd.
        drawn = family.draw_from_history(examples, [([t], t % 2 == 0) for _ in examples], t, run)
        assert all(finished == (opponent % 2 == 0) for (opponent,), finished in drawn)
        return [opponent for (opponent,), _ in drawn]

    a, b = examples[:25], examples[25:50]
    assert draw(a, 0) == [0] * 25
    first = draw(a + b, 1)
    assert set(first[:25]) == {0, 1} and first[25:] == [1] * 25
    second = draw(b, 2)
    assert set(second) == {1, 2} and [n == 1 for n in first[:25]] != [n == 2 for n in second]
    _, _, run = begin(start, data, tmp_path / "two", "family", history=2)
    run.folder.begin()
    counts = [Counter(draw(a, t)) for t in range(3)]
    assert counts[2].keys() == {1, 2} and min(counts[2].values()) > 5


# ---------------------------------------------------------------- DITTO


def test_ditto_s_pairs_and_its_steps_equal_an_implementation_in_float64(start, data, tmp_path):
    """Three iterations on eight demonstrations, with three responses of each iterate per prompt, take thirteen steps.

    The pairs of an iteration are found among those that the paper names: a demonstration over a new response, over an
    older one, and a newer response over an older one, 70, 20 and 10%. All are scored under the start. The second
    implementation begins with the start and takes every step itself, by a plain log-softmax in float64.
    """
    few, out = tmp_path / "few.jsonl", tmp_path / "run"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    options = dict(ditto=True, samples=3, alpha=1.0, beta=0.5, rank=0, lr=3e-3, warmup=0, batch=8, iterations=3)
    options |= dict(eval_data=data, eval_limit=4)
    assert family.main(flags(start, few, out, **options)) == 0
    written = [[(line, tuple(ids)) for line, ids, _ in rows(out / f"responses-{t}.jsonl")] for t in range(3)]
    assert {len(lines) for lines in written} == {24} and written[0] != written[1]
    player, examples, run = begin(start, few, tmp_path / "again", "family", **options)
    line_of = {tuple(e.prompt_ids): e.line for e in examples}
    real_of = {e.line: tuple(e.real_ids) for e in examples}
    reference, exact, steps = player.model.double(), copy.deepcopy(player.model).double(), 0
    for t, metrics in enumerate(rows(out / "metrics.jsonl")[1:]):
        kinds, pairs = [0, 0, 0], rows(out / f"pairs-{t}.jsonl")
        for pair in pairs:
            line, better, (worse,) = line_of[tuple(pair["prompt_ids"])], tuple(pair["real_ids"]), pair["generated_ids"]
            authors = [k for k in range(t + 1) if (line, tuple(worse)) in written[k]]
            if better == real_of[line]:
                kinds[0 if t in authors else 1] += 1
            else:
                kinds[2] += any((line, better) in written[k] for k in range(min(authors) + 1, t + 1))
        assert sum(kinds) == len(pairs) <= metrics["generated"] == (24 + 7 + 3 if t else 24)
        assert (kinds == [len(pairs), 0, 0]) if t == 0 else (kinds[0] >= 20 and kinds[1] >= 4 and kinds[2] >= 1)

        items = [(p["prompt_ids"], p["real_ids"], *p["generated_ids"]) for p in pairs]
        with torch.no_grad():
            start_logps = exact_logps(reference, items)
        torch.testing.assert_close(stored_logps(pairs).double(), start_logps, atol=1e-4, rtol=0)
        batches = torch.randperm(len(pairs), generator=run.generator(t, "shuffle")).split(8)

        def loss_of_batch(batch: Tensor, items=items, start_logps=start_logps) -> Tensor:
            ratios = exact_logps(exact, [items[i] for i in batch]) - start_logps[:, batch]
            return logistic(0.5 * (ratios[0] - ratios[1])).mean()

        expected = exact_steps(exact, batches, loss_of_batch)
        torch.testing.assert_close(logged_steps(out / f"steps-{t}.jsonl"), expected, rtol=5e-4, atol=2e-4)
        steps += len(expected)
        assert expected[:, 0].max() > expected[:, 0].min() + 0.1
    assert steps == 13


# ---------------------------------------------------------------- given pairs, win probabilities


PAIRS = [
    {"prompt": "abc", "response": "EY1 B IY0", "generated": "S IY1", "wins": [0.9, 0.2]},
    {"prompt": "abd", "chosen": "EY1 B D", "rejected": "D IY1"},
    {
        "real": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B IY1"}],
        "generated": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}],
    },
]


@pytest.fixture
def pairs_file(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


def test_given_pairs_are_trained_on_as_they_are(start, data, tmp_path, pairs_file, monkeypatch):
    """No response of the training set is sampled, the reference is the start, each ratio begins at 0."""
    options = dict(pairs=pairs_file, eval_data=data, eval_limit=4, epochs=20, loss="sppo", batch=3)
    asked = []
    spy(monkeypatch, Work, "respond", lambda args, _: asked.append(args[3]))
    assert family.main(flags(start, None, tmp_path / "run", **options)) == 0
    assert asked == ["start", "greedy", "sampled", "sampled-0.8", "greedy", "sampled"], "to the held-out prompts only"
    player, _, run = begin(start, data, tmp_path / "again")
    stored, text = rows(tmp_path / "run/pairs-0.jsonl"), run.work.text
    found = [(text(pair["real_ids"]), text(pair["generated_ids"][0]), pair["wins"]) for pair in stored]
    expected = [("EY1 B IY0", "S IY1", [0.9, 0.2]), ("EY1 B D", "D IY1", [1.0, 0.0]), ("B IY1", "B", [1.0, 0.0])]
    assert sorted(found) == sorted(expected)
    assert all(p["generated_ids"][0][-1] == p["real_ids"][-1] == run.work.eos_token_id for p in stored)
    steps = rows(tmp_path / "run/steps-0.jsonl")
    # Ratios are 0 at first, so the loss is half the sum of the squared goals.
    goals = [0.4**2 + 0.3**2, 0.5, 0.5]
    assert steps[0]["loss"] == pytest.approx(sum(goals) / 2 / 3, abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    logps = [logp for (logp,) in player.logps([(p["prompt_ids"], p["real_ids"]) for p in stored])]
    assert logps == pytest.approx([p["opponent_real_logp"] for p in stored], abs=1e-4)


def test_equal_responses_count_where_more_than_a_margin_does(start, data, tmp_path):
    """Without a margin, or with an NLL term, equal responses have a gradient, and the closed forms include them."""
    lines = [{"prompt": "a", "chosen": "B", "rejected": "B"}, {"prompt": "b", "chosen": "B", "rejected": "D"}]
    path = write_rows(tmp_path / "pairs.jsonl", lines)
    counts = dict(logistic=1, hinge=1, ipo=1, sppo=2, space=2, gsil=2, spif=2, iris=2)
    for loss, weight, count in [(loss, 0, count) for loss, count in counts.items()] + [("logistic", 1, 2)]:
        options = dict(pairs=path, eval_data=data, loss=loss, nll_weight=weight)
        _, examples, run = begin(start, None, tmp_path / loss, "family", **options)
        pairs, counts = family.generate(None, examples, 0, run)
        assert len(pairs) == counts["pairs"] == count and counts["identical"] == 1


def test_scorer_gives_probabilities_and_filters(start, data, tmp_path):
    """The scorer sees the prompt and both texts; --min-win leaves out pairs whose real response has a lower score."""
    (tmp_path / "judge.py").write_text(
        f"REAL = {[json.loads(line)['response'] for line in data.read_text().splitlines()]}\n"
        "def judge(prompt, responses):\n"
        "    assert len(responses) == 2 and '###' not in prompt\n"
        "    return [0.9 if responses[0] in REAL and len(prompt) % 2 else 0.4, 0.1]\n"
    )
    options = dict(scorer=tmp_path / "judge.py:judge", loss="sppo", min_win=0.9)
    player, examples, run = begin(start, data, tmp_path / "run", "family", **options)
    pairs, _ = family.generate(player, examples, 0, run)
    assert {p.wins for p in pairs} == {(0.9, 0.1)}
    odd = [e.prompt for e in examples if len(e.prompt) % 2]
    assert len(odd) < len(examples) and [p.prompt for p in pairs] == odd
    _, _, run = begin(start, data, tmp_path / "run", "family", **options | dict(min_win=0.95))
    with pytest.raises(Stopped, match=r"iteration 0: no pair is left, all .* are below --min-win 0.95"):
        family.generate(player, examples, 0, run)


def test_a_signal_is_heard_while_a_scorer_works(start, data, tmp_path, capsys):
    """The signal ends the run between two questions, not after the thousand of a shard."""
    (tmp_path / "judge.py").write_text(
        "import signal\nASKED = []\n\ndef judge(prompt, responses):\n    ASKED.append(prompt)\n"
        "    open('asked', 'a').write('.')\n    if len(ASKED) == 3:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    return [1, 0]\n"
    )
    with contextlib.chdir(tmp_path):
        assert family.main(flags(start, data, tmp_path / "run", scorer=tmp_path / "judge.py:judge")) == 143
    assert (tmp_path / "asked").read_text() == "..."
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_a_pair_that_does_not_fit_is_named(start, data, tmp_path, capsys):
    """Other records that are refused are in test_layouts.py."""
    path, out = write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], PAIRS[0] | {"generated": "B " * 80}]), tmp_path / "out"
    assert "pairs.jsonl:2: needs " in refused(flags(start, None, out, pairs=path, eval_data=data), out, capsys, family)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(mu=2), "--mu requires --loss space"),
        (dict(loss="iris", order=1, adaptive_order=True), "--adaptive-order cannot go with --order: "),
        (dict(loss="tspin", alpha=0.5), "--loss tspin cannot go with --alpha"),
        (dict(loss="tspin", unfinished="cut"), "--unfinished cut cannot go with --loss tspin"),
        (dict(samples=2, history=0), "--history cannot go with --samples"),
        (dict(samples=2, temperature=0), "--samples cannot go with --temperature 0: all samples would be equal"),
        (dict(reference="sampled", top_p=0.9), "--reference sampled cannot go with --top-p"),
        (dict(pairs="PAIRS", data="x"), "--pairs cannot go with --data: given pairs replace it"),
        (dict(reinforce=True), "--reinforce requires --adapter"),
        (dict(reinforce=True, adapter="x", rank=None), "--reinforce requires --eval-data"),
        (dict(ditto=True, mix_previous=True), "--ditto cannot go with --mix-previous"),
        (dict(min_win=0.5), "--min-win requires --scorer or --pairs"),
        (dict(scorer="none.py:f"), "no such file"),
        (dict(scorer="BROKEN:f"), "judge.py:f: ZeroDivisionError"),
    ],
)
def test_options_that_are_refused(start, data, tmp_path, capsys, pairs_file, options, says):
    (tmp_path / "judge.py").write_text("1 / 0\n")
    options = {name: pairs_file if value == "PAIRS" else value for name, value in options.items()}
    if options.get("scorer", "").startswith("BROKEN"):
        options["scorer"] = f"{tmp_path}/judge.py:f"
    given = options.pop("data", None if "pairs" in options else data)
    assert says in refused(flags(start, given, tmp_path / "out", **options), tmp_path / "out", capsys, family)


# ---------------------------------------------------------------- self-reinforcement


def test_self_reinforcement_plays_adapters_on_against_adapters_off(start, data, tmp_path, tuned, monkeypatch):
    """Prompts lack answers; the adapter samples the better side, its base the worse; the opponent has the adapter."""
    prompts = write_rows(tmp_path / "prompts.jsonl", ({"prompt": line["prompt"]} for line in rows(data)))
    out, enabled = tmp_path / "run", []
    options = dict(adapter=tuned, rank=None, reinforce=True, eval_data=data, eval_limit=4, shard=100)
    with monkeypatch.context() as patch:
        spy(patch, sampling, "respond", lambda args, _: enabled.append(next(lora.lora_layers(args[0]))[1].enabled))
        assert family.main(flags(start, prompts, out, **options)) == 0
    # Responses: the start's for KL, greedy, sampled, at 0.8; tuned, untuned; the player's, greedy and sampled.
    assert enabled == [True] * 4 + [True, False] + [True] * 2
    assert "adapter" in json.loads((out / "run.json").read_text())["digests"]
    pairs = rows(out / "pairs-0.jsonl")
    items = [(p["prompt_ids"], p["real_ids"], *p["generated_ids"]) for p in pairs]
    player, *_ = begin(start, prompts, tmp_path / "again", "family", **options)
    on = torch.tensor(player.logps(items)).T
    with lora.lora_disabled(player.model):
        gains = (on - torch.tensor(player.logps(items)).T).mean(1)  # the tuned model's gains over the base
    assert gains[0] > 1 > -1 > gains[1]
    torch.testing.assert_close(stored_logps(pairs), on, atol=1e-4, rtol=0)
    assert rows(out / "steps-0.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((out / "iterate-1/adapter_config.json").read_text())["r"] == 8, "the adapter's own rank holds"


def test_dry_runs(start, data, tmp_path, tuned, pairs_file, capsys):
    """Given pairs need no generation, and self-reinforcement has prompts without answers to measure."""
    prompts = write_rows(tmp_path / "prompts.jsonl", ({"prompt": word} for word in ("abc", "abd", "b")))
    # No response to a given pair is generated. This prompt leaves 64 - 50 tokens, the rehearsal would like 30.
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "q" * 50, "chosen": "B", "rejected": "D"}])
    for options, printed in [
        (dict(pairs=pairs_file), [f"{pairs_file}: 3 examples", "train 0 s"]),
        (dict(pairs=long, template="{prompt}", max_new_tokens=30), []),
        (dict(data=prompts, adapter=tuned, rank=None, reinforce=True), ["3 examples, ", "LoRA of rank 8"]),
    ]:
        given = dict(data=None, eval_data=data, eval_limit=4, dry_run=True) | options
        assert family.main(flags(start, given.pop("data"), tmp_path / "out", **given)) == 0
        output = capsys.readouterr().out
        assert all(text in output for text in printed)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize(
    "options, asked, phase",
    [
        # The model has the weights of the start while the player's wait on disk.
        (dict(loss="sppo", scorer="judge.py:judge", history=0, alpha=0.5, rank=0), "logps", "score-base"),
        (dict(loss="tspin", samples=2, rank=0), "respond", "proto"),
        (dict(ditto=True, samples=2, alpha=1.0, loss="iris", adaptive_order=True), "respond", "generate"),
    ],
)
def test_a_run_that_died_twice_ends_with_the_same_files(start, data, here, options, asked, phase):
    """The run dies in the second iteration, before a phase that is the method's own, and then amid the steps."""
    (here / "judge.py").write_text("def judge(prompt, responses):\n    return [0.9, len(responses[1]) % 2]\n")
    argv = flags(start, data, "run", iterations=2, prompts=20, eval_limit=4, batch=8, save_minutes=0, **options)
    second = lambda work, *args: args[2] == phase and work.folder.resume.name == "iterate-2"  # noqa: E731
    die_at(Work, asked, argv, second, script=family)
    assert (here / "run/iterate-1").exists() and not (here / "run/iterate-2").exists()
    die_at(Training, "step", argv, lambda training, *_: len(training.log) == 2, script=family)
    assert_resumes(argv, family)


def test_the_pairs_of_a_run_are_given_pairs_for_another(start, data, tmp_path):
    """pairs-0.jsonl as --pairs trains on the very ids that it holds; responses may be empty, prompts messages."""
    records = rows(data)
    for one in records[::2]:
        one["prompt"] = [{"role": "system", "content": "Spell."}, {"role": "user", "content": one["prompt"]}]
    mixed = write_rows(tmp_path / "mixed.jsonl", records)
    assert spin.main(flags(start, mixed, tmp_path / "run", overlong="skip", eval_limit=4)) == 0
    pairs = rows(tmp_path / "run/pairs-0.jsonl")
    assert {type(pair["prompt"]) for pair in pairs} == {str, list} and len(pairs) > 40
    pairs[0]["generated"] = ""
    options = dict(pairs=write_rows(tmp_path / "pairs.jsonl", pairs), eval_data=data, eval_share=None, overlong="skip")
    _, examples, run = begin(start, None, tmp_path / "again", "family", **options)
    again = family.generate(None, examples, 0, run)[0]
    assert len(again) == len(pairs) and again[0].generated_ids == [pairs[0]["real_ids"][-1:]]
    for found, pair in zip(again, pairs):
        assert all(getattr(found, name) == pair[name] for name in ("prompt", "prompt_ids", "real_ids"))
        assert run.work.text(found.generated_ids[0]) == pair["generated"]
