"""benchmarks/: an error or a time limit costs no case its figures, results are written at once."""

import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import bench
import generation_cases
import pytest
import torch
import training_cases
from bench import PARTS, Case, Results, Ways
from generation_cases import random_model

import sampling
from model import GPTNeoConfig

CPU = torch.device("cpu")


def broken() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def case(name: str, estimate: float = 0.0, **calls: Callable) -> Case:
    calls = calls or {"ours": lambda: torch.ones(1000)}
    return Case(name, lambda: Ways(calls, rates={"ours": (2, "pairs")}), estimate=estimate)


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path / "results", CPU)


def stored(results: Results) -> dict[str, dict]:
    return json.loads(results.path.read_text())["cases"]


def test_a_case_that_cannot_be_built_ends_no_other(tmp_path, monkeypatch, capsys):
    """Its failure is printed, stored, and in the tables, beside the stored cases of other runs."""
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text("head\n<!-- results -->\nold\n<!-- end of results -->\ntail\n")
    Results(tmp_path / "results", CPU).put("of another run", ways={})
    results = Results(tmp_path / "results", CPU)
    bench.run_part("kernel", [Case("broken", broken), case("whole")], results, CPU, 0.0, float("inf"))
    assert list(stored(results)) == ["of another run", "broken", "whole"]
    assert stored(results)["broken"]["failed"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert stored(results)["whole"]["ways"]["ours"]["runs"] == 5
    assert "failed: OutOfMemoryError" in capsys.readouterr().out
    bench.renew_tables()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert "failed: OutOfMemoryError" in text and "| ours | " in text


@pytest.mark.parametrize("good_calls", [0, 2, 4])
def test_a_way_that_raises_ends_no_other(results, good_calls):
    """In its first call, while its memory is measured, and between two timed rounds."""
    calls: list[None] = []

    def fails_later() -> None:
        calls.append(None)
        if len(calls) > good_calls:
            broken()

    bench.run_part("kernel", [case("mixed", ours=fails_later, peer=lambda: torch.ones(9))], results, CPU, 0.0, 1e9)
    ways = stored(results)["mixed"]["ways"]
    assert ways["ours"]["failed"].startswith("OutOfMemoryError") and "median_ms" not in ways["ours"]
    assert ways["peer"]["runs"] == 5
    assert "OutOfMemoryError" in "\n".join(bench.lines_of(ways))


def test_cases_beyond_the_limit_are_skipped_and_named(results, capsys):
    bench.run_part("kernel", [case("late", estimate=9)], results, CPU, 0.0, time.perf_counter() + 8)
    assert not results.path.exists()
    assert "late\nskipped: less than 9 s are left" in capsys.readouterr().out


def test_a_case_is_cut_off_at_the_deadline(monkeypatch):
    """Rounds end, also before the minimum; a way that was never timed says so, and figures so far stay."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)

    def slow() -> None:
        clock.now += 10

    ways = Ways({"ours": slow, "peer": slow, "late": slow}, rounds=1)
    rows = bench.measure(ways, CPU, 0.0, deadline=15)
    assert [row.get("failed") for row in rows.values()] == [*["not run: the time limit has passed"] * 3]
    clock.now = 0.0
    rows = bench.measure(Ways({"ours": slow}, rounds=3), CPU, 0.0, deadline=25)
    assert rows["ours"]["runs"] == 2 and rows["ours"]["median_ms"] == 10_000


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_part_has_cases_with_names_of_their_own(kind, monkeypatch, capsys):
    """Naming them allocates nothing; missing peers are told in one line. On a GPU all parts end within the limit."""
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["--quick", "--match", "none"])
    assert "pip install transformers peft trl datasets liger-kernel cut-cross-entropy\n" in capsys.readouterr().out
    parts = [bench.importlib.import_module(f"{part}_cases").cases(torch.device(kind)) for part in PARTS]
    names = [case.name for cases in parts for case in cases]
    assert all(parts) and len(names) == len(set(names)) > 8
    if kind == "cuda":
        assert all(case.estimate for cases in parts for case in cases)
        assert sum(case.estimate for cases in parts for case in cases if not case.extra) <= 60 * bench.GPU_MINUTES


def test_responses_end_where_they_are_told_however_likely_the_end_is():
    """Every second token that this model draws is the end. Afterwards it draws as before."""
    config = GPTNeoConfig(2, 32, hidden_size=8, num_layers=2, num_heads=2, attention_types=((("global",), 2),))
    model = random_model(config, torch.float32, CPU)
    prompts, lengths = [[0, 1], [1], [0, 0, 1], [1, 0]], [9, 1, 12, 4]

    def write() -> list[list[int]]:
        return sampling.respond(model, prompts, max_new_tokens=12, eos_token_id=1, batch_size=3).ids

    before = write()
    with generation_cases.forced_ends(lengths):
        written = write()
    assert [len(ids) for ids in written] == lengths
    assert all(ids == [0] * (len(ids) - 1) + [1] for ids in written)
    assert write() == before != written


def test_scores_of_transformers_are_ours():
    pytest.importorskip("transformers")
    player, other, pairs, run, _ = training_cases.parts("tiny", torch.float32, CPU, 6, 20)
    training_cases.spin.score(player, pairs, run)
    ours = [logp for pair in pairs for logp in (pair.opponent_real_logp, *pair.opponent_generated_logps)]
    for micro_tokens in (10**6, 1):
        theirs = training_cases.transformers_scores(other, pairs, micro_tokens, CPU)()
        assert sorted(theirs) == pytest.approx(sorted(ours), abs=1e-3)


def test_quick_runs_every_part_and_stores_nothing(monkeypatch, capsys, tmp_path):
    pytest.importorskip("trl")
    monkeypatch.setattr(bench, "peak_bytes", lambda function, device: 0)  # The profiler takes longer than the rest.
    bench.main(["--quick", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"== {part}: " in printed for part in PARTS) and "TRL, reference in each step |" in printed
    assert "Error" not in printed and not list(tmp_path.iterdir())
