"""report/trackers.py: every row reaches TensorBoard and W&B once, also when a run dies and resumes.

Modules in their place do what those do: TensorBoard drops rows from `purge_step` on, W&B refuses a step that is past.
"""

import json
import math
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
from helpers import die_at, refused, rows, small

import spin
from report import trackers
from runtime.training import Training

CHEAP = dict(prompts=24, eval_limit=4)
EVENTS = [  # of a run of two iterations: (event, file, row)
    ("iterate", "metrics", {"iterate": 0, "nll": 2.0, "frontier": []}),
    *(("step", "steps-0", {"iteration": 0, "step": n, "loss": 0.1 * n, "skipped": False}) for n in (1, 2, 3)),
    ("iterate", "metrics", {"iterate": 1, "nll": 1.5, "since_start": {}}),
    *(("step", "steps-1", {"iteration": 1, "step": n, "loss": None, "skipped": True}) for n in (1, 2, 3)),
    ("iterate", "metrics", {"iterate": 2, "nll": 1.0}),
]  # fmt: skip


class Server:
    """Both modules, and what they show: {name: {number: value}}."""

    def __init__(self):
        self.shown, self.ids, self.closed = defaultdict(dict), [], 0

    def close(self):
        self.closed += 1

    def numbers(self):
        return {number for values in self.shown.values() for number in values}

    def SummaryWriter(self, folder, purge_step):
        assert folder.endswith("run/tensorboard")
        for values in self.shown.values():
            for number in [n for n in values if n >= purge_step]:
                del values[number]

        def add_scalar(name, value, number):
            assert number not in self.shown[name], "shown twice"
            self.shown[name][number] = value

        return SimpleNamespace(add_scalar=add_scalar, close=self.close)

    def init(self, id, **settings):
        assert settings["resume"] == "allow" and settings["dir"] == settings["name"]
        assert settings["config"] == {"lr": 0.1} and settings["project"] == "spin"
        self.ids.append(id)
        run = SimpleNamespace(step=max(self.numbers(), default=-1) + 1, finish=self.close)

        def log(values, step):
            assert step >= run.step and step not in self.numbers()
            for name, value in values.items():
                self.shown[name][step] = value

        run.log = log
        return run


def process(out, name, events, finished=False):
    """A process that takes part in the run: it tells of a step and writes it, or writes an iterate and tells of it."""
    (observer,) = trackers.start([name], out, {"args": {"lr": 0.1}})
    for event, file, row in events:
        path = out / f"{file}.jsonl"
        lines = rows(path) if path.exists() else []
        if event == "step":
            lines = lines[: row["step"] - 1]  # A resumed run has cut the file.
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            observer.step(row)
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, row]))
        if event == "iterate":
            observer.iterate([*lines, row], {}, "")
    if finished:
        observer.finish(rows(out / "metrics.jsonl"), {})
    observer.close()


@pytest.mark.parametrize("name", trackers.MODULES)
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("died", range(1, len(EVENTS) + 1))
def test_every_row_is_shown_once(died, told, name, tmp_path, monkeypatch):
    """A process dies after any event, or before it has told of it; the next one repeats an unfinished iteration."""
    out, server = tmp_path / "run", Server()
    out.mkdir()
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], server)
    process(out, name, EVENTS[: died - 1 + told])
    if not told and EVENTS[died - 1][0] == "iterate":  # it had written the row
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(EVENTS[died - 1][2]) + "\n")
    finished = len(rows(out / "metrics.jsonl"))
    process(out, name, EVENTS[1 + 4 * (finished - 1) :], finished=True)
    expected = defaultdict(dict)
    for number, (event, _, row) in enumerate(EVENTS):
        for key in row.keys() & {"nll", "loss", "skipped"}:
            if row[key] is not None:
                expected[f"{'train' if event == 'step' else 'iterate'}/{key}"][number] = row[key]
    assert server.shown == expected
    assert server.closed == 2 or (name == "tensorboard" and died == 1 and not told), "nothing was opened"
    assert len(set(server.ids)) == (name == "wandb")


@pytest.mark.parametrize("name", trackers.MODULES)
def test_a_missing_package_is_one_line_that_says_what_to_install(name, start, data, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], None)
    error = refused(small(start, data, log=name), here / "run", capsys)
    assert f"--log {name}: " in error and f"; pip install {name}" in error


def test_a_tracker_that_cannot_start_is_refused_and_one_that_fails_ends_no_run(start, data, here, monkeypatch, capsys):
    def init(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert spin.main(small(start, data, iterations=1, log="wandb", **CHEAP)) == 2
    assert "spin.py: error: --log wandb: no API key\n" in capsys.readouterr().err
    broken = SimpleNamespace(step=0, log=lambda values, step: 1 / 0, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: broken))
    assert spin.main(small(start, data, iterations=1, log="wandb", **CHEAP)) == 0
    assert capsys.readouterr().err == "--log wandb: division by zero; the run goes on without it\n"


def test_the_real_tensorboard_shows_every_row_once(start, data, here):
    """If it is installed: its own reader, which drops what a resumed run logs again."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    calls = []
    argv = small(start, data, log="tensorboard", save_minutes=1000, **CHEAP)
    die_at(Training, "step", argv, lambda *args: len(calls) == 4 or calls.append(0))
    assert spin.main(argv) == 0
    shown = accumulator.EventAccumulator(str(here / "run/tensorboard"))
    shown.Reload()
    losses = [row["loss"] for t in (0, 1) for row in rows(here / f"run/steps-{t}.jsonl")]
    found = shown.Scalars("train/loss")
    assert [event.step for event in found] == [1, 2, 4, 5, 6]
    assert all(math.isclose(event.value, loss, rel_tol=1e-6) for event, loss in zip(found, losses, strict=True))
