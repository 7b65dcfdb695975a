"""benchmarks/: an error or a time limit costs no case its figures, results are written at once."""

import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import bench
import pytest
import torch
from bench import PARTS, Case, Results, Ways

CPU = torch.device("cpu")


def broken() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def case(name: str, estimate: float = 0.0, **calls: Callable) -> Case:
    calls = calls or {"ours": lambda: torch.ones(1000)}
    return Case(name, lambda: Ways(calls, rates={"ours": (2, "pairs")}), estimate=estimate)


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path, CPU)


def stored(results: Results) -> dict[str, dict]:
    return json.loads(results.path.read_text())["cases"]


def test_a_case_that_cannot_be_built_ends_no_other(results, capsys):
    bench.run_part("kernel", [Case("broken", broken), case("whole")], results, CPU, 0.0, float("inf"))
    assert stored(results)["broken"]["failed"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert stored(results)["whole"]["ways"]["ours"]["runs"] == 5
    assert "failed: OutOfMemoryError" in capsys.readouterr().out


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


def test_results_are_written_after_each_case_and_keep_those_of_others(results):
    results.put("of another run", ways={})
    seen = []
    planned = [
        case("first"),
        Case("second", lambda: (seen.append(list(stored(results))), Ways({"ours": torch.get_num_threads}))[1]),
    ]
    bench.run_part("training", planned, Results(results.path.parent, CPU), CPU, 0.0, float("inf"))
    assert seen == [["of another run", "first"]]
    assert list(stored(results)) == ["of another run", "first", "second"]
    assert [path.name for path in results.path.parent.iterdir()] == [results.path.name]


def test_a_run_that_is_killed_keeps_the_ways_measured_so_far(results):
    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run_part("kernel", [case("cut", ours=lambda: torch.ones(9), peer=killed)], results, CPU, 0.0, 1e9)
    assert stored(results)["cut"]["ways"]["ours"]["peak_mib"] > 0


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


def test_a_dead_gpu_ends_the_process(monkeypatch, results):
    monkeypatch.setattr(bench, "alive", lambda device: False)
    with pytest.raises(SystemExit, match="unusable to this process"):
        bench.run_part("kernel", [case("first"), case("second")], results, CPU, 0.0, float("inf"))
    assert list(stored(results)) == ["first"]


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench.subprocess, "run", missing)
    assert bench.current_commit() == "unknown"


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
        assert sum(case.estimate for cases in parts for case in cases) <= 60 * bench.GPU_MINUTES


def test_quick_runs_every_part_and_stores_nothing(capsys, tmp_path):
    pytest.importorskip("trl")
    bench.main(["--quick", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"== {part}: " in printed for part in PARTS) and "TRL, reference in each step |" in printed
    assert "Error" not in printed and not list(tmp_path.iterdir())


def test_tables_of_results_with_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text("head\n<!-- results -->\nold\n<!-- end of results -->\ntail\n")
    results = Results(tmp_path / "results", CPU)
    bench.run_part("kernel", [Case("broken", broken), case("whole")], results, CPU, 0.0, float("inf"))
    bench.renew_tables()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert "failed: OutOfMemoryError" in text and "| ours | " in text
