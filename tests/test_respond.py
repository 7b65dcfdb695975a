"""respond.py: what an iterate answers is what the run's own code gives, from every kind of name, in every form."""

import dataclasses
import io
import json
import re
import shutil

import pytest
import torch
from helpers import begin, flags, refused, rows, write_rows

import lora
import respond
import spin
from data.examples import Example, encode, load_examples
from model import GPTNeo, GPTNeoConfig
from runtime.folder import Folder

TEMPLATE = r"Say {prompt}:\n"
WORDS = ["abc", "dog", "cat", "tree"]


@pytest.fixture(scope="module")
def run(start, data, tmp_path_factory):
    """A run with adapters and a template of its own."""
    folder = tmp_path_factory.mktemp("respond") / "run"
    options = dict(template=TEMPLATE, lr=1e-1, eval_data=data, eval_limit=20, metric="edit_distance")
    assert spin.main(flags(start, data, folder, iterations=2, prompts=32, **options)) == 0
    return folder


@pytest.fixture(scope="module")
def answers(run, start, data, tmp_path_factory):
    """What the player of the run answers, as iterate 0, 1 and 2."""
    player, _, other = begin(start, data, tmp_path_factory.mktemp("again") / "run", template=TEMPLATE)
    examples = [Example("x", i, word, "", []) for i, word in enumerate(WORDS)]
    encode(examples, other.work.tokenizer, TEMPLATE.replace(r"\n", "\n"), other.work.eos_token_id)
    other.weights.folder, result = Folder(run), []
    for t in (0, 1, 2):
        other.weights.load(player, t)
        ids = player.respond([e.prompt_ids for e in examples], 0, temperature=0.0)
        result.append([other.work.text(i) for i, _ in ids])
    assert len({*map(tuple, result)}) == 3, "iterates that answer alike would prove nothing"
    return result


def asked(argv, capsys, code=0) -> str:
    assert respond.main([str(word) for word in argv]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("name, t", [("", 2), ("iterate-0", 0), ("iterate-1", 1), ("iterate-2", 2), ("final", 2)])
def test_every_iterate_answers_with_the_template_of_its_run(name, t, run, answers, tmp_path, capsys):
    asked([run / name, "--prompt", *WORDS, "--out", tmp_path / "x.jsonl"], capsys)
    written = rows(tmp_path / "x.jsonl")
    assert [row["response"] for row in written] == answers[t]
    assert [row["prompt"] for row in written] == WORDS and {row["model"] for row in written} == {str(run / name)}


def test_a_final_that_was_moved_or_is_on_the_hub_keeps_its_template(run, answers, tmp_path, capsys, monkeypatch):
    moved = shutil.copytree(run / "final", tmp_path / "moved")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(moved))
    for name in (moved, "owner/name"):
        said = asked([name, "--prompt", WORDS[0], "--max-new-tokens", 8], capsys)
        assert said.removesuffix(" [...]\n").strip() == answers[2][0]


def test_prompts_come_from_files_and_pipes(run, answers, tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "x.jsonl", ({"question": w, "answer": "a"} for w in WORDS))
    start = run / "iterate-0"
    text = asked([start, "--prompts", tmp_path / "x.jsonl", "--out", tmp_path / "out.jsonl"], capsys)
    assert text.startswith(f"> {WORDS[0]}\n{answers[0][0]}")
    written = rows(tmp_path / "out.jsonl")
    assert [row["response"] for row in written] == answers[0] and written[0]["references"] == ["a"]
    assert load_examples(tmp_path / "out.jsonl", quiet=True)[0].prompt == WORDS[0], "as --data reads it"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(WORDS) + "\n\n"))
    lines = [line.removesuffix(" [...]") for line in asked([start], capsys).splitlines()]
    assert lines == answers[0]


def test_two_iterates_answer_below_each_other(run, answers, capsys):
    text = asked([run / "iterate-1", "--compare", run / "iterate-0", "--prompt", WORDS[1]], capsys)
    first, one, second, two = text.splitlines()
    assert (first, second) == (f"[{run / 'iterate-1'}]", f"[{run / 'iterate-0'}]")
    assert [one.removesuffix(" [...]"), two.removesuffix(" [...]")] == [answers[1][1], answers[0][1]]


def test_sampled_answers_differ_between_batches_and_turns(run, start, tmp_path, monkeypatch, capsys):
    """Random numbers depend on the seed and the number of the prompt, not on the size of a batch."""
    sampling = [start, "--template", TEMPLATE, "--temperature", 3, "--max-new-tokens", 12, "--seed", 3]
    for n in (2, 5):
        asked([*sampling, "--prompt", *["abc"] * 12, "--gen-batch", n, "--out", tmp_path / f"{n}"], capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n" * 12))
    asked([*sampling, "--out", tmp_path / "typed"], capsys)
    one, two, typed = ([row["response"] for row in rows(tmp_path / name)] for name in ("2", "5", "typed"))
    assert one == two == typed and len({*one}) == 12


def test_models_of_different_contexts_are_measured_on_common_examples(start, data, tmp_path, capsys):
    """Models of different vocabularies are not compared: the log-probabilities of KL are those of ids."""
    torch.manual_seed(0)
    config = GPTNeoConfig.from_json(start / "config.json")
    short, other = (shutil.copytree(start, tmp_path / name) for name in ("short", "other"))
    GPTNeo(dataclasses.replace(config, max_position_embeddings=20)).eval().save_pretrained(short)
    options = ["--eval-data", data, "--max-new-tokens", 8, "--template", "{prompt}"]
    text = asked([start, "--compare", short, *options, "--out", tmp_path / "m"], capsys)
    found = re.search(r"left out (\d+) examples that do not fit a context of 20 tokens", text)
    assert found and 0 < int(found[1]) < 80
    one, two = rows(tmp_path / "m")
    assert one.keys() == two.keys() and one["kl"] == 0 and two["kl"] != 0
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace("### Instruction: ", "### Task: "))
    error = refused([start, "--compare", other, *options], tmp_path / "no", capsys, respond)
    assert f"--compare {other}: its vocabulary is not that of {start}; metrics need the same" in error


