"""family.py: the losses and the mixture against closed forms, the pairs and references of the methods in whole runs."""

import contextlib
import dataclasses
import inspect
import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import TABLES, begin, flags, refused, rows, spy, tree
from torch import Tensor

import family
import lora
import sampling
import sft
import spin
from model import GPTNeo
from runtime import record
from runtime.data import Example, digest
from runtime.evaluate import mean
from runtime.run import Run

# ---------------------------------------------------------------- losses, in numbers


@pytest.mark.parametrize("name", family.LOSSES)
def test_every_loss_is_a_function_of_two_ratios_and_beta(name):
    """Its required parameters are exactly (real_ratios, generated_ratios, beta); it maps (B,) and (B,) to (B,) fp32."""
    parameters = inspect.signature(family.LOSSES[name]).parameters.values()
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    assert required == ["real_ratios", "generated_ratios", "beta"] == [p.name for p in parameters][:3]
    ratios = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    together = family.LOSSES[name](*ratios, 0.5)
    assert together.shape == (7,) and together.dtype == torch.float32
    alone = torch.cat([family.LOSSES[name](*pair, 0.5) for pair in ratios.split(1, dim=1)])
    assert torch.equal(together, alone), "a pair's loss depends on that pair alone"


def test_losses_on_hand_computed_numbers():
    """Ratios 1 and -2, so a margin of 3; for IPO with lengths 2 and 4, 0.5 and -0.5, so a margin of 1."""
    real, generated = torch.tensor([1.0]), torch.tensor([-2.0])
    assert family.hinge_loss(real, generated, 0.25).item() == 0.25
    assert family.hinge_loss(real, generated, 0.5).item() == 0
    assert family.ipo_loss(real, generated, 0.25).item() == (3 - 2) ** 2
    assert family.sppo_loss(real, generated, 0.5).item() == ((1 - 1) ** 2 + (-2 + 1) ** 2) / 2
    wins = torch.tensor([0.75]), torch.tensor([0.25])
    assert family.sppo_loss(real, generated, 0.25, *wins).item() == ((1 - 1) ** 2 + (-2 + 1) ** 2) / 2
    lengths = torch.tensor([2.0]), torch.tensor([4.0])
    assert family.ipo_loss(real, generated, 0.25, *lengths).item() == (1 - 2) ** 2
    assert family.mixture_logp(-2.0, -6.0, 0.25) == -3


def test_gradients_vanish_where_they_should():
    """Hinge beyond its margin, IPO and SPPO at their goals; SPIN's loss nowhere."""
    goals = {
        family.hinge_loss: (2.1, 0.0, 0.5),
        family.ipo_loss: (1.0, 0.0, 0.5),
        family.sppo_loss: (1.0, -1.0, 0.5),
        spin.spin_loss: None,
    }
    for loss, goal in goals.items():
        real, generated, beta = goal or (2.1, 0.0, 0.5)
        values = [torch.tensor([x], requires_grad=True) for x in (real, generated)]
        loss(*values, beta).sum().backward()
        assert all((v.grad == 0).all() for v in values) == (goal is not None)


@pytest.mark.parametrize("name", family.LOSSES)
def test_losses_need_torch_alone(name):
    """The source of each runs where nothing but torch is known, with the same results: it can be copied elsewhere."""
    known = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(inspect.getsource(family.LOSSES[name]), known)
    ratios = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(known[family.LOSSES[name].__name__](*ratios, 0.5), family.LOSSES[name](*ratios, 0.5))


# ---------------------------------------------------------------- losses, in closed form


