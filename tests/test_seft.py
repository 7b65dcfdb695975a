"""examples/seft.py: what the reviser reads and learns, what the policy learns from it, resuming, what is refused."""

import shutil
from pathlib import Path

import pytest
from helpers import assert_resumes, begin, die_at, flags, refused, rows, spy, write_rows

from data.examples import Example
from examples import seft
from model import GPTNeo
from player import Player
from runtime.run import Run
from runtime.work import Work

REVISE = r"{prompt}{response}\n\n### Response: "


def seft_flags(start, data, out, **options) -> list[str]:
    """A command line of a tiny run, without options of self-play."""
    return flags(start, data, out, **(dict(beta=None, revise_template=REVISE, save_minutes=0) | options))


@pytest.fixture(scope="module")
def reviser(start, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reviser") / "run"
    assert seft.main(seft_flags(start, data, out, rank=0, epochs=4, eval_limit=4)) == 0  # Some revisions end.
    first, *_, last = rows(out / "steps-0.jsonl")
    assert last["loss"] < 0.8 * first["loss"]
    return out


def prepared(start, data, out, **options) -> tuple[Player, list[Example], Run]:
    return begin(start, data, out, command="seft", beta=None, revise_template=REVISE, **options)


# ---------------------------------------------------------------- the reviser


def test_the_reviser_reads_the_ids_of_prompt_and_response(start, data, tmp_path):
    """Ids are joined, special tokens of the template count, and only the sampled end-of-sequence token is left out."""
    _, examples, run = prepared(start, data, tmp_path / "run", template="<{prompt}>")
    to_revise = seft.reviser_prompts(run)
    token = run.work.tokenizer.token_to_id("\n\n### Response: ")
    prompt, eos = examples[0].prompt_ids, run.work.eos_token_id
    assert to_revise(examples[0], [5, 6, eos]).prompt_ids == [*prompt, 5, 6, token]
    assert to_revise(examples[0], [5, 6]).prompt_ids == [*prompt, 5, 6, token], "a response that was cut"
    assert to_revise(examples[0], [5, eos]).real_ids == examples[0].real_ids
    assert examples[0].prompt_ids == prompt, "the example itself stays as it is"


def test_the_reviser_learns_revisions_of_the_start_s_and_of_the_real_responses(start, data, tmp_path, monkeypatch):
    """Half of the lessons revise what theta_0 wrote, half the real response; the target is the real one each time."""
    seen = []

    def train(player, lessons, t, run):
        run.folder.append(f"steps-{t}.jsonl", "")
        seen.append(lessons)
        return {"skipped": 0}

    monkeypatch.setattr(seft, "train", train)
    options = dict(rank=0, iterations=2, prompts=20)
    player, examples, run = prepared(start, data, tmp_path / "run", **options)
    run.folder.begin()
    seft.train_reviser(player, examples, run)
    start_player, fresh, again = prepared(start, data, tmp_path / "again", **options)
    for t, lessons in enumerate(seen):
        chosen = again.prompts(fresh, t)
        assert len(lessons) == 40
        weaker, good = lessons[::2], lessons[1::2]
        to_revise = seft.reviser_prompts(again)
        assert [e.prompt_ids for e in good] == [to_revise(e, e.real_ids).prompt_ids for e in chosen]
        assert [e.real_ids for e in weaker] == [e.real_ids for e in good] == [e.real_ids for e in chosen]
        if t == 0:
            expected = start_player.respond([e.prompt_ids for e in chosen], again.seed(0, "weaker-0"))
            assert [e.prompt_ids for e in weaker] == [to_revise(e, i).prompt_ids for e, (i, _) in zip(chosen, expected)]
    assert len(run.work.heldout[0].prompt_ids) > len(again.work.heldout[0].prompt_ids), "of revisions"


def test_given_pairs_are_revised_as_they_are(start, tmp_path, monkeypatch):
    """Nothing is generated for the pairs of --pairs, but for held-out records that have none."""
    given = (dict(prompt=word, chosen="AA1 B", rejected="B AA1") for word in "abc")
    pairs, asked = write_rows(tmp_path / "pairs.jsonl", given), []
    heldout = write_rows(tmp_path / "heldout.jsonl", [dict(prompt="d", response="D")])
    spy(monkeypatch, Work, "respond", lambda a, k: asked.append((a[3], len(a[2]))))
    out = tmp_path / "run"
    assert seft.main(seft_flags(start, None, out, pairs=pairs, eval_data=heldout)) == 0
    assert dict(asked[:2]) == {"weaker-heldout": 1, "weaker-0": 0}
    assert rows(out / "metrics.jsonl")[1]["pairs"] == 6


def test_a_reviser_whose_training_died_ends_bit_identical(start, data, here):
    """A resumed run finds what the start wrote: in the second iteration the player is no longer the start."""
    argv = seft_flags(start, data, "run", iterations=2, prompts=30, eval_limit=4, lora_dropout=0.1)
    die_at(seft, "train", argv, lambda player, examples, t, run: t == 1, script=seft)
    assert_resumes(argv, seft)


# ---------------------------------------------------------------- the policy


def test_the_policy_is_fine_tuned_on_revisions_of_its_responses(start, data, reviser, tmp_path, monkeypatch):
    """pairs-0.jsonl holds revisions and responses, in this order; the first loss is the revisions' negative
    log-probability per token. The second round revises what the evolved policy writes."""
    prompts = write_rows(tmp_path / "prompts.jsonl", ({"prompt": r["prompt"]} for r in rows(data)[:40]))
    out, policies = tmp_path / "run", []
    options = dict(reviser=reviser, eval_data=data, eval_limit=4, rank=0, lr=1e-3, batch=500, iterations=2)

    def look(args, _):
        if args[3] == "generate":
            policies.append({k: v.clone() for k, v in args[1].model.state_dict().items()})

    with monkeypatch.context() as patch:
        spy(patch, Work, "respond", look)
        assert seft.main(seft_flags(start, prompts, out, **options)) == 0
    written = GPTNeo.from_pretrained(out / "iterate-1").state_dict()
    assert all(policies[1][name].equal(value) for name, value in written.items())
    assert any(not policies[0][name].equal(value) for name, value in written.items())

    pairs, (step,) = rows(out / "pairs-0.jsonl"), rows(out / "steps-0.jsonl")
    player, examples, run = prepared(start, prompts, tmp_path / "again", **options)
    chosen = run.prompts(examples, 0)
    responses = player.respond([e.prompt_ids for e in chosen], run.seed(0, "generate"))
    asked = [e.prompt_ids for e in map(seft.reviser_prompts(run), chosen, [ids for ids, _ in responses])]
    model = Player(GPTNeo.from_pretrained(reviser / "final"), run.work.eos_token_id, run.args)
    revisions = model.respond(asked, run.seed(0, "revise"))
    kept = [(e, r, v) for e, (r, _), (v, ended) in zip(chosen, responses, revisions) if ended]
    assert 0 < len(kept) < len(chosen), "the test sees revisions of both kinds"
    assert [(p["real_ids"], p["generated_ids"]) for p in pairs] == [(v, [r]) for _, r, v in kept]
    logps = player.logps([(e.prompt_ids, v) for e, _, v in kept])
    assert step["loss"] == pytest.approx(-sum(logp for (logp,) in logps) / sum(len(v) for *_, v in kept), rel=1e-5)
    assert rows(out / "metrics.jsonl")[1]["pairs"] == len(kept)


def test_a_reviser_that_changes_during_the_run_is_noticed(start, data, reviser, here, capsys):
    folder = shutil.copytree(reviser, here / "reviser")
    argv, weights = seft_flags(start, data, "run", reviser=folder, eval_limit=4), folder / "final/model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, seft, "revise", lambda *_: shutil.copy(start / "model.safetensors", weights))
        assert seft.main(argv) == 1
    assert f"--reviser {folder}: has changed since the run began" in capsys.readouterr().err
    shutil.copy(reviser / "final/model.safetensors", weights)
    assert seft.main(argv) == 0


# ---------------------------------------------------------------- options


def test_what_is_refused(start, data, reviser, tmp_path, capsys):
    out = tmp_path / "run"

    def error(**options) -> str:
        return refused(seft_flags(start, options.pop("data", data), out, **options), out, capsys, script=seft)

    assert "--pairs replaces --data" in error(pairs="x")
    assert "--pairs is for training a reviser" in error(pairs="x", reviser=reviser, data=None)
    assert "with {prompt} and {response}" in error(revise_template="{prompt}")
    assert "expected the folder of a finished run that trained a reviser" in error(reviser=tmp_path / "none")
    assert "holds other files and no run" in error(reviser=start)
    wrong = error(reviser=reviser, revise_template="{prompt}{response}?")
    assert f"expected --revise-template '{REVISE}', with which" in wrong
    assert "expected --template" in error(reviser=reviser, template="{prompt}:")
    assert "needs" in error(max_new_tokens=30) and "context is 64" in error(max_new_tokens=30, reviser=reviser)
    assert "no example fits" in error(max_new_tokens=31, overlong="skip")
    unanswered = write_rows(tmp_path / "prompts.jsonl", ({"prompt": w} for w in "abcdefghij"))
    assert "held out, and has no response" in error(data=unanswered, reviser=reviser, eval_share=0.5)
    assert "field 'response' is missing" in error(data=unanswered)
