"""What the tests share: a start of a few thousand parameters and a little real data."""

import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch is imported, here and in the processes that tests start: small products gain nothing from threads, and on
# a busy machine spinning threads made the suite ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import ROOT, random_model, small

import spin
from kernels import onednn
from report import page

THREADS = torch.get_num_threads()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_runs.py")  # The longest file comes first.


@pytest.fixture(autouse=True, scope="module")
def plain_products(request):
    """oneDNN prepares every new shape, which takes longer than all products of a small run: most files do without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in ("test_onednn.py", "test_runs.py", "test_minimal.py"):
            patch.setattr(onednn, "available", lambda: False)
        yield
    # Runs that are compared bit by bit need the same number of threads, whichever files ran before in this process.
    assert torch.get_num_threads() == THREADS


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A hub-layout directory: the embedded task's tokenizer and a random model, so that nothing is memorised."""
    path = tmp_path_factory.mktemp("start")
    shipped = json.loads((ROOT / "pronounce/start/config.json").read_text())
    random_model(shipped["vocab_size"], shipped["eos_token_id"]).save_pretrained(path)
    (path / "tokenizer.json").write_text((ROOT / "pronounce/start/tokenizer.json").read_text())
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The first 80 words of the shipped dictionary that have letters only."""
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    with gzip.open(ROOT / "pronounce/cmudict.jsonl.gz", "rt") as file:
        path.write_text("".join(itertools.islice((line for line in file if json.loads(line)["prompt"].isalpha()), 80)))
    return path


@pytest.fixture(scope="session")
def whole(start, data, tmp_path_factory) -> Path:
    """The folder of the undisturbed run of `small`: only read it. pages.json beside it has a page per iterate."""
    folder, pages, make = tmp_path_factory.mktemp("whole"), [], page.page
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(onednn, "available", lambda: False)
        patch.setattr(page, "page", lambda folders: pages.append(make(folders)) or pages[-1])
        assert spin.main(small(start, data)) == 0
    (folder / "pages.json").write_text(json.dumps(pages))
    return folder / "run"


@pytest.fixture(scope="session")
def launch():
    """launch(argv, folders, script, ...) runs a world as ranks.py describes. Returns its answer."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/ranks.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def request(argv, folders, script="spin", **more):
        value = dict(script=script, argv=[str(word) for word in argv], folders=[str(folder) for folder in folders])
        server.stdin.write(json.dumps(value | more) + "\n")
        server.stdin.flush()
        return SimpleNamespace(**json.loads(server.stdout.readline()))

    yield request
    server.stdin.close()
    server.wait()


# Importing torch takes seconds, and a fork of a process that has imported it takes none.
ALONE = """
import os, runpy, sys, torch, torch._dynamo
for folder in sys.stdin:
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.chdir(folder.strip())
    sys.stdout, sys.stderr = (open(name, "w") for name in ("stdout", "stderr"))
    torch.manual_seed(0)
    runpy.run_path("example.py", run_name="__main__")
    sys.exit()
"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """alone(folder) runs the example.py in it, in the folder and with nothing of this project in the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    server = subprocess.Popen([sys.executable, "-c", ALONE], cwd=tmp_path_factory.mktemp("alone"), **options)

    def run(folder) -> None:
        server.stdin.write(f"{folder}\n")
        server.stdin.flush()
        assert int(server.stdout.readline()) == 0, (folder / "stderr").read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, for runs in ./run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