def trained(loss_of, p_opponent, p_data, p_start=None):
    """A softmax table of five responses, trained on the loss in expectation over y ~ p_data, y' ~ p_opponent."""
    logits = (p_opponent if p_start is None else p_start).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16)
    real, generated = (i.flatten() for i in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        loss = (p_data[real] * p_opponent[generated] * loss_of(logp, real, generated)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def normalised(p):
    return p / p.sum()


@pytest.mark.parametrize("beta", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_minimiser_of_alpha_spin(alpha, beta):
    """Proportional to q (p_data / p_t)^(1/beta) with q = p_t^(1 - alpha) p_0^alpha, whose normaliser cancels."""
    p_data, p_t = TABLES
    p_0 = torch.tensor([0.3, 0.1, 0.1, 0.4, 0.1], dtype=torch.float64)
    q = family.mixture_logp(p_t.log(), p_0.log(), alpha)

    def loss(logp, real, generated):
        ratios = logp - q
        return spin.spin_loss(ratios[real], ratios[generated], beta)

    expected = normalised(q.exp() * (p_data / p_t) ** (1 / beta))
    torch.testing.assert_close(trained(loss, p_t, p_data), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_minimiser_of_fictitious_play(beta):
    """y' from the average of three opponents, log-ratios to the newest: p_t (p_data / average)^(1/beta)."""
    p_data, p_t = TABLES
    average = (p_t + p_data.flip(0) + torch.full((5,), 0.2, dtype=torch.float64)) / 3

    def loss(logp, real, generated):
        ratios = logp - p_t.log()
        return spin.spin_loss(ratios[real], ratios[generated], beta)

    expected = normalised(p_t * (p_data / average) ** (1 / beta))
    torch.testing.assert_close(trained(loss, average, p_data, p_t), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_minimiser_of_ipo(beta):
    """p_t exp(D s), normalised, with s = (p_data - p_t) / (p_data + p_t), D = 1 / (beta (2 + K)) and
    K = sum (p_data - p_t)^2 / (p_data + p_t): a least-squares problem, solved by hand."""
    p_data, p_t = TABLES

    def loss(logp, real, generated):
        ratios = logp - p_t.log()
        return family.ipo_loss(ratios[real], ratios[generated], beta)

    s = (p_data - p_t) / (p_data + p_t)
    K = ((p_data - p_t) ** 2 / (p_data + p_t)).sum()
    expected = normalised(p_t * torch.exp(s / (beta * (2 + K))))
    torch.testing.assert_close(trained(loss, p_t, p_data), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wins", [(1.0, 0.0), (0.8, 0.35)])
def test_minimiser_of_sppo(wins):
    """Each ratio f solves (p_data + p_t) f - p_data g - p_t g' + mu p_t exp(f) = 0, with the goals g, g' of the two
    sides and the one mu under which p_t exp(f) is normalised: both found by bisection, without any gradient."""
    p_data, p_t = TABLES
    beta = 0.8
    goals = [(p - 0.5) / beta for p in wins]

    def loss(logp, real, generated):
        ratios = logp - p_t.log()
        return family.sppo_loss(ratios[real], ratios[generated], beta, *wins)

    def bisect(function, low, high):
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) < 0 else (low, middle)
        return (low + high) / 2

    def ratios_at(mu):
        return [
            bisect(lambda f, d=d, t=t: (d + t) * f - d * goals[0] - t * goals[1] + mu * t * math.exp(f), -2.0, 0.8)
            for d, t in zip(p_data.tolist(), p_t.tolist())
        ]

    def excess(mu):  # of the probabilities over 1; falls as mu rises
        return 1 - sum(t * math.exp(f) for t, f in zip(p_t.tolist(), ratios_at(mu)))

    expected = p_t * torch.tensor(ratios_at(bisect(excess, -0.5, 1.0)), dtype=torch.float64).exp()
    assert expected.sum().item() == pytest.approx(1)
    torch.testing.assert_close(trained(loss, p_t, p_data), expected, atol=1e-6, rtol=0)


def test_hinge_without_a_finite_optimum_still_points_to_the_data():
    """Where no pair has reached its margin, the loss is linear: its gradient is beta times the supervised one's
    difference to the opponent, p_t - p_data in the logits."""
    p_data, p_t = TABLES
    logits = p_t.log().requires_grad_()
    ratios = logits.log_softmax(0) - p_t.log()
    weights = p_data[:, None] * p_t
    (weights * family.hinge_loss(ratios[:, None], ratios[None], 0.5)).sum().backward()
    torch.testing.assert_close(logits.grad, 0.5 * (p_t - p_data))


# ---------------------------------------------------------------- alpha-SPIN in runs


def stored_logps(pairs: list[dict]) -> Tensor:
    """(2, n): the reference's log-probabilities of the real and the generated responses in pairs-<t>.jsonl."""
    return torch.tensor([[p[f"opponent_{name}_logp"] for p in pairs] for name in ("real", "generated")])


@pytest.mark.parametrize("rank", [4, 0])
def test_base_policy_is_the_start_in_every_iteration(start, data, tmp_path, rank):
    """At t = 1 the stored mixture is that of the start with 0.4 and of the saved iterate with 0.6, recomputed here."""
    argv = flags(start, data, tmp_path / "run", rank=rank, iterations=2, lr=3e-3, alpha=0.4, beta=2)
    assert family.main(argv) == 0
    player, _, run = begin(start, data, tmp_path / "again", rank=rank)
    pairs = rows(tmp_path / "run/pairs-1.jsonl")
    items = [(p["prompt_ids"], p["real_ids"], p["generated_ids"]) for p in pairs]
    base = torch.tensor(player.logps(items)).T  # (2, n): real, generated
    if rank:
        lora.load_adapter(player.model, tmp_path / "run/iterate-1")
    else:
        player.model.load_weights(tmp_path / "run/iterate-1")
    opponent = torch.tensor(player.logps(items)).T
    torch.testing.assert_close(stored_logps(pairs), 0.6 * opponent + 0.4 * base, atol=1e-4, rtol=0)
    assert (base - opponent).abs().max() > 0.1, "else the two exchanged would have this mixture too"
    # the first loss of t = 1 is that of the mixture: margins alpha * [log p_t / p_0 (y) - log p_t / p_0 (y')]
    steps = rows(tmp_path / "run/steps-1.jsonl")
    ratios = 0.4 * (opponent - base)
    margins = 2 * (ratios[0] - ratios[1])
    order = torch.randperm(len(pairs), generator=run.generator(1, "shuffle"))[:16]
    assert steps[0]["margin"] == pytest.approx(margins[order].mean().item(), abs=1e-4)
    assert rows(tmp_path / "run/steps-0.jsonl")[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_full_parameter_base_is_read_from_disk_into_the_one_model(start, data, tmp_path, monkeypatch):
    """No second model is made during the run, and the player has its own weights again afterwards."""
    player, examples, run = begin(start, data, tmp_path / "run", "family", rank=0, alpha=0.5)
    with torch.no_grad():
        for p in player.model.parameters():
            p.add_(0.1)
    before = {name: p.clone() for name, p in player.model.named_parameters()}
    pairs, _ = family.generate(player, examples[:8], 0, run)
    with monkeypatch.context() as patch:
        patch.setattr(GPTNeo, "from_pretrained", None)
        family.score_mixture(player, pairs, run)
    assert all(torch.equal(p, before[name]) for name, p in player.model.named_parameters())
    item = pairs[0].prompt_ids, pairs[0].real_ids
    ((opponent,),) = player.logps([item])
    ((base,),) = begin(start, data, tmp_path / "again", rank=0)[0].logps([item])
    assert abs(base - opponent) > 0.02
    assert pairs[0].opponent_real_logp == pytest.approx((base + opponent) / 2, abs=1e-4)
    assert not any((tmp_path / "run/resume").iterdir())


# ---------------------------------------------------------------- fictitious play


def test_responses_are_drawn_evenly_from_the_last_opponents(start, data, tmp_path):
    """--history 2 at t = 2: about half of the responses are theta_1's, none theta_0's; scored under theta_2, all."""
    options = dict(history=2, iterations=3, lr=1e-2, temperature=1.0)
    assert family.main(flags(start, data, tmp_path / "run", **options)) == 0
    written = [{line: ids for line, ids, _ in rows(tmp_path / f"run/responses-{t}.jsonl")} for t in range(3)]
    player, examples, _ = begin(start, data, tmp_path / "again")
    line_of = {(tuple(e.prompt_ids), tuple(e.real_ids)): e.line for e in examples}
    pairs = rows(tmp_path / "run/pairs-2.jsonl")
    froms = [0, 0, 0]
    for pair in pairs:
        line = line_of[tuple(pair["prompt_ids"]), tuple(pair["real_ids"])]
        origin = [t for t in range(3) if written[t][line] == pair["generated_ids"]]
        assert origin
        froms[origin[-1]] += len(origin) == 1
    assert froms[0] == 0 and min(froms[1:]) > len(pairs) / 4
    lora.load_adapter(player.model, tmp_path / "run/iterate-2")
    scores = [logp for (logp,) in player.logps([(p["prompt_ids"], p["generated_ids"]) for p in pairs])]
    assert scores == pytest.approx([p["opponent_generated_logp"] for p in pairs], abs=1e-4)
    first = rows(tmp_path / "run/steps-2.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_history_of_prompts_met_by_some_opponents_only(start, data, tmp_path):
    """With fresh prompts each iteration, --history 0 draws from those opponents that met the prompt."""
    _, examples, run = begin(start, data, tmp_path / "run", "family", history=0)
    a, b, c = examples[:3]
    run.out.mkdir()

    def draw(examples, responses, t):
        """As in iteration t of a run, which afterwards knows the checksum of the responses."""
        drawn = family.draw_from_history(examples, responses, t, run)
        run.checksums.append(record.digests(run.out, [f"responses-{t}.jsonl"]))
        return drawn

    assert draw([a, b], [([1], True), ([2], True)], 0) == [([1], True), ([2], True)]
    drawn = [draw([b, c], [([3], True), ([4], False)], t) for t in range(1, 20)]
    assert {tuple(ids) for (ids, _), _ in drawn} == {(2,), (3,)}
    assert {(tuple(ids), end) for _, (ids, end) in drawn} == {((4,), False)}


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
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    return path


def test_given_pairs_are_trained_on_as_they_are(start, data, tmp_path, pairs_file, monkeypatch):
    """DPO: no response of the training set is sampled, the reference is the start, the loss begins at ln 2."""
    argv = flags(start, None, tmp_path / "run", pairs=pairs_file, eval_data=data, epochs=20, loss="sppo", batch=3)
    with monkeypatch.context() as patch:
        asked = []
        spy(patch, Run, "respond", lambda args, _: asked.append(args[3]))
        assert family.main(argv) == 0
    assert asked == ["start", "greedy", "sampled", "greedy", "sampled"], "responses to the held-out prompts only"
    player, _, run = begin(start, data, tmp_path / "again")
    stored = rows(tmp_path / "run/pairs-0.jsonl")
    texts = [(run.text(pair["real_ids"]), run.text(pair["generated_ids"]), pair["wins"][0]) for pair in stored]
    expected = [("EY1 B IY0", "S IY1", 0.9), ("EY1 B D", "D IY1", 1.0), ("B IY1", "B", 1.0)]
    assert sorted(texts) == sorted(expected)
    assert all(p["generated_ids"][-1] == p["real_ids"][-1] == run.eos_token_id for p in stored)
    assert sorted(p["wins"] for p in stored) == [[0.9, 0.2], [1.0, 0.0], [1.0, 0.0]]
    steps = rows(tmp_path / "run/steps-0.jsonl")
    # ratios are 0 at first: half the sum of the squared goals
    goals = [0.4**2 + 0.3**2, 0.5, 0.5]
    assert steps[0]["loss"] == pytest.approx(sum(goals) / 2 / 3, abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    logps = [logp for (logp,) in player.logps([(p["prompt_ids"], p["real_ids"]) for p in stored])]
    assert logps == pytest.approx([p["opponent_real_logp"] for p in stored], abs=1e-4)
    monkeypatch.chdir(tmp_path)
    assert family.main(flags(start, None, "dpo", pairs=pairs_file, eval_data=data)) == 0
    assert rows(tmp_path / "dpo/steps-0.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_ipo_counts_ratios_a_token_in_runs(start, data, tmp_path, monkeypatch):
    """A player other than the opponent: each ratio in the loss is over its response's length, pair by pair."""
    player, examples, run = begin(start, data, tmp_path / "run", "family", loss="ipo", batch=1000, micro_tokens=100_000)
    pairs, _ = family.generate(player, examples, 0, run)
    spin.score(player, pairs, run)
    with torch.no_grad():
        for p in player.model.parameters():
            p.mul_(1.01)
    logps = player.logps([(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs])
    seen = []

    def ipo_loss(*args: object, **lengths: Tensor) -> Tensor:
        values = family.ipo_loss(*args, **lengths)
        seen.append(((args[0] / lengths["real_lengths"]).tolist(), values.tolist()))
        return values

    monkeypatch.setitem(family.LOSSES, "ipo", ipo_loss)
    family.train(player, pairs, 0, run)
    ratios = [(a - p.opponent_real_logp, b - p.opponent_generated_logp) for (a, b), p in zip(logps, pairs)]
    ratios = [(a / len(p.real_ids), b / len(p.generated_ids)) for (a, b), p in zip(ratios, pairs)]
    assert sorted(seen[0][0]) == pytest.approx(sorted(a for a, _ in ratios), abs=1e-5)
    (beta,) = run.args.beta
    expected = [(a - b - 1 / (2 * beta)) ** 2 for a, b in ratios]
    assert sorted(seen[0][1]) == pytest.approx(sorted(expected), abs=1e-4)
    assert rows(run.out / "steps-0.jsonl")[0]["loss"] == pytest.approx(mean(expected), abs=1e-5)


def test_digest_of_given_pairs():
    """It changes with either response and with the wins, and with the line, by which --history knows a record."""
    example = Example("f", 1, "p", "r", ["r"], "g", (0.9, 0.1), [1], [2], [3])
    changes = [{}, {"real_ids": [3]}, {"generated_ids": [2]}, {"wins": (0.9, 0.2)}, {"line": 2}]
    assert len({digest([dataclasses.replace(example, **change)]) for change in changes}) == len(changes)


def test_equal_responses_count_in_sppo_alone(start, data, tmp_path):
    """Without a margin they have a gradient, towards the mean of the goals, and the closed form above includes them."""
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "a", "chosen": "B", "rejected": "B"}, {"prompt": "b", "chosen": "B", "rejected": "D"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for loss, count in (("logistic", 1), ("hinge", 1), ("ipo", 1), ("sppo", 2)):
        _, examples, run = begin(start, None, tmp_path / loss, "family", pairs=path, eval_data=data, loss=loss)
        pairs, counts = family.generate(None, examples, 0, run)
        assert len(pairs) == counts["pairs"] == count and counts["identical"] == 1


def test_scorer_gives_probabilities_and_filters(start, data, tmp_path):
    """It sees the prompt and both texts; --min-win leaves out pairs whose real response it does not think better."""
    (tmp_path / "judge.py").write_text(
        f"REAL = {[json.loads(line)['response'] for line in data.read_text().splitlines()]}\n"
        "def judge(prompt, responses):\n"
        "    assert len(responses) == 2 and '###' not in prompt\n"
        "    return [0.9 if responses[0] in REAL and len(prompt) % 2 else 0.4, 0.1]\n"
    )
    options = dict(scorer=tmp_path / "judge.py:judge", loss="sppo", min_win=0.9)
    assert family.main(flags(start, data, tmp_path / "run", **options)) == 0
    _, examples, _ = begin(start, data, tmp_path / "again")
    pairs = rows(tmp_path / "run/pairs-0.jsonl")
    prompts = {tuple(e.prompt_ids): e.prompt for e in examples}
    assert {tuple(p["wins"]) for p in pairs} == {(0.9, 0.1)}
    odd = [e.prompt for e in examples if len(e.prompt) % 2]
    assert len(odd) < len(examples) and sorted(prompts[tuple(p["prompt_ids"])] for p in pairs) == sorted(odd)


@pytest.mark.parametrize(
    "body, says",
    [
        ("return [2, 0]", "returned [2, 0], expected a list of two probabilities"),
        ("return [float('nan'), 0]", "returned [nan, 0], expected"),
        ("return [1]", "returned [1], expected"),
        ("return None", "returned None, expected"),
        ("return {1: 0, 0: 1}", "returned {1: 0, 0: 1}, expected"),
        ("return {0, 1}", "returned {0, 1}, expected"),
        ("return '01'", "returned '01', expected"),
        ("return ['0', '1']", "returned ['0', '1'], expected"),
        ("return 'x' * 10**6", "expected"),
        ("raise KeyError('judge')", "KeyError: 'judge'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise GeneratorExit", "GeneratorExit"),
    ],
)
def test_a_scorer_that_fails_stops_the_run_in_one_line(start, data, tmp_path, capsys, body, says):
    (tmp_path / "judge.py").write_text(f"def judge(prompt, responses):\n    {body}\n")
    assert family.main(flags(start, data, tmp_path / "run", scorer=tmp_path / "judge.py:judge")) == 1
    error = capsys.readouterr().err
    assert "judge.py:judge: " in error and says in error and error.count("\n") == 1 and len(error) < 700


def test_a_scorer_may_import_modules_beside_it(start, data, tmp_path):
    """Also one that is called like one of ours, which neither meets the other."""
    (tmp_path / "model.py").write_text("def opinion():\n    return [0.75, 0.25]\n")
    (tmp_path / "judge.py").write_text("import model\n\ndef judge(prompt, responses):\n    return model.opinion()\n")
    ours = sys.modules["model"]
    argv = flags(start, data, tmp_path / "run", scorer=tmp_path / "judge.py:judge", loss="sppo")
    assert family.main(argv) == 0
    assert sys.modules["model"] is ours and str(tmp_path) not in sys.path
    assert {tuple(pair["wins"]) for pair in rows(tmp_path / "run/pairs-0.jsonl")} == {(0.75, 0.25)}


def test_a_signal_is_heard_while_a_scorer_works(start, data, tmp_path, capsys):
    """Between two questions, not after the thousand of a shard."""
    (tmp_path / "judge.py").write_text(
        "import signal\nASKED = []\n\ndef judge(prompt, responses):\n    ASKED.append(prompt)\n"
        "    open('asked', 'a').write('.')\n    if len(ASKED) == 3:\n        signal.raise_signal(signal.SIGTERM)\n"
        "    return [1, 0]\n"
    )
    with contextlib.chdir(tmp_path):
        assert family.main(flags(start, data, tmp_path / "run", scorer=tmp_path / "judge.py:judge")) == 143
    assert (tmp_path / "asked").read_text() == "..."
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_scorer(start, data, tmp_path, monkeypatch, capsys):
    """Nor another function of the same file, nor the same one after a change; the file may move."""
    code = "def one(prompt, responses):\n    return [0.9, 0.1]\ndef two(prompt, responses):\n    return [0.1, 0.9]\n"
    (tmp_path / "judge.py").write_text(code)
    (tmp_path / "moved.py").write_text(code)
    (tmp_path / "changed.py").write_text(code.replace("0.9, 0.1", "0.8, 0.1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spin, "take_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        family.main(flags(start, data, "run", scorer="judge.py:one"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for scorer in ("judge.py:two", "changed.py:one", None):
        assert family.main(flags(start, data, "run", scorer=scorer)) == 2
        assert "--scorer: not the contents" in capsys.readouterr().err
    assert family.main(flags(start, data, "run", scorer="moved.py:one")) == 0


@pytest.mark.parametrize(
    "record, names",
    [
        ({"prompt": "a", "response": "b"}, "field 'generated' is missing"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "field 'chosen' has the roles []"),
        ({"prompt": "a", "response": "b", "generated": ""}, "field 'generated' is empty"),
        ({"prompt": "a", "response": "b", "generated": 3}, "field 'generated' is int"),
        (PAIRS[2] | {"generated": "x"}, "field 'generated' must be a list"),
        (PAIRS[0] | {"wins": 0.5}, "field 'wins' must be two probabilities"),
        (PAIRS[0] | {"wins": [0.5, 2]}, "field 'wins'"),
        (PAIRS[0] | {"wins": [0.5, 0.5, 0.5]}, "field 'wins'"),
        (PAIRS[0] | {"wins": [0.5, None]}, "field 'wins'"),
        (PAIRS[0] | {"wins": [0.5, 0.5, None]}, "field 'wins'"),
        (PAIRS[0] | {"generated": "B " * 80}, "needs "),
    ],
)
def test_bad_pairs(start, data, tmp_path, capsys, record, names):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(record) + "\n")
    argv = flags(start, None, out, pairs=path, eval_data=data)
    assert f"pairs.jsonl:2: {names}" in refused(argv, out, capsys, family)


def test_options_that_contradict_each_other(start, data, tmp_path, capsys, pairs_file):
    out = tmp_path / "out"
    for options, names in (
        ({"pairs": pairs_file}, "--pairs"),
        ({"reinforce": True}, "--reinforce True: expected --adapter"),
        ({"adapter": "x", "rank": 0}, "--rank 0: --adapter brings its own rank"),
        ({"adapter": tmp_path / "none", "rank": None}, "none"),
        ({"scorer": f"{pairs_file}.py:f"}, "no such file"),
        ({"min_win": 0.5}, "--min-win 0.5: expected --scorer or --pairs"),
    ):
        assert names in refused(flags(start, data, out, **options), out, capsys, family)
    argv = flags(start, None, out, pairs=pairs_file, eval_data=data, history=2)
    assert "--history 2: expected no --pairs" in refused(argv, out, capsys, family)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    error = refused(flags(start, data, out, scorer=tmp_path / "broken.py:f"), out, capsys, family)
    assert "broken.py:f: ZeroDivisionError" in error
    with pytest.raises(ValueError, match="--adapter x: expected no --rank 0"):
        family.FamilyArgs(adapter="x", rank=0)
    argv = flags(start, data, out, adapter="x", rank=None, reinforce=True, eval_data=data, unfinished="cut")
    assert "--reinforce True: expected no --unfinished cut" in refused(argv, out, capsys, family)
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    assert "SystemExit: 0" in refused(flags(start, data, out, scorer=tmp_path / "exits.py:f"), out, capsys, family)
    (tmp_path / "empty.py").write_text("number = 3")
    argv = flags(start, data, out, scorer=tmp_path / "empty.py:number")
    assert "empty.py:number: int, expected a function" in refused(argv, out, capsys, family)
    argv = flags(start, data, out, scorer=tmp_path / "empty.py:f")
    assert "AttributeError" in refused(argv, out, capsys, family)


# ---------------------------------------------------------------- self-reinforcement


@pytest.fixture(scope="module")
def tuned(start, data, tmp_path_factory):
    """An adapter that sft made."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    argv = flags(start, data, out, rank=8, lr=3e-2, epochs=10, beta=None)
    assert sft.main(argv) == 0
    return out / "iterate-1"


def test_self_reinforcement_plays_adapters_on_against_adapters_off(start, data, tmp_path, tuned, monkeypatch):
    """Prompts without answers; the better side is sampled with the adapter, the worse one without; the opponent is
    the tuned model."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines))
    enabled = []
    look = lambda args, _: enabled.append(next(lora.lora_layers(args[0]))[1].enabled)  # noqa: E731
    spy(monkeypatch, sampling, "respond", look)
    options = dict(adapter=tuned, rank=None, reinforce=True, eval_data=data, iterations=1)
    assert family.main(flags(start, prompts, tmp_path / "run", **options)) == 0
    assert enabled == [True] * 3 + [True, False] + [True] * 2  # start, greedy, sampled; tuned, untuned; greedy, sampled
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert {"adapter"} <= record["digests"].keys()
    pairs = rows(tmp_path / "run/pairs-0.jsonl")
    player, _, _ = begin(start, data, tmp_path / "again", rank=8)
    lora.load_adapter(player.model, tuned)

    def gain(name):  # of the tuned model over the base, in nats a response
        items = [(p["prompt_ids"], p[f"{name}_ids"]) for p in pairs]
        on = [logp for (logp,) in player.logps(items)]
        with lora.lora_disabled(player.model):
            off = [logp for (logp,) in player.logps(items)]
        return mean(on) - mean(off), on

    real_gain, real = gain("real")
    generated_gain, _ = gain("generated")
    assert real_gain > 1 > -1 > generated_gain
    assert real == pytest.approx([p["opponent_real_logp"] for p in pairs], abs=1e-4)
    assert rows(tmp_path / "run/steps-0.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    config = json.loads((tmp_path / "run/iterate-1/adapter_config.json").read_text())
    assert config["r"] == 8, "the adapter's own rank holds"


def test_self_reinforcement_may_be_filtered(start, data, tmp_path, tuned):
    """The optional filter: pairs are left out whose tuned response the scorer does not think better."""
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, responses):\n    return [0.9 if len(prompt) % 2 else 0.4, 0.1]\n"
    )
    scorer = f"{tmp_path}/judge.py:judge"
    options = dict(adapter=tuned, rank=None, reinforce=True, eval_data=data, scorer=scorer, min_win=0.5)
    player, examples, run = begin(start, data, tmp_path / "run", "family", **options)
    pairs, _ = family.generate(player, examples, 0, run)
    better = [tuple(e.prompt_ids) for e in examples if len(e.prompt) % 2]
    assert 0 < len(better) < len(examples) and [tuple(p.prompt_ids) for p in pairs] == better


def test_self_reinforcement_samples_apart_and_both_responses_must_end(start, data, tmp_path, tuned, monkeypatch):
    options = dict(adapter=tuned, rank=None, reinforce=True, eval_data=data, unfinished="drop")
    player, examples, run = begin(start, data, tmp_path / "run", "family", **options)
    answers = iter([[([1], True), ([2], False), ([3], True)], [([4], True), ([5], True), ([6], False)]])
    seeds = []
    monkeypatch.setattr(run, "respond", lambda p, examples, name, seed, *a: (seeds.append(seed), next(answers))[1])
    pairs, counts = family.generate(player, examples[:3], 0, run)
    assert [(p.real_ids, p.generated_ids) for p in pairs] == [([1], [4])]
    assert counts["truncated"] == pytest.approx(2 / 3) and len(set(seeds)) == 2


def test_dry_runs(start, data, tmp_path, tuned, pairs_file, capsys):
    """Of given pairs, which need no generation, and of self-reinforcement, whose prompts have no answers to measure."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("abc", "abd", "b")))
    given = flags(start, None, tmp_path / "out", pairs=pairs_file, eval_data=data, dry_run=True)
    assert family.main(given) == 0
    printed = capsys.readouterr().out
    assert "(generate 0 s, " in printed and f"{pairs_file}: 3 examples to train on" in printed
    options = dict(adapter=tuned, rank=None, reinforce=True, eval_data=data, dry_run=True)
    assert family.main(flags(start, prompts, tmp_path / "out", **options)) == 0
    printed = capsys.readouterr().out
    assert "3 examples to train on" in printed and "LoRA of rank 8" in printed
    # No response to a given pair is generated. This prompt leaves 64 - 50 tokens, the rehearsal would like 30.
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "q" * 50, "chosen": "B", "rejected": "D"}) + "\n")
    options = dict(eval_data=data, dry_run=True, template="{prompt}", max_new_tokens=30)
    assert family.main(flags(start, None, tmp_path / "out", pairs=tmp_path / "long.jsonl", **options)) == 0
    assert not (tmp_path / "out").exists()


def test_dry_run_though_the_pairs_of_its_short_responses_would_all_be_left_out(start, data, tmp_path):
    """Cut at 16 tokens hardly any response is finished; the plan does not depend on it."""
    options = dict(unfinished="drop", temperature=0, max_new_tokens=30, dry_run=True)
    assert spin.main(flags(start, data, tmp_path / "out", **options)) == 0


@pytest.mark.parametrize("alpha", [1, 0.5])
def test_the_base_policy_of_a_start_with_an_adapter_is_that_start(start, data, tmp_path, tuned, alpha):
    """The reference is theta_0, not the model below the adapter: the first loss is ln 2, and at t = 1 the stored
    mixture is that of the start and the saved iterate, recomputed here."""
    out, options = tmp_path / "run", dict(adapter=tuned, rank=None, alpha=alpha, iterations=2)
    assert family.main(flags(start, data, out, **options)) == 0
    assert rows(out / "steps-0.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    player, _, _ = begin(start, data, tmp_path / "again", "family", **options)
    pairs = rows(out / "pairs-1.jsonl")
    items = [(p["prompt_ids"], p["real_ids"], p["generated_ids"]) for p in pairs]
    base = torch.tensor(player.logps(items)).T
    lora.load_adapter(player.model, out / "iterate-1")
    opponent = torch.tensor(player.logps(items)).T
    torch.testing.assert_close(stored_logps(pairs), (1 - alpha) * opponent + alpha * base, atol=1e-4, rtol=0)
    assert (base - opponent).abs().max() > 0.1


def test_a_start_with_an_adapter(start, data, tmp_path, tuned):
    """theta_0 is the model with the adapter on: SPIN continues from an adapter that sft.py left."""
    argv = flags(start, data, tmp_path / "run", adapter=tuned, rank=None)
    assert spin.main(argv) == 0
    tuned_nll = rows(tuned.parent / "metrics.jsonl")[-1]["nll"]
    assert rows(tmp_path / "run/metrics.jsonl")[0]["nll"] == pytest.approx(tuned_nll, rel=1e-5)


# ---------------------------------------------------------------- resumed


def test_the_family_resumes(start, data, tmp_path, monkeypatch):
    """Died in the second iteration's training, with history, base policy and scorer: the same files at the end."""
    (tmp_path / "judge.py").write_text("def judge(prompt, responses):\n    return [0.9, len(responses[1]) % 2]\n")
    monkeypatch.chdir(tmp_path)
    options = dict(history=0, alpha=0.5, scorer="judge.py:judge", loss="sppo", rank=0, iterations=2, save_minutes=0)
    take, count = spin.take_step, []
    monkeypatch.setattr(spin, "take_step", lambda *a: (count.append(1), 1 / (8 - len(count)), take(*a))[2])
    argv = flags(start, data, "run", **options, lr=1e-3)
    with pytest.raises(ZeroDivisionError):
        family.main(argv)
    assert (tmp_path / "run/iterate-1").exists() and not (tmp_path / "run/iterate-2").exists()
    assert family.main(argv) == 0
    stopped = tree(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert family.main(argv) == 0
    assert tree(tmp_path / "run") == stopped


@pytest.mark.parametrize("t", [0, 1])
def test_a_run_that_dies_while_the_player_is_the_base_policy_resumes(start, data, tmp_path, monkeypatch, t):
    """The model then holds the weights of the start and the player's wait on disk: the same files at the end."""
    argv = flags(start, data, tmp_path / "run", alpha=0.5, rank=0, iterations=2, lr=1e-3)

    def die(args, _):
        run, _, _, name = args
        if name == "score-base" and run.iterate == t + 1:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        spy(patch, Run, "logps", die)
        with pytest.raises(ZeroDivisionError):
            family.main(argv)
    assert (tmp_path / "run/resume/player").exists()
    assert family.main(argv) == 0
    stopped = tree(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert family.main(argv) == 0
    assert tree(tmp_path / "run") == stopped
