"""kernels/onednn.py: the same products and gradients as with MKL, and no other call is changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import linear_logprobs, onednn, tiles
from model import GPTNeo, GPTNeoConfig

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
RTOL = 2e-6  # in the Frobenius norm; fp32 sums of a few hundred terms


@pytest.fixture
def calls(monkeypatch) -> list:
    """Every product that oneDNN is asked for."""
    seen = []
    original = onednn._product
    monkeypatch.setattr(onednn, "_product", lambda *args: seen.append(args[0].shape) or original(*args))
    return seen


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual.double() - expected.double()).norm() <= RTOL * expected.double().norm()


@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (2, 3, 5), (0, 5), (2, 1, 300)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1, 2)])
def test_linear_and_its_gradients(calls, shape, bias, wanted):
    def leaves():
        tensors = [normal(*shape), normal(11, shape[-1], seed=1), normal(11, seed=2) if bias else None]
        return [t if t is None else t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]

    ours, theirs = leaves(), leaves()
    with onednn.products():
        actual = F.linear(*ours)
        upstream = normal(*actual.shape, seed=3)
        if actual.requires_grad:
            (actual * upstream).sum().backward()
    assert calls
    expected = F.linear(*theirs)
    close(actual, expected)
    if expected.requires_grad:
        (expected * upstream).sum().backward()
    for a, b in zip(ours, theirs):
        if b is not None and b.requires_grad:
            close(a.grad, b.grad)


@pytest.mark.parametrize("trained", [False, True])
def test_the_kernels_products_go_there(calls, monkeypatch, trained):
    """Strided tiles, results written into buffers, and sums over tiles."""
    monkeypatch.setattr(tiles, "CPU_ROWS", 8)
    monkeypatch.setattr(tiles, "CPU_COLUMNS", 200)
    hidden, weight, targets = normal(20, 32), normal(1023, 32, seed=1), torch.arange(20)
    results = []
    for inside in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        with onednn.products() if inside else torch.enable_grad():
            logp = linear_logprobs(h, w, targets)
            logp.sum().backward()
        results.append([logp.detach(), h.grad] + ([w.grad] if trained else []))
        assert len(calls) == (72 if trained else 36)  # 3 x 6 tiles, two products each, or four
    for a, b in zip(*results):
        close(a, b)


def test_the_kernels_products_go_there_under_autocast_too(calls):
    """They are fp32 products of bf16 factors, which autocast must not stop."""
    hidden, weight, targets = normal(20, 32).requires_grad_(), normal(97, 32, seed=1), torch.arange(20)
    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    with onednn.products(), torch.autocast("cpu", torch.bfloat16):
        actual = linear_logprobs(hidden, weight, targets)
    assert len(calls) == 2
    close(actual.detach(), expected.detach())


def test_a_model_within(calls):
    config = GPTNeoConfig(
        vocab_size=97, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
        attention_types=((("global", "local"), 1),),
    )  # fmt: skip
    model = GPTNeo(config).init_weights(torch.Generator().manual_seed(0))
    ids = torch.arange(40)[None]
    expected = model.logits(model(ids))
    with onednn.products():
        actual = model.logits(model(ids))
    assert len(calls) == 13  # six in a block, and the head
    close(actual, expected)


def test_other_calls_are_left_alone(calls):
    with onednn.products():
        F.linear(normal(3, 5).double(), normal(4, 5).double())
        F.linear(normal(3, 5).bfloat16(), normal(4, 5).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(normal(3, 5), normal(4, 5)).dtype == torch.bfloat16
        normal(3, 5) @ normal(5, 4)
        torch.addmm(normal(4), normal(3, 5), normal(5, 4), beta=2)
    nn.Linear(5, 4)(normal(3, 5))
    assert not calls


def test_unusual_calls_behave_as_without(calls):
    """A bias with gaps (oneDNN would read foreign memory) or of one number, results to be resized, errors."""
    x, w = normal(3, 4), normal(5, 4, seed=1)
    with onednn.products():
        for bias in (normal(10)[::2], normal(1).expand(5), normal(1)):
            close(F.linear(x, w, bias), x @ w.T + bias)
        close(F.linear(x, w[0]), x @ w[0])
        close(torch.mm(x, w.T, out=torch.empty(0)), x @ w.T)
        for wrong in (
            lambda: torch.mm(x, w),
            lambda: torch.mm(x[None], w.T),
            lambda: F.linear(x, w.T),
            lambda: torch.mm(x),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
    assert not calls


def test_compiled_graphs_choose_for_themselves(calls):
    """--compile on a CPU: a graph with oneDNN's operator in it would be refused by the compiler."""
    layer, x = nn.Linear(4, 5), normal(3, 4)
    expected = layer(x).sum()
    with onednn.products():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = compiled(x).sum()
        actual.backward()
    close(actual.detach(), expected.detach())
    assert not calls


