"""kernels/onednn.py: the same products and gradients as MKL's; no other call is changed."""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import spy
from torch import nn

from kernels import linear_logprobs, onednn, tiles

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
RTOL = 2e-6  # in the Frobenius norm; fp32 sums of a few hundred terms


@pytest.fixture
def calls(monkeypatch) -> list:
    """Every product that oneDNN is asked for."""
    seen = []
    spy(monkeypatch, onednn, "_product", lambda a, k: seen.append(a[0].shape))
    return seen


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual.double() - expected.double()).norm() <= RTOL * expected.double().norm()


@pytest.mark.parametrize("shape", [(1, 300), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias, wanted", [(False, ()), (False, (0,)), (True, (1,)), (True, (0, 1, 2)), (True, ())])
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
@pytest.mark.parametrize("autocast", [False, True])
def test_the_products_of_the_kernels_go_there(calls, monkeypatch, trained, autocast):
    """Tiles are strided, and summed over. Under autocast their products are in fp32, of bf16 factors."""
    monkeypatch.setattr(tiles, "CPU_ROWS", 8)
    monkeypatch.setattr(tiles, "CPU_COLUMNS", 200)
    targets = torch.arange(20)
    results = []
    for inside in (True, False):
        h, w = normal(20, 32).requires_grad_(), normal(1023, 32, seed=1).requires_grad_(trained)
        with onednn.products() if inside else torch.enable_grad(), torch.autocast("cpu", enabled=autocast):
            logp = linear_logprobs(h, w, targets)
            logp.sum().backward()
        results.append([logp.detach(), h.grad] + ([w.grad] if trained else []))
        products = 2 + trained + (trained and not autocast)  # A trained head keeps its terms in bf16 alone.
        assert len(calls) == products * 3 * 6  # There are 3 * 6 tiles.
    for a, b in zip(*results):
        assert (a - b).norm() <= (0.01 if autocast else RTOL) * b.norm()  # autocast rounds gradients to bf16


def test_other_calls_are_left_alone(calls):
    """Other dtypes, autocast and biases that oneDNN would misread never reach it; errors stay errors."""
    x, w = normal(3, 4), normal(5, 4, seed=1)
    with onednn.products():
        F.linear(x.double(), w.double())
        F.linear(x.bfloat16(), w.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, w).dtype == torch.bfloat16
        for bias in (normal(10)[::2], normal(1).expand(5), normal(1)):
            close(F.linear(x, w, bias), x @ w.T + bias)
        close(F.linear(x, w[0]), x @ w[0])
        for wrong in (lambda: F.linear(x, w.T), lambda: F.linear(x)):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
    assert not calls


def test_compiled_graphs_choose_for_themselves(calls):
    """The compiler would refuse a graph with oneDNN's operator in it."""
    layer, x = nn.Linear(4, 5), normal(3, 4)
    expected = layer(x).sum()
    with onednn.products():
        actual = torch.compile(layer, backend="eager", fullgraph=True)(x).sum()
        actual.backward()
    close(actual.detach(), expected.detach())
    assert not calls


def test_the_function_is_put_back_whatever_happens(calls, monkeypatch):
    before = F.linear
    with pytest.raises(ZeroDivisionError), onednn.products():
        with onednn.products():
            assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).eq(3).all()
        assert F.linear is not before
        raise ZeroDivisionError
    assert F.linear is before and len(calls) == 1
    monkeypatch.setattr(onednn, "available", lambda: False)
    with onednn.products():
        assert F.linear is before


def test_bounds_of_the_caches_that_the_user_sets_are_kept(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    with onednn.products():
        assert [os.environ[name] for name in onednn.CACHE_BOUNDS] == ["256", "7"]
