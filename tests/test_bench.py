"""benchmarks/: an error or a time limit costs no case its figures, results are written at once; memory; no spills."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import bench
import memory
import pytest
import torch
import torch.nn.functional as F
from bench import PARTS, Case, Results, Ways

from model import GPTNeoConfig

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
    planned = [Case("broken", broken), case("whole")]
    assert bench.run_part("kernel", planned, results, CPU, 0.0, float("inf")) is None
    assert stored(results)["broken"]["failed"] == "failed: OutOfMemoryError: CUDA out of memory."
    assert stored(results)["whole"]["ways"]["ours"]["runs"] == 5
    assert "failed: OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.parametrize("good_calls", [0, 2, 4])
def test_a_way_that_raises_ends_no_other(results, good_calls):
    """In its first call, while its memory is measured, and between two timed rounds."""
    calls = []

    def fails_later() -> None:
        calls.append(None)
        if len(calls) > good_calls:
            broken()

    bench.run_part("kernel", [case("mixed", ours=fails_later, peer=torch.empty)], results, CPU, 0.0, float("inf"))
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
    bench.run_part("kernel", [case("late")], results, CPU, 0.0, 0.0)
    assert not results.path.exists()
    assert "1 cases skipped at the limit of 0.0 min:\nlate" in capsys.readouterr().out


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


def test_a_dead_gpu_ends_the_process_and_the_rest_resumes_in_another(monkeypatch, results):
    monkeypatch.setattr(bench, "alive", lambda device: False)
    assert bench.run_part("kernel", [case("first"), case("second")], results, CPU, 0.0, float("inf")) == 1
    assert list(stored(results)) == ["first"]
    commands = []
    planned = SimpleNamespace(cases=lambda device: [case("first"), case("second")])
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: planned)

    def restart(path: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(bench.os, "execv", restart)
    with pytest.raises(SystemExit):
        bench.main(
            [
                "kernel",
                "training",
                "--results",
                str(results.path.parent),
                "--skip",
                "1",
                "--minutes",
                "5",
                "--seconds",
                "0",
            ]
        )
    assert commands[0][2:4] == ["kernel", "training"]
    given = {
        option: float(commands[0][commands[0].index(option) + 1]) for option in ("--skip", "--minutes", "--seconds")
    }
    assert given == {"--skip": 2, "--minutes": 5, "--seconds": 0}
    assert float(commands[0][commands[0].index("--spent") + 1]) >= 0, "as long as this machine took"


def test_without_git_the_commit_is_unknown(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench.subprocess, "run", missing)
    assert bench.current_commit() == "unknown"


def test_missing_peers_are_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.main(["kernel", "--device", "cuda", "--list"])
    assert "pip install trl liger-kernel cut-cross-entropy\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_part_has_cases_with_names_of_their_own(kind):
    """Naming them allocates nothing. On a GPU each part ends within the limit, by its estimates."""
    names = []
    for part in PARTS:
        cases = bench.importlib.import_module(f"{part}_cases").cases(torch.device(kind))
        names += [case.name for case in cases]
        if kind == "cuda":
            assert 0 < sum(case.estimate for case in cases) <= 60 * bench.GPU_MINUTES
    assert len(names) == len(set(names)) > 8


def test_tables_of_results_with_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text("head\n<!-- results -->\nold\n<!-- end of results -->\ntail\n")
    results = Results(tmp_path / "results", CPU)
    bench.run_part("kernel", [Case("broken", broken), case("whole")], results, CPU, 0.0, float("inf"))
    bench.renew_tables()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert "failed: OutOfMemoryError" in text and "| ours | " in text


# ---- memory ----


def test_the_account_follows_storages_from_creation_to_end():
    """A perceptron, by hand: the two inputs of gelu and of the second layer, and the result; then gradients only."""
    x, first, second = torch.randn(5, 8), torch.randn(16, 8, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    with memory.Account() as account:
        y = F.linear(F.gelu(F.linear(x, first)), second)
        assert account.live == account.peak == 4 * (5 * 16 + 5 * 16 + 5 * 8)
        y.detach()[0].zero_()  # views and operations in place create no storage
        assert account.live == account.peak == 800
        y = None
        assert account.live == 0
        F.linear(F.gelu(F.linear(x, first)), second).sum().backward()
        assert account.live == 4 * (first.numel() + second.numel()) < account.peak


@pytest.mark.parametrize("rank", [0, 2])
def test_memory_of_a_step_is_that_of_hand_arithmetic(rank):
    """Weights, gradients and state are those of runtime/plan.py; what a block adds to a forward pass, byte by byte.

    Counted for D hidden numbers, H heads, n tokens in rows of T. fp32: the norms' inputs with mean and deviation, and
    sums of attention. bf16: the linear layers' inputs, q, k, v, the input of gelu, and attention's mask as numbers.
    """
    pairs, T, D, H = 3, 32, 24, 3
    n, r = pairs * T, rank

    def step(layers: int, checkpoint: bool) -> memory.Step:
        config = GPTNeoConfig(
            vocab_size=50, max_position_embeddings=64, hidden_size=D, num_layers=layers, num_heads=H,
            attention_types=((("global", "local"), layers // 2),), window_size=8,
        )  # fmt: skip
        found = memory.dry_run(config, rank, pairs, checkpoint, T)
        assert found.planned == found.held <= found.peak - found.saved * (not checkpoint)
        return found

    norms, inputs, attention, gelu = 2 * n * (4 * D + 8), 2 * n * 9 * D, 2 * n * (3 * D + T) + 4 * n * H, 2 * n * 4 * D
    if rank:  # in bf16: adapters and what is between their factors; norms' frozen weights are cast to fp32
        weights, cast_once = 2 * r * 18 * D + 6 * 2 * n * r + 4 * 4 * D, 2 * r * 4 * D
    else:
        weights = cast_once = 2 * (12 * D * D + 6 * D)  # and biases
    few, many = step(2, False), step(6, False)
    assert many.saved - few.saved == 4 * (norms + inputs + attention + gelu + weights)
    few, many = step(2, True), step(6, True)
    assert many.saved - few.saved == 4 * ((2 if rank else 4) * n * D + cast_once)


# ---- compiled kernels ----


def test_kernels_do_not_spill_on_hopper_and_load_16_bytes_at_once():
    """Every variant that 8192 rows at D = 2560, V = 50257 in bf16 launch, and attention for all head sizes."""
    pytest.importorskip("triton.compiler")
    import compile_kernels

    variants = compile_kernels.default_variants(90)
    assert {variant.kernel for variant in variants} == {
        "_logprobs_kernel", "_gradient_kernel", "_hidden_gradient_kernel", "_decode_kernel"
    }  # fmt: skip
    try:
        codes = {str(variant): compile_kernels.compiled(variant, 90) for variant in variants}
    except OSError as error:
        pytest.skip(f"no tools of triton: {error}")
    for name, code in codes.items():
        assert (code.spills, code.stack) == (0, 0), name
        assert max(code.loads) == 128, name
