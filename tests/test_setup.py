"""runtime/setup.py: models from the hub, numbers in bf16, which examples are held out, what counts as right."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from helpers import begin, flags, rows

import spin
from runtime.data import decode
from runtime.run import Run


def test_no_held_out_word_is_ever_trained_on(start, data, tmp_path):
    """Supervised fine-tuning and self-play hold out the same prompts of the same data."""
    _, examples, run = begin(start, data, tmp_path / "a")
    _, sft_examples, sft_run = begin(start, data, tmp_path / "b", command="sft", from_scratch=True, rank=0, beta=None)
    assert not {e.prompt for e in examples} & {e.prompt for e in run.heldout}
    assert [e.prompt for e in run.heldout] == [e.prompt for e in sft_run.heldout]
    assert [e.prompt for e in examples] == [e.prompt for e in sft_examples]


def test_perfect_responses_count_as_right_whatever_surrounds_them(start, tmp_path):
    """White space or an end-of-sequence text around a reference is not asked of the player."""
    path = tmp_path / "x.jsonl"
    texts = ["HH AH0\n", " HH AH0", "HH AH0<|endoftext|>", "HH AH0"]
    path.write_text("".join(json.dumps({"prompt": f"w{i}", "response": t}) + "\n" for i, t in enumerate(texts * 9)))
    _, _, run = begin(start, path, tmp_path / "run")
    assert run.heldout
    for example in run.heldout:
        assert decode(example.real_ids, run.tokenizer, run.eos_token_id) in example.references == ["HH AH0"]


@pytest.mark.parametrize("rank", [4, 0])
def test_bf16_run_keeps_small_updates(start, data, tmp_path, rank):
    """bf16: the frozen base is bf16 under LoRA, everything trained is fp32, in full-parameter training too."""
    player, _, _ = begin(start, data, tmp_path / "run", rank=rank, precision="bf16")
    assert player.dtype == torch.bfloat16
    trained = {p.dtype for p in player.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in player.model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == ({torch.bfloat16} if rank else set())
    assert spin.main(flags(start, data, tmp_path / "main", rank=rank, precision="bf16", lr=1e-3)) == 0
    first = rows(tmp_path / "main/steps-0.jsonl")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=5e-3)


def test_model_may_be_a_hub_id(start, data, tmp_path, monkeypatch, capsys):
    """owner/name is fetched once for safetensors, and again for .bin files only where there are none.

    The commit that the hub answers with is in the run's record, and a resumed run asks for that one.
    """
    asked, commit = [], "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(start, tmp_path / commit)

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, [p for p in allow_patterns if "model" in p]))
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    finish = Run.finish
    monkeypatch.setattr(Run, "finish", lambda *a: 1 / 0)  # dies before its end
    with pytest.raises(ZeroDivisionError):
        spin.main(flags("owner/gpt-neo.tiny", data, tmp_path / "run"))
    assert json.loads((tmp_path / "run/run.json").read_text())["revision"] == commit
    monkeypatch.setattr(Run, "finish", finish)
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
    assert "--model owner/name" in error
    assert "no network" in error
    assert error.count("\n") == 1
