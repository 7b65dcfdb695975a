"""docs/: the code in them runs as it stands."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, rows
from torch.nn import functional as F

import lora
from model import GPTNeo, GPTNeoConfig
from runtime import plan
from runtime.options import Args


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def vendored() -> list[tuple[list[str], str]]:
    """(files, code) of every example in docs/vendoring.md: the file of its heading, and those that a sentence adds."""
    cases = []
    for section in (ROOT / "docs/vendoring.md").read_text().split("\n## ")[1:]:
        for i, code in enumerate(blocks(section)):
            name = section.partition("\n")[0]
            cases.append(([name] if i == 0 else [name, "model.py"], code))
    return cases


@pytest.mark.parametrize("names, code", vendored(), ids=lambda value: "+".join(value) if type(value) is list else "")
def test_every_file_works_alone_as_its_example_says(names, code, tmp_path):
    """In an empty folder, with nothing of this project in the path."""
    for name in names:
        if name.endswith("/"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "example.py").write_text(f"import torch\ntorch.manual_seed(0)\n{code}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "example.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_all_that_can_be_taken_is_shown():
    names = {name for names, _ in vendored() for name in names}
    assert names == {"kernels/", "kernels/onednn.py", "lora.py", "model.py", "sampling.py"}


def test_the_iteration_from_python_runs_and_oneDNN_is_used_without_further_steps(start, data, here, monkeypatch):
    """At most 15 lines; F.linear is another while the player computes and itself again afterwards."""
    code, *_ = blocks((ROOT / "docs/python.md").read_text())
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    code = code.replace("runs/sft/final", str(start)).replace("train.jsonl", str(data)).replace("runs/spin", "run")
    code = code.replace("beta=2", "beta=2, max_new_tokens=8, rank=4, batch=16, eval_share=0.2, device='cpu'")
    plain, seen = F.linear, set()
    forward = GPTNeo.forward
    monkeypatch.setattr(GPTNeo, "forward", lambda *a, **k: (seen.add(F.linear is plain), forward(*a, **k))[1])
    exec(code, {})
    assert len(rows(here / "run/metrics.jsonl")) == 2 and (here / "run/final/model.safetensors").is_file()
    assert seen == {not torch.backends.mkldnn.is_available()} and F.linear is plain


def test_the_snippet_in_the_readme_gives_the_log_probabilities_of_the_response(start):
    (code,) = [code for code in blocks((ROOT / "README.md").read_text()) if "linear_logprobs" in code]
    model = GPTNeo.from_pretrained(start).eval()
    ids, prompt_length = torch.tensor([[5, 6, 7, 8, 9, 10]]), 4
    names = {"model": model, "input_ids": ids, "prompt_length": prompt_length}
    exec(code, names)
    expected = model.logits(model(ids))[0].log_softmax(-1)[[3, 4], [9, 10]]
    torch.testing.assert_close(names["logps"], expected, atol=1e-5, rtol=0)


SHAPES = {"125M": (768, 12, 12), "1.3B": (2048, 24, 16), "2.7B": (2560, 32, 20)}  # width, layers, heads


def plan_rows() -> list[str]:
    """The table of memory in docs/guide.md, computed."""
    lines = []
    for name, (width, layers, heads) in SHAPES.items():
        kinds = ((("global", "local"), layers // 2),)
        config = GPTNeoConfig(hidden_size=width, num_layers=layers, num_heads=heads, attention_types=kinds)
        for rank, bf16, slots, trained in (
            (16, True, 2, "LoRA of rank 16, bf16"), (16, False, 2, "LoRA of rank 16, fp32"),
            (0, True, 2, "all, AdamW, bf16"), (0, True, 1, "all, RMSProp, bf16"),
        ):  # fmt: skip
            with torch.device("meta"):
                model = GPTNeo(config)
                if rank:
                    lora.add_lora(model, rank, 2 * rank)
            needs = plan.needs(
                model, optimizer_slots=slots, bf16=bf16, cache_tokens=131072, batch_size=64, row_tokens=512,
                iterations=3, pair_tokens=0,
            )  # fmt: skip
            cells = map(plan.gib, (needs.training, needs.generation, needs.disk))
            lines.append(f"| {name} | {trained} | {' | '.join(cells)} |")
    return lines


def test_the_memory_in_the_guide_is_what_the_plan_computes():
    assert "\n".join(plan_rows()) in (ROOT / "docs/guide.md").read_text()


def test_the_memory_of_a_step_in_the_guide_is_that_of_the_benchmark():
    """Of 8192 tokens, without and with --checkpoint."""
    text = (ROOT / "benchmarks/README.md").read_text().partition("<!-- memory -->")[2].partition("<!-- end")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if "LoRA" in line or "AdamW" in line]
    assert len(cells) == 6
    lines = [f"| {few[0]} | {' | '.join(few[5:] + all_[5:])} |" for few, all_ in zip(cells[::2], cells[1::2])]
    assert "\n".join(lines) in (ROOT / "docs/guide.md").read_text()


def test_there_is_one_recommendation_for_beta():
    assert Args().beta == (1.0,) and "**`--beta`: 1," in (ROOT / "docs/guide.md").read_text()


def test_options_from_python_say_which_is_wrong():
    assert Args(lr=1e-3).lr == (1e-3,) and Args(lr=[1e-3] * 3, data="x").data == ("x",)
    with pytest.raises(ValueError, match=r"--lr -1\.0: expected a positive number up to 1000"):
        Args(lr=-1)
    with pytest.raises(ValueError, match=r"--lr 'fast': expected comma-separated numbers"):
        Args(lr="fast")
    with pytest.raises(TypeError, match="learning_rate"):
        Args(learning_rate=1e-3)