def test_held_out_metrics_are_those_of_the_run(run, data, capsys, tmp_path):
    """With the limit of the run the metrics are computed on the same examples; KL is that from the first model."""
    argv = [run / "iterate-0", "--compare", run / "iterate-2", "--eval-data", data, "--eval-limit", 20]
    text = asked([*argv, "--metric", "edit_distance", "--out", tmp_path / "m"], capsys)
    first, last = written = rows(tmp_path / "m")
    assert str(run / "iterate-2") in text and first["kl"] == 0 and last["kl"] != 0
    for row, expected in zip(written, rows(run / "metrics.jsonl")[::2]):
        for metric in ("nll", "greedy", "greedy_error", "sampled_error", "sampled_edit_distance"):
            assert row[metric] == pytest.approx(expected[metric], abs=1e-5), metric


def test_a_conversation_keeps_its_turns_until_an_empty_line(run, monkeypatch, capsys):
    seen = []
    original = respond.Responder.respond
    monkeypatch.setattr(respond.Responder, "respond", lambda s, e: (seen.append(e[0].turns), original(s, e))[1])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n\nc\n"))
    said = asked([run, "--chat", "--max-new-tokens", 4], capsys).splitlines()
    first = said[0].removesuffix(" [...]") or " "
    assert seen == [(("user", "a"),), (("user", "a"), ("assistant", first), ("user", "b")), (("user", "c"),)]


def test_an_adapter_outside_its_run_needs_its_base(run, start, answers, tmp_path, capsys):
    folder = shutil.copytree(run / "iterate-1", tmp_path / "adapter")
    said = asked([folder, "--template", TEMPLATE, "--max-new-tokens", 8, "--prompt", WORDS[0]], capsys)
    assert said.startswith(answers[1][0])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    out = tmp_path / "out"
    assert "names no base model; --base names it" in refused([folder, "--prompt", "x"], out, capsys, respond)
    assert asked([folder, "--base", start, "--prompt", "x"], capsys)


def test_what_a_run_began_with_holds_for_its_iterates(run, tmp_path):
    """--eos, --special-tokens and the start's adapter hold for iterates. An option of respond.py takes precedence."""
    (tmp_path / "run").mkdir()
    record, adapter = json.loads((run / "run.json").read_text()), str(run / "iterate-2")
    record["args"] |= {"eos": "394", "special_tokens": True, "adapter": adapter}
    Folder(tmp_path / "run").write_record(record)
    begun = respond.Responder(str(tmp_path / "run/iterate-0"), respond.RespondOptions())
    expected = GPTNeo.from_pretrained(record["args"]["model"])
    lora.load_adapter(expected, adapter)
    found = dict(begun.player.model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in expected.named_parameters())
    assert begun.eos == begun.player.eos_token_id == 394 and begun.template.special_tokens
    asked = respond.Responder(str(tmp_path / "run/iterate-0"), respond.RespondOptions(eos="393"))
    assert asked.eos == 393


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "the following arguments are required: MODEL"), (["nothing"], "nothing: neither a directory nor a hub id"),
        (["RUN", "--promt", "x"], "--promt: no such option; did you mean --prompt?"),
        (["RUN/iterate-7"], "RUN/iterate-7: no such iterate; there are iterate-0, "),
        (["RUN", "--prompt", " "], "--prompt ' ': expected a text"),
        (["RUN", "--prompt", "a" * 99], "--prompt:1: the prompt has 105 tokens with the template, the context of"),
        (["RUN", "--prompts", "no.jsonl"], "no.jsonl: no such file"), (["RUN", "x"], "'x': expected flags"),
        (["RUN", "--out", "RUN/run.json"], "exists, expected a new file"),
        (["RUN/iterate-0", "--template", "chat", "--prompt", "x"], "has no chat template"),
    ],
)  # fmt: skip
def test_what_is_refused(argv, says, run, tmp_path, capsys):
    argv = [word.replace("RUN", str(run)) for word in argv]
    assert says.replace("RUN", str(run)) in refused(argv, tmp_path / "out", capsys, respond)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        respond.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: respond.py [@RECIPE ...] MODEL")
    assert "--compare MODEL" in text and "--prompt TEXT" in text
    assert "\n:\n" not in text, "an option without a heading"
