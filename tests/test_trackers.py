"""runtime/trackers.py: every row reaches TensorBoard and W&B once, also when a run dies and resumes.

Modules in their place do what those do: TensorBoard drops rows from `purge_step` on, W&B refuses a step that is past.
"""

import math
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
from helpers import die_at, refused, rows, small

import spin
from runtime import trackers
from runtime.trackers import Trackers

CHEAP = dict(prompts=24, eval_limit=4)


class Server:
    """What both show: {name: {number: value}}."""

    def __init__(self):
        self.shown, self.numbers, self.ids, self.closed = defaultdict(dict), [], [], 0


@pytest.fixture
def tensorboard(monkeypatch):
    server = Server()

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == "run/tensorboard"
            for values in server.shown.values():
                for number in [n for n in values if n >= purge_step]:
                    del values[number]

        def add_scalar(self, name, value, number):
            assert number not in server.shown[name], "shown twice"
            server.shown[name][number] = value

        def close(self):
            server.closed += 1

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return server


@pytest.fixture
def wandb(monkeypatch):
    server = Server()

    class Run:
        def __init__(self, id, **settings):
            assert settings["resume"] == "allow" and settings["dir"] == settings["name"] == "run"
            assert settings["config"]["lora_dropout"] == 0.1 and settings["project"] == "spin"
            server.ids.append(id)
            self.step = max(server.numbers, default=-1) + 1

        def log(self, values, step):
            assert step >= self.step and step not in server.numbers
            self.step = step
            server.numbers.append(step)
            for name, value in values.items():
                server.shown[name][step] = value

        def finish(self):
            server.closed += 1

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    return server


def expected(folder):
    """The rows of the run's own files by their number: the start, 5 steps, iterate 1, and so on."""
    shown, number = defaultdict(dict), 0
    for t, iterate in enumerate(rows(folder / "metrics.jsonl")):
        for group, lines in (("train", rows(folder / f"steps-{t - 1}.jsonl") if t else []), ("iterate", [iterate])):
            for line in lines:
                nested = {"since_start", "since_last", "at_equal_entropy", "frontier"}
                for name in line.keys() - nested - {"iteration", "step", "iterate"}:
                    if line[name] is not None:
                        shown[f"{group}/{name}"][number] = line[name]
                number += 1
    return shown


@pytest.mark.parametrize("where, name", [(spin, "take_step"), (Trackers, "iterate"), (spin.Run, "draw")])
def test_every_row_is_shown_once_by_both(start, data, here, tensorboard, wandb, where, name):
    """Died in the third step of the second iteration, with a checkpoint per iteration, or before or after a row."""
    calls = []
    argv = small(start, data, log="tensorboard,wandb", save_minutes=1000, **CHEAP)

    def fatal(*args):
        calls.append(args)
        return len(calls) == {"take_step": 5, "iterate": 2, "draw": 2}[name]

    die_at(where, name, argv, fatal)
    assert spin.main(argv) == 0
    shown = expected(here / "run")
    assert len(shown["train/loss"]) == 2 + 3 and len(shown["iterate/nll"]) == 3
    for server in (tensorboard, wandb):
        assert server.shown == shown
        assert server.closed == 2
    assert len(set(wandb.ids)) == 1 and len(wandb.ids) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_that_says_what_to_install(name, start, data, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], None)
    error = refused(small(start, data, log=name), here / "run", capsys)
    assert f"--log {name}: " in error and f"; pip install {name}" in error


def test_nothing_is_imported_unless_asked_for(start, data, here, monkeypatch):
    monkeypatch.setattr(trackers, "importlib", None)
    assert spin.main(small(start, data, iterations=1, **CHEAP)) == 0


def test_a_tracker_that_does_not_begin_is_refused_and_one_that_fails_ends_no_run(
    start, data, here, monkeypatch, capsys
):
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
    """Where it is installed: its own reader, which drops what a resumed run says again."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    calls = []
    argv = small(start, data, log="tensorboard", save_minutes=1000, **CHEAP)
    die_at(spin, "take_step", argv, lambda *args: len(calls) == 4 or calls.append(0))
    assert spin.main(argv) == 0
    shown = accumulator.EventAccumulator(str(here / "run/tensorboard"))
    shown.Reload()
    wanted = expected(here / "run")
    assert set(shown.Tags()["scalars"]) == set(wanted)
    for name, values in wanted.items():
        found = {event.step: event.value for event in shown.Scalars(name)}
        assert found.keys() == values.keys() and len(shown.Scalars(name)) == len(values), name
        assert all(math.isclose(found[n], values[n], rel_tol=1e-6, abs_tol=1e-6) for n in values), name
