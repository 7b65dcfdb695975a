"""examples/minimal.py plays SPIN without the machinery, and plays the same game as spin.py."""

import shutil

from helpers import ROOT, rows, write_rows

import spin
from examples import minimal

FILES = ("model.py", "llama.py", "lora.py", "sampling.py", "player.py", "spin.py", "kernels", "examples", "pronounce")
PROGRAM = """
import sys
sys.path.insert(0, "examples")
import minimal
assert not {name.split(".")[0] for name in sys.modules} & {"runtime", "data", "report", "evaluate"}
"""


def test_the_method_needs_nothing_of_the_machinery(alone, tmp_path):
    """minimal.py imports in a folder that holds only the files it names, and loads no module of the machinery."""
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "example.py").write_text(PROGRAM)
    alone(tmp_path)


def test_pairs_and_losses_are_those_of_spin(tmp_path, capsys):
    """Two iterations with LoRA on the same texts have the same bits in every id, log-probability, loss and margin.

    One process, one machine, the same number of threads: only then are bits to be expected.
    """
    texts = [(f"w{i:x}rd", "W AA1 R D" if i % 2 else "V UH0 R T IH1") for i in range(60)]
    data = write_rows(tmp_path / "data.jsonl", ({"prompt": p, "response": r} for p, r in texts))
    heldout = write_rows(tmp_path / "heldout.jsonl", [{"prompt": "hello", "response": "HH AH0 L OW1"}])
    start, out = ROOT / "pronounce" / "start", tmp_path / "out"
    words = f"--model {start} --data {data} --eval-data {heldout} --out {out} --iterations 2 --max-new-tokens 32"
    words += " --lr 1e-3 5e-4 --beta 0.5 --epochs 2 --batch 16"
    assert spin.main(words.split()) == 0
    args = minimal.Options(lr=(1e-3, 5e-4), beta=(0.5, 0.5), epochs=(2, 2), batch=16)
    run = minimal.play(texts, start, args)
    assert len(run.pairs) == 2
    steps = []
    for t, pairs in enumerate(run.pairs):
        for name in ("prompt_ids", "real_ids", "generated_ids", "opponent_real_logp", "opponent_generated_logps"):
            assert [row[name] for row in rows(out / f"pairs-{t}.jsonl")] == [getattr(pair, name) for pair in pairs]
        steps += rows(out / f"steps-{t}.jsonl")
    assert len(steps) == len(run.log) > 8
    for name in ("loss", "margin", "real_logp", "generated_logp"):
        assert [row[name] for row in steps] == [row[name] for row in run.log]
    assert abs(steps[0]["loss"] - 0.6931) < 1e-4 and steps[-1]["loss"] < 0.6
    assert "before" in capsys.readouterr().out
