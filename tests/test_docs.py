"""docs/: the code in them runs as it stands."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import OPTIONS, ROOT, rows

from runtime.options import parse

Options = OPTIONS["spin"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_file_works_alone_as_its_example_says(alone, tmp_path):
    """Examples of docs/vendoring.md get the files of their section's heading and, but for the first, model.py."""
    shown = set()
    for number, section in enumerate((ROOT / "docs/vendoring.md").read_text().split("\n## ")[1:]):
        for i, code in enumerate(blocks(section)):
            names = section.partition("\n")[0].split(" with ") + ["model.py"] * (i > 0)
            folder = tmp_path / f"{number}-{i}"
            folder.mkdir()
            shown |= {*names}
            for name in names:
                copy = shutil.copytree if name.endswith("/") else shutil.copyfile
                copy(ROOT / name, folder / Path(name).name)
            (folder / "example.py").write_text(code)
            alone(folder)
    assert shown == {"kernels/", "kernels/onednn.py", "llama.py", "lora.py", "model.py", "sampling.py"}


def test_the_iteration_from_python_runs(start, data, here):
    """The iteration in docs/python.md has at most 20 lines."""
    code, *_ = blocks((ROOT / "docs/python.md").read_text())
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    code = code.replace("runs/sft/final", str(start)).replace("train.jsonl", str(data)).replace("runs/mine", "run")
    code = code.replace("beta=2", "beta=2, max_new_tokens=8, rank=4, prompts=8, eval_share=0.2, device='cpu'")
    exec(code, {})
    assert len(rows(here / "run/metrics.jsonl")) == 2 and (here / "run/final/model.safetensors").is_file()


def test_files_and_links_in_the_documents_exist():
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != "runs")
    for document in DOCUMENTS:
        text = document.read_text()
        for path in re.findall(r"`([\w./-]+)`", text):
            if path.endswith((".py", ".args")) or path.startswith(folders):
                assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), f"{document}: {path}"
        for link, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            target = document.parent / link if link else document
            assert target.exists(), f"{document}: {link}"
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if place else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not place or place in anchors, f"{document}: {link}#{place}"


LAYERS = {  # What may import what, by the name of a folder or a file.
    "model": set(), "lora": set(), "sampling": set(), "kernels": set(), "data": set(), "evaluate": set(),
    "report": {"evaluate"}, "methods/losses": set(),
    "llama": {"model"},
    "player": {"model", "llama", "lora", "sampling", "kernels"},
    "runtime": {"model", "lora", "sampling", "kernels", "data", "evaluate", "report"},
    "spin": {"player", "runtime"},  # main() alone imports runtime: see test_minimal.py.
    "sft": {"player", "runtime", "spin"},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down_and_functions_are_short(name):
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    path = ROOT / name
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {module.partition(".")[0] for module in found if module} & ours - {name}
            assert found <= LAYERS[name], f"{file}: imports {found - LAYERS[name]}"
        for node in filter(lambda node: isinstance(node, ast.FunctionDef), ast.walk(ast.parse(file.read_text()))):
            assert node.end_lineno - node.lineno < 50, f"{file}: {node.name} has more than 50 lines"


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


def test_every_command_line_in_the_documents_is_valid(monkeypatch):
    """The command lines of README.md, docs/ and the recipes are parsed, for every script."""
    monkeypatch.chdir(ROOT)
    files = [*DOCUMENTS, *(ROOT / "recipes").glob("*.args")]
    texts = [re.sub(r"-m methods\.(\w+)", r"\1.py", file.read_text()) for file in files]
    pattern = r"(?:python|torchrun) [^`\n]*?\b(spin|sft|family|seft|sdft)\.py\b([^`#&\n]*)"
    found = sorted({(script, words.strip()) for text in texts for script, words in re.findall(pattern, text)})
    assert {script for script, _ in found} == set(OPTIONS) and len(found) > 15
    for script, arguments in found:
        words = [word for word in shlex.split(arguments) if word not in ("...", "--help")]
        parse(OPTIONS[script], words, f"{script}.py")
