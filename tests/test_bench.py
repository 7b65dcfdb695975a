"""benchmarks/: an error or a time limit costs no case its figures, results are written at once."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
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


def broken(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def case(name: str, peers: dict | None = None, ours: Callable = lambda: torch.ones(1000)) -> Case:
    return Case(name, lambda device: Ways({"ours": ours}, peers or {}, (2, "pairs")))


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path / "results", CPU)


def stored(results: Results) -> dict[str, dict]:
    return json.loads(results.path.read_text())["cases"]


def test_a_case_that_cannot_be_built_ends_no_other(tmp_path, capsys):
    """The failure of the case is printed, stored, and in the tables, beside the stored cases of other runs."""
    Results(tmp_path, CPU).put("of another run", {"failed": "why"})
    results = Results(tmp_path, CPU)
    bench.run_part("kernel", [Case("broken", broken), case("whole")], results, CPU, 0.0, float("inf"))
    assert list(stored(results)) == ["of another run", "broken", "whole"]
    assert stored(results)["broken"]["failed"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert stored(results)["whole"]["ways"]["ours"]["runs"] == 5
    for text in (capsys.readouterr().out, results.path.with_suffix(".md").read_text()):
        assert "\nfailed: OutOfMemoryError: CUDA out of memory.\n" in text and "\n| ours | " in text


@pytest.mark.parametrize("good_calls", [0, 1, 3])
def test_a_way_that_raises_ends_no_other(results, good_calls):
    """A way raises while its memory is measured, in its first timed call or between two rounds; a peer has no wheel."""
    calls: list[None] = []

    def fails_later() -> None:
        calls.append(None)
        if len(calls) > good_calls:
            broken()

    peers = {"missing": lambda: bench.importlib.import_module("no_such_peer"), "peer": lambda: lambda: torch.ones(9)}
    bench.run_part("kernel", [case("mixed", peers, ours=fails_later)], results, CPU, 0.0, 1e9)
    ways = stored(results)["mixed"]["ways"]
    assert ways["ours"]["failed"].startswith("OutOfMemoryError") and "median_ms" not in ways["ours"]
    assert ways["missing"] == {"failed": "ModuleNotFoundError: No module named 'no_such_peer'"}
    assert ways["peer"]["runs"] == 5
    assert "OutOfMemoryError" in "\n".join(bench.lines_of({"ways": ways}))


def test_times_have_a_median_and_both_percentiles():
    assert bench.figures([30.0, 10.0, 20.0], (2, "pairs")) == {
        "median_ms": 20, "p20_ms": 10, "p80_ms": 30, "runs": 3, "rate": 100, "unit": "pairs/s",
    }  # fmt: skip
    ten = bench.figures([float(i) for i in range(11)], None)
    assert (ten["p20_ms"], ten["median_ms"], ten["p80_ms"]) == (2, 5, 8)


def test_cases_beyond_the_limit_are_skipped_and_named(results, capsys):
    bench.run_part("kernel", [replace(case("late"), estimate=9)], results, CPU, 0.0, time.perf_counter() + 8)
    assert not results.path.exists()
    assert "late\nskipped: less than 9 s are left" in capsys.readouterr().out


def test_a_case_is_cut_off_at_the_deadline(monkeypatch):
    """Rounds end, also before the minimum; a way that was never timed says so, and figures so far stay."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)

    def slow() -> None:
        clock.now += 10

    rows = bench.measure(Ways({"ours": slow, "peer": slow}), CPU, 0.0, deadline=15)
    assert [row.get("failed") for row in rows.values()] == ["TimeoutError: no time was left"] * 2
    clock.now = 0.0
    rows = bench.measure(Ways({"ours": slow}, rounds=3), CPU, 0.0, deadline=25)
    assert rows["ours"]["runs"] == 2 and rows["ours"]["median_ms"] == 10_000


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_part_has_cases_with_names_of_their_own(kind):
    """On a GPU all parts end within the limit."""
    cases = [case for part in PARTS for case in bench.importlib.import_module(f"{part}_cases").CASES[kind]]
    assert len({case.name for case in cases}) == len(cases) > 8
    if kind == "cuda":
        assert all(case.estimate for case in cases)
        assert sum(case.estimate for case in cases if not case.extra) <= 60 * bench.GPU_MINUTES


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


def test_a_llama_generates_in_transformers_with_a_static_cache():
    pytest.importorskip("transformers")
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = replace(
        generation_cases.CONFIGS["SmolLM2"], **sizes, num_key_value_heads=1, bos_token_id=8, eos_token_id=8
    )
    other = generation_cases.in_transformers(random_model(config, torch.float32, CPU))
    generation_cases.theirs(other, [[1, 2], [3]], [1, 2], 2, 3, 8, cache_implementation="static")()


def test_scores_of_transformers_are_ours():
    pytest.importorskip("transformers")
    player, run, pairs, peer = training_cases.parts("tiny", torch.float32, CPU, 6, 20)
    training_cases.spin.score(player, pairs, run)
    ours = [logp for pair in pairs for logp in (pair.opponent_real_logp, *pair.opponent_generated_logps)]
    for micro_tokens in (10**6, 1):
        theirs = training_cases.transformers_scores(peer(), pairs, micro_tokens)()
        assert sorted(theirs) == pytest.approx(sorted(ours), abs=1e-3)


def test_quick_runs_every_part_and_stores_nothing(monkeypatch, capsys, tmp_path):
    pytest.importorskip("trl")
    monkeypatch.setattr(bench, "peak_bytes", lambda function, device: 0)  # The profiler takes longer than the rest.
    bench.main(["--quick", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"== {part}: " in printed for part in PARTS) and "TRL, reference in each step |" in printed
    assert "Error" not in printed and not list(tmp_path.iterdir())