def test_functions_are_put_back_whatever_happens():
    before = F.linear, torch.mm, torch.addmm
    with pytest.raises(ZeroDivisionError), onednn.products():
        assert before != (F.linear, torch.mm, torch.addmm)
        raise ZeroDivisionError
    assert before == (F.linear, torch.mm, torch.addmm)


def test_products_into_buffers_and_sums(calls):
    """Strided results, and addmm into its own first argument; a vector is added to every row."""
    a, b, room = normal(6, 5), normal(5, 4, seed=1), torch.zeros(6, 9)
    with onednn.products():
        close(torch.mm(a, b), a @ b)
        torch.mm(a, b, out=room[:, :4])
        torch.addmm(room[:, :4], a, b, out=room[:, :4])
        close(torch.addmm(normal(4), a, b), normal(4) + a @ b)
    assert len(calls) == 4
    close(room[:, :4], 2 * (a @ b))
    assert not room[:, 4:].any()


GROW = """
import os, sys, torch
import torch.nn.functional as F
from kernels import onednn

def resident():  # MB
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

torch.set_num_threads(1)
weight = torch.ones(256, 64)
with onednn.products():
    before = resident()
    for rows in range(1, 501):
        F.linear(torch.ones(rows, 64), weight)
    print(resident() - before, *(os.environ[name] for name in onednn.CACHE_BOUNDS))
"""


def test_memory_does_not_grow_with_the_number_of_shapes():
    """By some 100 MB where the caches have the 1024 entries that they have otherwise; what a user sets is kept."""

    def grown(**environment):
        inherited = {name: value for name, value in os.environ.items() if name not in onednn.CACHE_BOUNDS}
        command, root = [sys.executable, "-c", GROW], Path(__file__).resolve().parents[1]
        result = subprocess.run(command, cwd=root, env=inherited | environment, capture_output=True, check=True)
        return result.stdout.split()

    bounded, unbounded = grown(), grown(**dict.fromkeys(onednn.CACHE_BOUNDS, "1024"))
    assert unbounded[1:] == [b"1024", b"1024"]
    assert float(bounded[0]) < 0.6 * float(unbounded[0])


def test_contexts_nest_and_decorate(calls):
    plain = F.linear
    with onednn.products():
        patched = F.linear
        with onednn.products():
            assert F.linear is patched
        assert F.linear is patched
        onednn.products()(lambda: F.linear(normal(3, 5), normal(4, 5)))()
    assert F.linear is plain and len(calls) == 1
    onednn.products()(lambda: F.linear(normal(3, 5), normal(4, 5)))()
    assert F.linear is plain and len(calls) == 2


def test_without_onednn_it_does_nothing(calls, monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda: False)
    with onednn.products():
        F.linear(normal(3, 5), normal(4, 5))
    assert not calls


def test_the_file_alone_imports_and_runs_elsewhere(tmp_path):
    (tmp_path / "onednn.py").write_text(Path(onednn.__file__).read_text())
    program = (
        "import sys, torch, onednn\n"
        "assert not {'spin', 'model', 'lora', 'kernels'} & set(sys.modules)\n"
        "with onednn.products():\n"
        "    assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).eq(3).all()\n"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
