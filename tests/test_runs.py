"""Whole runs: the default run, its recipes, and GSM8K through a model of the 125M shape."""

import gzip
import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT, player_of, rows

import sft
import spin
from data.examples import Example, encode, held_out, load_tokenizer
from data.templates import DEFAULT_TEMPLATE
from evaluate import changes
from kernels import onednn
from model import GPTNeo, GPTNeoConfig

SHARED = Path(os.environ.get("SPIN_SHARED", ROOT.parent / "shared"))


def dictionary() -> list[dict]:
    """The shipped words, with their pronunciations."""
    with gzip.open(ROOT / "pronounce/cmudict.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_default_run_improves_on_its_start(here):
    """One shorter iteration lowers the NLL of all held-out words by more than three paired standard errors.

    The run itself evaluates few of them, since it also samples responses to each.
    """
    shorter = ["--eval-temperatures", "1", "--iterations", "1", "--prompts", "7000", "--eval-limit", "40"]
    assert spin.main(shorter) == 0
    start, found = ROOT / "pronounce/start", []
    words = [Example("", 1, r["prompt"], r["response"], []) for r in dictionary() if held_out(r["prompt"], 0.1)]
    encode(words, load_tokenizer(start, 393, 396), DEFAULT_TEMPLATE.replace(r"\n", "\n"), 393)
    items = [(e.prompt_ids, e.real_ids) for e in words]
    with onednn.products():
        for folder in (start, here / "runs/spin/iterate-1"):
            logps = player_of(GPTNeo.from_pretrained(folder)).logps(items)
            found.append([{"values": {"nll": (-logp, len(i[1]))}} for (logp,), i in zip(logps, items, strict=True)])
    change, error = changes(*found)["nll"]
    assert change < -3 * error, change / error
    plot = ElementTree.parse(here / "runs/spin/metrics.svg").getroot()
    text = " ".join(t.text or "" for t in plot.iter("{http://www.w3.org/2000/svg}text"))
    assert "sampled" in text and "grad norm" in text


def test_start_can_be_made_again(alone, tmp_path):
    """The shipped data and tokenizer are what pronounce/make_data.py makes of the dictionary, byte for byte."""
    (tmp_path / "pronounce").mkdir()
    for name in ("model.py", "pronounce/make_data.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "example.py").write_text("import runpy\nrunpy.run_path('pronounce/make_data.py', run_name='__main__')")
    alone(tmp_path)
    for name in ("cmudict.jsonl.gz", "start/tokenizer.json", "start/config.json"):
        assert (tmp_path / "pronounce" / name).read_bytes() == (ROOT / "pronounce" / name).read_bytes(), name


def test_sft_recipe_trains_from_scratch(here):
    """The command that made the start, cut to 800 words: held-out loss falls from about ln V."""
    (here / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in dictionary()[::140]))
    argv = [f"@{ROOT}/recipes/pronounce-sft.args", "--data", "few.jsonl", "--epochs", "1", "--eval-limit", "40"]
    assert sft.main([*argv, "--batch", "64", "--max-new-tokens", "4", "--out", "run"]) == 0
    before, after = rows(here / "run/metrics.jsonl")
    assert after["nll"] < 0.8 * before["nll"]


def test_gsm8k_at_the_125m_shape(here):
    """One short iteration runs on real text with the real vocabulary, through two of the twelve layers."""
    if not SHARED.is_dir():
        pytest.skip("SPIN_SHARED names no directory with GSM8K and the GPT-2 vocabulary")
    kinds = ((("global", "local"), 1),)
    config = GPTNeoConfig(hidden_size=768, num_layers=2, num_heads=12, attention_types=kinds)
    GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).save_pretrained(here / "model")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / "data/gpt2-tokenizer" / name, here / "model" / name)
    lines = sorted((SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()[:400], key=len)
    (here / "train.jsonl").write_text("\n".join(lines[:4]))
    (here / "eval.jsonl").write_text(lines[4])
    flags = "--model model --data train.jsonl --eval-data eval.jsonl --eval-temperatures 1 --iterations 1 --out run"
    flags += " --max-new-tokens 8 --epochs 1 --batch 2 --lr 1e-3 --beta 0.1"
    assert spin.main(flags.split()) == 0
    pairs, steps = rows(here / "run/pairs-0.jsonl"), rows(here / "run/steps-0.jsonl")
    assert len(pairs) == 4 and all(1 <= len(ids) <= 8 for pair in pairs for ids in pair["generated_ids"])
    assert len(steps) == 2
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[1]["loss"] < steps[0]["loss"]
