"""Whole runs as a user starts them: the default run, its recipes, and GSM8K through a model of the 125M shape."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT, rows

from model import GPTNeo, GPTNeoConfig

SHARED = Path(os.environ.get("SPIN_SHARED", ROOT.parent / "shared"))


def run(script, *argv, cwd) -> str:
    """A script as a process of its own; returns what it printed."""
    done = subprocess.run([sys.executable, str(ROOT / script), *argv], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_default_run_improves_on_its_start(tmp_path):
    """`python spin.py` without a recipe, from another directory: table, plot, files, and better held-out metrics.

    After its three iterations the NLL is lower by more than three paired standard errors (by 5.7 at the time of
    writing), and no metric is worse by as many.
    """
    printed = run("spin.py", "--eval-temperatures", "1", cwd=tmp_path)
    out = tmp_path / "runs/spin"
    last = rows(out / "metrics.jsonl")[-1]
    gains = {}
    for key, sign in (("greedy", 1), ("sampled", 1), ("greedy_error", -1), ("sampled_error", -1), ("nll", -1)):
        change, error = last["since_start"][key]
        gains[key] = sign * change / error
    assert gains["nll"] > 3 and min(gains.values()) > -3, gains
    assert "Held-out metrics" in printed and "Training signals" in printed
    plot = ElementTree.parse(out / "metrics.svg").getroot()
    text = " ".join(t.text or "" for t in plot.iter("{http://www.w3.org/2000/svg}text"))
    assert "sampled" in text and "grad norm" in text
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"final", "iterate-1", "iterate-2", "iterate-3"}


def test_start_can_be_made_again(tmp_path):
    """The shipped data and tokenizer are what pronounce/make_data.py makes of the dictionary, byte for byte."""
    (tmp_path / "pronounce").mkdir()
    for name in ("model.py", "pronounce/make_data.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "pronounce/make_data.py"], cwd=tmp_path, check=True, capture_output=True)
    for name in ("cmudict.jsonl.gz", "start/tokenizer.json", "start/config.json"):
        assert (tmp_path / "pronounce" / name).read_bytes() == (ROOT / "pronounce" / name).read_bytes(), name


def test_sft_recipe_trains_from_scratch(tmp_path):
    """The command that made the start, cut to 1,200 words: held-out loss falls from about ln V."""
    argv = [f"@{ROOT}/recipes/pronounce-sft.args", "--prompts", "1200", "--epochs", "1", "--eval-limit", "200"]
    run("sft.py", *argv, "--out", "run", cwd=tmp_path)
    before, after = rows(tmp_path / "run/metrics.jsonl")
    assert after["nll"] < 0.8 * before["nll"]


def test_gsm8k_at_the_125m_shape(tmp_path):
    """One short iteration on real text and the real vocabulary, through four of the twelve layers."""
    layers, prompts, tokens = 4, 6, 12
    if not SHARED.is_dir():
        pytest.skip("SPIN_SHARED names no directory with GSM8K and the GPT-2 vocabulary")
    kinds = ((("global", "local"), layers // 2),)
    config = GPTNeoConfig(hidden_size=768, num_layers=layers, num_heads=12, attention_types=kinds)
    GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "model")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / "data/gpt2-tokenizer" / name, tmp_path / "model" / name)
    lines = sorted((SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()[:400], key=len)
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:prompts]))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[prompts : prompts + 2]))
    run(
        "spin.py", "--model", "model", "--data", "train.jsonl", "--eval-data", "eval.jsonl",
        "--eval-temperatures", "0.8", "--iterations", "1", "--max-new-tokens", str(tokens), "--epochs", "1",
        "--batch", str(prompts // 2), "--lr", "1e-3", "--beta", "0.1", "--out", "run",
        cwd=tmp_path,
    )  # fmt: skip
    pairs, steps = rows(tmp_path / "run/pairs-0.jsonl"), rows(tmp_path / "run/steps-0.jsonl")
    assert len(pairs) == prompts and all(1 <= len(ids) <= tokens for pair in pairs for ids in pair["generated_ids"])
    assert len(steps) == 2
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[1]["loss"] < steps[0]["loss"]
