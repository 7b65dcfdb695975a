"""docs/: the code in them runs as it stands."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import OPTIONS, ROOT, rows

from runtime.options import parse

Options = OPTIONS["spin"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def vendored() -> list[tuple[list[str], str]]:
    """(files, code) of every example in docs/vendoring.md: the file of its heading, and those that a sentence adds."""
    cases = []
    for section in (ROOT / "docs/vendoring.md").read_text().split("\n## ")[1:]:
        for i, code in enumerate(blocks(section)):
            names = section.partition("\n")[0].split(" with ")
            cases.append((names if i == 0 else [*names, "model.py"], code))
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
    assert names == {"kernels/", "kernels/onednn.py", "llama.py", "lora.py", "model.py", "sampling.py"}


def test_the_iteration_from_python_runs(start, data, here):
    """It has at most 20 lines."""
    code, *_ = blocks((ROOT / "docs/python.md").read_text())
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    code = code.replace("runs/sft/final", str(start)).replace("train.jsonl", str(data)).replace("runs/spin", "run")
    code = code.replace("beta=2", "beta=2, max_new_tokens=8, rank=4, batch=16, eval_share=0.2, device='cpu'")
    exec(code, {})
    assert len(rows(here / "run/metrics.jsonl")) == 2 and (here / "run/final/model.safetensors").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_links_in_the_documents_exist(document):
    text = document.read_text()
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    for path in re.findall(r"`([\w./-]+)`", text):
        if path.endswith((".py", ".args")) or path.startswith(folders):
            assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link


LAYERS = {  # What may import what, by the name of a folder or a file at the top.
    "model": set(), "lora": set(), "sampling": set(), "kernels": set(), "data": set(), "evaluate": set(),
    "report": {"evaluate"},
    "llama": {"model"},
    "player": {"model", "llama", "lora", "sampling", "kernels"},
    "runtime": {"model", "lora", "sampling", "kernels", "data", "evaluate", "report"},
    "spin": {"player", "runtime"},  # runtime in main() alone: see test_minimal.py
    "sft": {"player", "runtime", "spin"},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down(name):
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    path = ROOT / name
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {module.partition(".")[0] for module in found if module} & ours - {name}
            assert found <= LAYERS[name], f"{file}: imports {found - LAYERS[name]}"


def test_there_is_one_recommendation_for_beta():
    assert Options().beta == (1.0,) * 3 and "**`--beta`: 1," in (ROOT / "docs/guide.md").read_text()


def test_options_from_python_say_which_is_wrong():
    assert Options(lr=[1e-3, 1e-4, 1e-5], data="x").data == ("x",)
    message = r"--lr -1: expected a number in \(0, 1000\]"
    with pytest.raises(ValueError, match=message):
        Options(lr=-1)
    assert message.replace("\\", "") in (ROOT / "docs/python.md").read_text()
    with pytest.raises(TypeError, match="learning_rate"):
        Options(learning_rate=1e-3)


def commands() -> list[tuple[str, str]]:
    """(script, arguments) of every command line in README.md, docs/ and the recipes."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.args")]
    texts = [re.sub(r"-m methods\.(\w+)", r"\1.py", file.read_text()) for file in files]
    pattern = r"(?:python|torchrun) [^`\n]*?\b(spin|sft|family|seft|sdft)\.py\b([^`#&\n]*)"
    return sorted({(script, words.strip()) for text in texts for script, words in re.findall(pattern, text)})


def test_the_command_lines_in_the_docs_are_found():
    assert {script for script, _ in commands()} == set(OPTIONS) and len(commands()) > 15


@pytest.mark.parametrize("script, arguments", commands())
def test_every_command_line_in_the_docs_is_valid(script, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(arguments) if word not in ("...", "--help")]
    parse(OPTIONS[script], words, f"{script}.py")
