"""report/trackers.py: every row reaches TensorBoard and W&B under its number, also when a run dies and resumes."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import failed, refused, rows, small, write_rows

import spin
from report import trackers

CHEAP = dict(prompts=16, eval_limit=4)
EVENTS = [  # (event, file, row) of a run of two iterations
    ("iterate", "metrics", {"iterate": 0, "nll": 2.0, "frontier": []}),
    *(("step", "steps-0", {"iteration": 0, "step": n, "loss": 0.1 * n, "skipped": False}) for n in (1, 2, 3)),
    ("iterate", "metrics", {"iterate": 1, "nll": 1.5, "since_start": {}}),
    *(("step", "steps-1", {"iteration": 1, "step": n, "loss": None, "skipped": True}) for n in (1, 2, 3)),
    ("iterate", "metrics", {"iterate": 2, "nll": 1.0}),
]  # fmt: skip
LOGGED = [
    {"iterate/nll": 2.0}, *({"train/loss": 0.1 * n, "train/skipped": 0.0} for n in (1, 2, 3)),
    {"iterate/nll": 1.5}, *[{"train/skipped": 1.0}] * 3, {"iterate/nll": 1.0},
]  # fmt: skip


def process(out, events, finished=False):
    """What a process of the run logs. A step is told before it is written, an iterate only afterwards."""
    logged = []

    def log(values, number):
        assert number == len(logged)
        logged.append(values)

    observer = trackers.Tracker("name", out, log, None)
    for event, file, row in events:
        path = out / f"{file}.jsonl"
        lines = rows(path) if path.exists() else []
        if event == "step":
            lines = lines[: row["step"] - 1]  # A resumed run has cut the file.
            write_rows(path, lines)
            observer.step(row)
        write_rows(path, [*lines, row])
        if event == "iterate":
            observer.iterate([*lines, row], {}, "")
    if finished:
        observer.finish(rows(out / "metrics.jsonl"), {})
    return logged


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("died", range(1, len(EVENTS) + 1))
def test_a_resumed_run_logs_every_row_under_its_number(died, told, tmp_path):
    """A process dies after any event, or before the event is told; the next one repeats an unfinished iteration."""
    assert process(tmp_path, EVENTS[: died - 1 + told]) == LOGGED[: died - 1 + told]
    if not told and EVENTS[died - 1][0] == "iterate":  # The process had written the row.
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(EVENTS[died - 1][2]) + "\n")
    finished = len(rows(tmp_path / "metrics.jsonl")) - 1
    assert process(tmp_path, EVENTS[1 + 4 * finished :], finished=True) == LOGGED


def test_tensorboard_forgets_what_an_earlier_process_logged(tmp_path, monkeypatch):
    opened, shown = [], []
    writer = SimpleNamespace(add_scalar=lambda *values: shown.append(values), close=None)
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: opened.append((folder, purge_step)) or writer)
    monkeypatch.setitem(sys.modules, trackers.MODULES["tensorboard"], module)
    log, _ = trackers.tensorboard(tmp_path, {})
    log({"iterate/nll": 2.0, "iterate/kl": 0.0}, 0)
    log({"train/loss": 0.5}, 1)
    assert opened == [(f"{tmp_path}/tensorboard", 0)]
    assert shown == [("iterate/nll", 2.0, 0), ("iterate/kl", 0.0, 0), ("train/loss", 0.5, 1)]


def test_wandb_keeps_its_run_and_the_rows_that_it_has(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    ids, steps = [], []

    def init(id, **settings):
        path = str(tmp_path)
        assert settings == {"dir": path, "name": path, "config": {"lr": 0.1}, "project": "spin", "resume": "allow"}
        ids.append(id)
        return SimpleNamespace(step=2, log=lambda values, step: steps.append(step), finish=None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        log, _ = trackers.wandb(tmp_path, {"args": {"lr": 0.1}})
        for number in range(4):
            log({}, number)
    assert steps == [2, 3] * 2 and len(ids) == 2 and ids[0] == ids[1]


@pytest.mark.parametrize("name", trackers.MODULES)
def test_a_missing_package_is_one_line_that_says_what_to_install(name, start, data, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], None)
    error = refused(small(start, data, log=name), here / "run", capsys)
    assert f"--log {name}: " in error and f"; pip install {name}" in error


def test_a_tracker_that_cannot_start_is_refused_and_one_that_fails_ends_no_run(start, data, here, monkeypatch, capsys):
    def init(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    error = failed(small(start, data, iterations=1, log="wandb", **CHEAP), capsys)
    assert error == "spin.py: error: --log wandb: no API key\n"
    broken = SimpleNamespace(step=0, log=lambda values, step: 1 / 0, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: broken))
    assert spin.main(small(start, data, iterations=1, log="wandb", **CHEAP)) == 0
    assert capsys.readouterr().err == "--log wandb: division by zero; the run goes on without it\n"
