"""Tests of kernels/: values and gradients against float64, and every promise the docstrings make.

The same tests run on three backends: torch on the CPU; the Triton kernels on CUDA if there is a GPU; and the Triton
kernels on the CPU, in a second process with TRITON_INTERPRET=1, which must be set before triton is imported.

Tolerances. Values: fp32 arithmetic on logits below 20 is off by a few times 20 * 2^-24 nats per step; 4.6e-6 was the
largest error ever seen, the limit is 2e-5. Gradients: fp32 rounds to 2^-24 but sums cancel, so 2e-5 relative; 16-bit
results are rounded once or twice to 2^-9 (bfloat16) or 2^-12 (float16), and the interpreter truncates instead, which
doubles the error.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import linear_logprobs, logprobs, tiles, token_logprobs, torch_rows

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]
IGNORED = -100
D = 16
VALUE_ATOL = 2e-5
GRAD_RTOL = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
trained_or_not = pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of three rows and a third of the columns, the last one smaller.

    On a CPU new memory holds nan, as it may: no result can come from what was never written.
    """
    monkeypatch.setattr(tiles, "tile_shape", lambda device, N, V, bytes_per_logit: (3, V // 3 + 1))
    monkeypatch.setattr(logprobs, "scratch_rows", lambda V: 3)
    torch.use_deterministic_algorithms(device == "cpu")
    assert device != "cpu" or torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def uses_triton(device: str) -> bool:
    return device == "cuda" or INTERPRETED


def normal(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def some_targets(N: int, V: int, device: str, ignored: bool = True) -> Tensor:
    """Random targets, every fourth of them ignored."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    if ignored:
        targets[1::4] = IGNORED
    return targets.to(device)


def reference(logits: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """(N,) log-probabilities, computed as in a textbook, in the dtype of the logits."""
    ignored = targets == ignore_index
    picked = logits.log_softmax(-1).gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return picked.masked_fill(ignored, 0.0)


def gradients(logp: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((logp * upstream).sum(), inputs)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def leaf64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def head(V: int, device: str, trained: bool) -> Tensor:
    return normal(V, D, device=device, seed=4).requires_grad_(trained)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_norm_close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Compares in the Frobenius norm, because single elements may cancel, and absolutely if all of them do."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1.0)
    assert error <= rtol


def check_token(logits: Tensor, targets: Tensor, upstream: Tensor, ignore_index: int = IGNORED) -> None:
    """Compares value and gradient of token_logprobs with float64; logits must require grad."""
    exact = leaf64(logits)
    expected = reference(exact, targets, ignore_index)
    actual = token_logprobs(logits, targets, ignore_index)
    assert actual.dtype == torch.float32 and actual.shape == targets.shape
    assert_close(actual, expected, rtol=0.0, atol=VALUE_ATOL)
    (grad,) = gradients(actual, upstream, logits)
    (expected_grad,) = gradients(expected, upstream, exact)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    # Element by element, so that tiny probabilities count; the target's 1 - p is exact to fp32's 2^-24 only.
    assert_close(grad, expected_grad, rtol=GRAD_RTOL[logits.dtype], atol=1e-6)


def check_linear(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> None:
    """Compares linear_logprobs with float64: a frozen weight, and a trained one whose terms are computed again or, in
    bfloat16, kept. Both inputs must require grad."""
    rtol = GRAD_RTOL[hidden.dtype]
    exact = leaf64(hidden), leaf64(weight)
    expected = reference(exact[0] @ exact[1].T, targets)
    expected_grads = gradients(expected, upstream, *exact)
    kept = linear_logprobs(hidden, weight, targets)
    assert (len(kept.grad_fn.saved_tensors) > 6) == (hidden.dtype == torch.bfloat16 and len(hidden) > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "KEPT_BYTES", -1)
        trained = linear_logprobs(hidden, weight, targets)
    frozen = linear_logprobs(hidden, weight.detach(), targets)
    unwanted = linear_logprobs(hidden.detach(), weight.detach(), targets)
    for actual in (kept, trained, frozen, unwanted):
        assert actual.dtype == torch.float32 and actual.shape == targets.shape
        assert_close(actual, expected, rtol=0.0, atol=VALUE_ATOL)
    (frozen_grad,) = gradients(frozen, upstream, hidden)
    for some in (kept, trained):
        grads = gradients(some, upstream, hidden, weight)
        assert [g.dtype for g in (*grads, frozen_grad)] == [hidden.dtype] * 3
        for actual, expected in (*zip(grads, expected_grads), (frozen_grad, grads[0])):
            assert_norm_close(actual, expected, rtol)


# ---- values and gradients ----


@dtypes
@pytest.mark.parametrize(
    "N, V", [(0, 17), (1, 1), (5, 2), (5, 17), (1, 1023), (3, 1025), (3, 4096), (3, 4097), (5, 50257)]
)
def test_both_functions_match_float64(device: str, dtype: torch.dtype, N: int, V: int) -> None:
    """Among the vocabularies are those around the sizes of the kernels' blocks, whose last token is a target."""
    if V > 10**4 and INTERPRETED:
        pytest.skip("The interpreter takes long; the next test has several blocks.")
    targets, upstream = some_targets(N, V, device), normal(N, device=device, seed=2)
    targets[2:3] = V - 1
    check_token((2 * normal(N, V)).to(device, dtype).requires_grad_(), targets, upstream)
    hidden, weight = normal(N, D, seed=3), 0.5 * normal(V, D, seed=4)
    check_linear(*(tensor.to(device, dtype).requires_grad_() for tensor in (hidden, weight)), targets, upstream)


@pytest.mark.parametrize("dtype", GRAD_RTOL)
def test_many_tiles(device: str, dtype: torch.dtype, small_tiles: None) -> None:
    C = 1023 // 3 + 1
    targets, upstream = torch.tensor([C - 1, IGNORED, C, 2 * C, 1022], device=device), normal(5, device=device)
    check_token(leaf(normal(5, 1023, device=device, dtype=dtype)), targets, upstream)
    hidden, weight = normal(5, D, seed=3), normal(1023, D, seed=4)
    largest = (hidden @ weight.T).argmax(1) // C
    assert {0, 1, 2} <= set(largest.tolist()), "the shift must rise in some rows, after the first and the second tile"
    check_linear(*(leaf(tensor.to(device, dtype)) for tensor in (hidden, weight)), targets, upstream)


@pytest.mark.parametrize("columns", [7, 2, 1])
def test_large_logits(device: str, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Tiles have large logits, too: one raises the shift by thousands, one raises it a little, one is far below it."""
    monkeypatch.setattr(tiles, "tile_shape", lambda device, N, V, bytes_per_logit: (3, columns))
    near, far = 10000.0, -10000.0
    rows = [[near, near, near - 1, far, far, far, far]] * 3 + [[far, far - 2, far, far, near, near - 9, near + 2]]
    logits = torch.tensor(rows, device=device)
    targets, upstream = torch.tensor([0, 2, 3, 5], device=device), normal(4, device=device)
    exact = leaf64(logits)
    expected = reference(exact, targets)
    (expected_grad,) = gradients(expected, upstream, exact)
    logits.requires_grad_()
    identity = torch.eye(7, device=device)  # Rows times the identity are exactly the same logits, from a product.
    for some_head in (identity, leaf(identity)):
        for actual in (token_logprobs(logits, targets), linear_logprobs(logits, some_head, targets)):
            assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            assert_close(gradients(actual, upstream, logits)[0], expected_grad, rtol=1e-5, atol=1e-6)


def test_infinite_logits(device: str) -> None:
    """-inf takes a token out of the vocabulary; if it is the target, its probability is 0. The least fp32 number, a
    common mask, acts alike or, if it covers a whole row, as equal logits do."""
    inf, least = float("inf"), torch.finfo(torch.float32).min
    rows = [[1.0, -inf, 2.0], [-inf, -inf, 0.5], [least, 0.0, least], [least] * 3, [1.0, -inf, 2.0]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    targets = torch.tensor([0, 2, 1, 0, 1], device=device)
    logp = token_logprobs(logits, targets)
    assert_close(logp, reference(logits.detach().double(), targets), rtol=0.0, atol=VALUE_ATOL)
    assert logp[4] == -inf
    (grad,) = gradients(logp[:4], torch.ones(4, device=device), logits)
    expected = torch.eye(3, device=device)[targets] - logits.detach().softmax(1)
    assert_close(grad[:4], expected[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [range(6), range(6, 12), range(12, 17)])
def test_a_tile_of_infinite_logits(device: str, columns: range, small_tiles: None) -> None:
    """A whole tile may have no token, even the first or the last one: exp(-inf - -inf) would be nan."""
    weight = normal(17, D, device=device)
    weight[list(columns)] = -float("inf")
    hidden, targets = normal(4, D, device=device).abs(), torch.tensor([0, 4, 12, 16], device=device)
    expected = reference(hidden.double() @ weight.double().T, targets)
    assert_close(linear_logprobs(hidden, weight, targets), expected, rtol=0.0, atol=VALUE_ATOL)


def test_gradient_of_a_confident_target_is_minus_expm1(device: str) -> None:
    """1 - p, computed as a difference, would carry the rounding error of p."""
    logits = torch.zeros(20, 2, device=device)
    logits[:, 0] = torch.linspace(-2, 17.0, 20)
    logp = token_logprobs(logits.requires_grad_(), torch.zeros(20, dtype=torch.int64, device=device))
    (grad,) = gradients(logp, torch.ones(20, device=device), logits)
    assert_close(grad[:, 0], -torch.expm1(logp.detach().double()), rtol=1e-6, atol=0.0)


def test_row_offsets_beyond_32_bits(device: str) -> None:
    """Row 5 starts 2.7e9 elements in. The 5 GiB are virtual: only the pages of six short rows are touched."""
    stride, V = 2**29 + 1, 50
    try:
        storage = torch.empty(5 * stride + V, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no room: {error}")
    rows = storage.as_strided((6, V), (stride, 1))
    rows.copy_(normal(6, V))
    targets = some_targets(6, V, device)
    assert_close(token_logprobs(rows, targets), reference(rows.double(), targets), rtol=0.0, atol=VALUE_ATOL)


# ---- layouts ----


def layouts(matrix: Tensor) -> dict[str, Tensor]:
    """The same matrix, or its first row throughout, in memory layouts that a caller may bring."""
    rows, columns = matrix.shape
    return {
        "transposed": matrix.t().contiguous().t(),
        "every other column": matrix.repeat_interleave(2, 1)[:, ::2],
        "padded rows": torch.nn.functional.pad(matrix, (0, 7))[:, :columns],
        "shifted": torch.nn.functional.pad(matrix, (1, 0))[:, 1:],
        "one row for all": matrix[:1].expand(rows, columns),
        "a higher dimension's slice": matrix.unsqueeze(1).repeat(1, 3, 1)[:, 1],
    }


@pytest.mark.parametrize("name", layouts(torch.zeros(2, 2)))
def test_strided_inputs(device: str, name: str, small_tiles: None) -> None:
    N, V = 4, 33
    targets = some_targets(2 * N, V, device)[::2]
    upstream = normal(N, 2, device=device)[:, 1]
    check_token(layouts(normal(N, V, device=device))[name].requires_grad_(), targets, upstream)
    hidden, weight = (layouts(normal(n, D, device=device))[name].requires_grad_() for n in (N, V))
    check_linear(hidden, weight, targets, upstream)
    assert not (targets.is_contiguous() or upstream.is_contiguous() or hidden.is_contiguous())


def test_any_integer_targets(device: str) -> None:
    logits, targets = normal(5, 17, device=device), some_targets(5, 17, device, ignored=False)
    expected = token_logprobs(logits, targets)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(token_logprobs(logits, targets.to(kind)), expected)


# ---- ignored rows ----


@pytest.mark.parametrize("all_ignored", [False, True])
def test_ignored_rows_are_zero_whatever_they_hold_and_whatever_comes_from_above(
    device: str, all_ignored: bool, small_tiles: None
) -> None:
    """The gradient from above is nan in a mean over the tokens of a sequence that are all ignored: 0 / 0."""
    some = torch.tensor([IGNORED, IGNORED, 3, IGNORED, 4], device=device)
    targets = torch.full_like(some, IGNORED) if all_ignored else some
    ignored = targets == IGNORED
    bad = torch.tensor([float("nan"), float("inf"), 0.0, -float("inf"), 0.0], device=device)

    def results(fill: Tensor) -> list[Tensor]:
        """Values and gradients of all functions, if `fill`, (5,), is added to all numbers of its rows."""
        upstream = normal(5, device=device) + fill
        sound, weight = leaf(normal(5, D, device=device)), leaf(normal(17, D, device=device))
        logits, hidden = (leaf(rows + fill.unsqueeze(1)) for rows in (normal(5, 17, device=device), sound))
        found = []
        for logp, inputs in (
            (token_logprobs(logits, targets), [logits]),
            (linear_logprobs(hidden, weight.detach(), targets), [hidden]),
            (linear_logprobs(sound, weight, targets), [sound, weight]),  # The weight's gradient sums over hidden rows.
            (linear_logprobs(sound.bfloat16(), weight.bfloat16(), targets), [sound, weight]),
        ):
            found += [logp, *torch.autograd.grad(logp, inputs, upstream)]
        return found

    for actual, expected in zip(results(bad), results(torch.zeros_like(bad)), strict=True):
        assert actual.isfinite().all()
        assert_norm_close(actual, expected, GRAD_RTOL[torch.float32])
        assert len(actual) == 17 or (actual[ignored].eq(0).all() and actual[~ignored].ne(0).all())


@pytest.mark.parametrize("ignore_index", [-1, 1, 2**40])
def test_ignore_index_may_be_any_number(device: str, ignore_index: int) -> None:
    targets, upstream = torch.tensor([0, ignore_index, 1, 3, 2], device=device), normal(5, device=device)
    check_token(leaf(normal(5, 4, device=device)), targets, upstream, ignore_index)
    hidden, weight = leaf(normal(5, D, device=device)), normal(4, D, device=device)
    expected = token_logprobs(hidden @ weight.T, targets, ignore_index)
    (expected_grad,) = gradients(expected, upstream, hidden)
    for some_head in (weight, leaf(weight)):
        actual = linear_logprobs(hidden, some_head, targets, ignore_index)
        assert_close(actual, expected, rtol=0.0, atol=VALUE_ATOL)
        assert_norm_close(gradients(actual, upstream, hidden)[0], expected_grad, GRAD_RTOL[torch.float32])


# ---- what autograd saves and returns ----


def saved_by(call) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = call()
    return result, saved


def test_without_gradient_nothing_is_saved(device: str) -> None:
    targets = some_targets(5, 17, device)
    inputs = [leaf(normal(*shape, device=device)) for shape in ((5, 17), (5, D), (17, D))]
    for grad_mode, tensors in ((torch.no_grad, inputs), (torch.enable_grad, [t.detach() for t in inputs])):
        for function, some in ((token_logprobs, tensors[:1]), (linear_logprobs, tensors[1:])):
            with grad_mode():
                result, saved = saved_by(partial(function, *some, targets))
            assert not saved and not result.requires_grad


def test_a_frozen_head_saves_one_row_of_hidden_width_per_token(device: str) -> None:
    hidden, weight = (normal(n, D, device=device, dtype=torch.bfloat16) for n in (5, 1023))
    _, saved = saved_by(lambda: linear_logprobs(leaf(hidden), weight, some_targets(5, 1023, device)))
    assert [(t.shape, t.dtype) for t in saved] == [(hidden.shape, torch.float32), (hidden.shape[:1], torch.bool)]
    _, saved = saved_by(lambda: linear_logprobs(leaf(hidden), leaf(weight), some_targets(5, 1023, device)))
    assert max(t.numel() for t in saved) == weight.numel()  # the weight itself, not logits


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "forward", "both"),
    [(False, False, 1, 1), (True, False, 2, 2), (False, True, 1, 3), (True, True, 1, 4)],
)
def test_number_of_matrix_products(
    device: str, monkeypatch: pytest.MonkeyPatch, hidden_grad: bool, weight_grad: bool, forward: int, both: int
) -> None:
    """One product is made if no gradient is wanted, two for a frozen head, including the backward pass."""
    products: list[str] = []
    original = tiles.add_product
    for module in (logprobs, tiles):
        monkeypatch.setattr(module, "add_product", lambda *a, **k: products.append("") or original(*a, **k))
    hidden = normal(5, D, device=device).requires_grad_(hidden_grad)
    weight = head(17, device, weight_grad)
    targets = some_targets(5, 17, device)
    with torch.no_grad():
        linear_logprobs(hidden, weight, targets)
    assert len(products) == 1
    products.clear()
    logp = linear_logprobs(hidden, weight, targets)
    assert len(products) == forward
    if logp.requires_grad:
        logp.sum().backward()
    assert len(products) == both
    assert (hidden.grad is not None, weight.grad is not None) == (hidden_grad, weight_grad)


@pytest.mark.parametrize("case", ["logits", "frozen head", "trained head"])
def test_backward_may_run_twice_but_not_be_differentiated(device: str, case: str) -> None:
    targets = some_targets(5, 17, device)
    x = leaf(normal(5, 17 if case == "logits" else D, device=device))
    weight = head(17, device, case == "trained head")
    logp = token_logprobs(x, targets) if case == "logits" else linear_logprobs(x, weight, targets)
    first, second = (torch.autograd.grad(logp.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (again,) = torch.autograd.grad((logp * logp).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


@trained_or_not
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(device: str, trained: bool, backward_inside: bool) -> None:
    targets, upstream = some_targets(5, 1023, device), normal(5, device=device)
    hidden, weight = leaf(normal(5, D, device=device)), head(1023, device, trained)
    wanted = [hidden, weight] if trained else [hidden]
    low = [tensor.detach().bfloat16().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight)]
    expected = linear_logprobs(*low, targets)
    expected_grads = gradients(expected, upstream, *low[: len(wanted)])
    with torch.autocast(device, torch.bfloat16):
        actual = linear_logprobs(hidden, weight, targets)
        grads = gradients(actual, upstream, *wanted) if backward_inside else None
    grads = grads or gradients(actual, upstream, *wanted)
    assert torch.equal(actual, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected_grad.float())


@trained_or_not
def test_compiled_code_calls_the_functions_as_they_are(device: str, trained: bool) -> None:
    """aot_eager traces all that inductor sees but compiles no C++."""
    targets, upstream = some_targets(5, 1023, device), normal(5, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    hidden, weight = leaf(normal(5, D, device=device)), head(1023, device, trained)
    logits = leaf(normal(5, 1023, device=device))
    for function, *inputs in (
        (lambda h, w: linear_logprobs(2 * h, w, targets) + 1, hidden, weight),  # The compiler may move neighbours.
        (lambda z: token_logprobs(z, targets), logits),
    ):
        compiled = torch.compile(function, backend=backend)
        expected, actual = function(*inputs), compiled(*inputs)
        assert_close(actual, expected, rtol=0.0, atol=1e-6)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        for grads in zip(gradients(actual, upstream, *wanted), gradients(expected, upstream, *wanted), strict=True):
            assert_close(*grads, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert_close(compiled(*inputs), expected, rtol=0.0, atol=1e-6)


# ---- tiles and memory ----


class LargestTensor(TorchDispatchMode):
    """Records the largest number of bytes that a tensor made inside it holds."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return result


@dtypes
@trained_or_not
def test_the_logits_never_exist(dtype: torch.dtype, trained: bool) -> None:
    N, V = 1024, 6000
    hidden, weight = leaf(normal(N, D, dtype=dtype)), normal(V, D, dtype=dtype).requires_grad_(trained)
    targets = some_targets(N, V, "cpu")
    with LargestTensor() as largest:
        linear_logprobs(hidden, weight, targets).sum().backward()
    # The largest tensor is a tile's logits, an input or its gradient. N x V logits are larger, even in 16 bits.
    tile = 4 * tiles.CPU_ROWS * tiles.CPU_COLUMNS
    assert largest.nbytes <= max(4 * N * D, weight.nbytes, tile) < 2 * N * V


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_the_logits_never_exist_on_cuda() -> None:
    hidden, weight = (normal(n, 64, device="cuda", dtype=torch.bfloat16) for n in (16384, 50257))
    targets = some_targets(16384, 50257, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_logprobs(leaf(hidden), weight, targets).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < tiles.CUDA_BUFFER_BYTES + 2**26  # logits: 3.1 GiB in fp32


@pytest.mark.parametrize("N", [0, 1, 128, 2048, 8192, 11000, 16384, 10**6])
@pytest.mark.parametrize("V", [17, 64, 50257, 50304, 262144])
def test_cuda_tiles_fit_the_cap_and_a_block(N: int, V: int) -> None:
    """Tiles are below the cap, of aligned shapes, and a block of the row kernel holds a row of a tile."""
    logit = 6  # bytes
    R, C = tiles.tile_shape(torch.device("cuda"), N, V, logit)
    assert 1 <= R <= max(1, N) and 1 <= C <= min(V, tiles.CUDA_COLUMNS)
    assert logit * R * C <= tiles.CUDA_BUFFER_BYTES
    assert R == max(1, N) or (R % 128 == 0 and R > 5000), "many rows keep the processors busy in the second product"
    assert C == V < tiles.COLUMN_MULTIPLE or C % tiles.COLUMN_MULTIPLE == 0
    assert V < 50257 or C > 7000, "few columns would mean many passes over the gradient"
    assert V % C <= 0.2 * C, "the tile that is left over, whose shape may be odd, is small"


# ---- errors ----


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_targets_out_of_range_in_triton_give_nan(device: str, bad: int) -> None:
    if not uses_triton(device):
        pytest.skip("the CPU raises instead")
    from kernels import triton_rows

    logits, targets = normal(3, 5, device=device), torch.tensor([1, bad, 2], device=device)
    rows, upstream = tiles.Rows.empty(targets), torch.ones(3, device=device)
    at_once, later = torch.ones(2, 3, 5, device=device)
    triton_rows.row_logprobs(logits, rows, IGNORED, 0, 5)
    triton_rows.row_gradient(logits, rows, IGNORED, 0, upstream, later)
    triton_rows.hidden_gradient(at_once, torch.ones(5, 5, device=device), rows, IGNORED)
    assert rows.logp.isnan().tolist() == [False, True, False]
    for grad in (at_once, later):
        assert grad.isnan().all(1).tolist() == [False, True, False] == grad.isnan().any(1).tolist()


T = torch.zeros(4, dtype=torch.int64)
X = torch.zeros(4, 5)
R = torch.tensor([4, IGNORED, 5, -7])
MISFITS = [
    (lambda: token_logprobs(X, T.float()), TypeError, "targets must be integers, got torch.float32"),
    (lambda: token_logprobs(X, T[:3]), ValueError, r"targets must have shape \(4,\) on cpu, got \(3,\)"),
    (lambda: token_logprobs(X, T.to("meta")), ValueError, "on cpu, got .* on meta"),
    (lambda: token_logprobs(X[0], T), ValueError, r"logits must have 2 dimensions, got shape \(5,\)"),
    (lambda: token_logprobs(X.double(), T), TypeError, "logits must be .*, got torch.float64"),
    (lambda: linear_logprobs(X, X[:, :3], T), ValueError, r"hidden \(4, 5\) .* weight \(4, 3\)"),
    (lambda: linear_logprobs(X, X.to("meta"), T), ValueError, "hidden .* on cpu .* weight .* on meta"),
    (lambda: linear_logprobs(X, X.bfloat16(), T), TypeError, "hidden is torch.float32 and weight torch.bfloat16"),
    (lambda: token_logprobs(X, R), ValueError, r"targets\[2\] = 5 is not in \[0, V\) with V = 5, nor ignored \(-100\)"),
    (lambda: linear_logprobs(X, X, -R), ValueError, r"targets\[0\] = -4 is not in \[0, V\) with V = 4"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISFITS)
def test_misfits_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- backends ----


def test_the_expected_backend_does_the_work(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = torch_rows
    if uses_triton(device):
        from kernels import triton_rows as backend
    calls: list[str] = []
    for name in ("row_logprobs", "row_gradient"):
        original = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, o=original, n=name: calls.append(n) or o(*a))
    targets = some_targets(5, 17, device)
    logits, hidden, weight = (leaf(normal(*shape, device=device)) for shape in ((5, 17), (5, D), (17, D)))
    token_logprobs(logits, targets).sum().backward()
    linear_logprobs(hidden, weight, targets).sum().backward()
    assert calls == ["row_logprobs", "row_gradient"] * 2
    linear_logprobs(hidden, weight.detach(), targets).sum().backward()
    assert calls[4:] == ["row_logprobs"]  # the forward pass already has the gradient


def test_triton_compiles_once_for_any_number_of_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile-time constants depend on the vocabulary only, or every micro-batch would wait for the compiler."""
    if not uses_triton(device):
        pytest.skip("needs Triton")
    from kernels import triton_rows

    kernel, seen = triton_rows._logprobs_kernel, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **constants: seen.append(constants) or kernel[grid](*args, **constants)

    monkeypatch.setattr(triton_rows, "_logprobs_kernel", Spy())
    for frozen in (True, False):
        seen.clear()
        for N in (3, 4, 5):
            hidden = normal(N, D, device=device).requires_grad_(frozen)
            linear_logprobs(hidden, normal(17, D, device=device), some_targets(N, 17, device))
        assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(INTERPRETED, reason="runs this file once more, with this variable set")
def test_everything_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    elsewhere = "never_exist or misfits or autocast or twice or fit_the_cap or one_row_of_hidden or matrix_products"
    elsewhere += " or compiled or nothing_is_saved"
    command = [sys.executable, "-m", "pytest", "-rp", "-p", "no:cacheprovider", "-k", f"not ({elsewhere})", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    # These two fail or are skipped unless rows really go through Triton.
    assert f"PASSED tests/{Path(__file__).name}::test_the_expected_backend_does_the_work[cpu]" in run.stdout
    assert f"PASSED tests/{Path(__file__).name}::test_targets_out_of_range_in_triton_give_nan[cpu-5]" in run.stdout


def hopper_assembly(kernel, dtype: str, odd: bool, **constants: int) -> str:
    """PTX of a Triton kernel for compute capability 9.0, which needs no GPU, for logits of this type.

    The strides are multiples of 16 unless they are odd.
    """
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    pointers = dict.fromkeys(("logp_out", "shift_out", "log_sum_out", "logp", "shift", "log_sum", "scale"), "*fp32")
    pointers |= {"targets": "*i64", "weighted": "*fp32", "terms": "*bf16", "logits": f"*{dtype}", "grad": f"*{dtype}"}
    strides = ("logits_stride", "terms_stride", "grad_stride")
    types = pointers | dict.fromkeys((*strides, "first", "V", "ignore_index"), "i32")
    aligned = (*pointers, "first", *(() if odd else strides))
    names = kernel.arg_names
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="compiles nothing")
def test_logits_are_loaded_by_16_bytes_and_those_of_a_tile_once() -> None:
    """Rows of 50257 logits in 16 bits mostly start unaligned: 12 of 13 blocks, the unmasked ones, are loaded so. A row
    of a tile is one block, with one exponential per logit. Triton 3.6 and 3.9 differ in what they vectorise."""
    pytest.importorskip("triton")
    from kernels import triton_rows

    constants = dict(C=50257, D=0, WITH_TERMS=False, SHIFTED=True, BLOCK=triton_rows.BLOCK)
    for kernel in (triton_rows._logprobs_kernel, triton_rows._gradient_kernel):
        ptx = hopper_assembly(kernel, "bf16", True, **constants)
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx or kernel is triton_rows._logprobs_kernel  # The latter stores no terms.
    C, block = tiles.tile_shape(torch.device("cuda"), 8192, 50257, 6)[1], tiles.CUDA_COLUMNS
    constants = dict(C=C, D=0, WITH_TERMS=True, SHIFTED=False, BLOCK=block)
    ptx = hopper_assembly(triton_rows._logprobs_kernel, "fp32", False, **constants)
    per_thread = block // (8 * 32)
    assert per_thread // 4 <= ptx.count("ld.global.v4.b32") <= per_thread // 4 + 2  # not twice as many loads
    assert per_thread <= ptx.count("ex2.approx") <= per_thread + 2  # One more exponential rescales the sums.


# ---- vendoring ----


VENDORED = """
import os, sys
sys.path.append("again")
sys.modules["triton"] = None  # as if it were not installed
import torch
before, state = set(sys.modules), torch.get_rng_state()
functions = torch.addmm, torch.nn.functional.linear
import kernels
assert "triton_rows" not in dir(kernels) and torch.equal(torch.get_rng_state(), state)
assert functions == (torch.addmm, torch.nn.functional.linear)
assert {name.split(".")[0] for name in set(sys.modules) - before} == {"kernels"}
assert len(kernels.__path__) == 1 and not hasattr(kernels, "answer") and not hasattr(kernels, "__version__")
x = torch.eye(3, requires_grad=True)
kernels.linear_logprobs(x, x, torch.tensor([0, 1, -100])).sum().backward()
kernels.token_logprobs(x, torch.tensor([0, 1, -100])).sum().backward()
assert os.path.dirname(os.path.dirname(kernels.__file__)) in ("", os.getcwd())
"""


@pytest.mark.skipif(INTERPRETED, reason="needs no second run")
def test_the_package_works_alone_and_without_triton(alone, tmp_path: Path) -> None:
    """The package is in sys.path twice, the second time through a link."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "again").mkdir()
    (tmp_path / "again/kernels").symlink_to(tmp_path / "kernels")
    (tmp_path / "example.py").write_text(VENDORED)
    alone(tmp_path)


STAND_IN = """
__version__ = "1.2"
from kernels.deeper import answer
from . import deeper
from kernels import __version__ as found

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **options: None, "__call__": lambda self, it: it})
"""
BESIDE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels
assert "kernels.deeper" not in sys.modules, "the other package is not run before somebody asks for it"
from kernels import linear_logprobs
from kernels import answer, LayerRepository
from kernels.deeper import answer as same
assert answer == same == 42 and kernels.__version__ == "1.2"
import transformers.utils
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: True
from transformers.integrations import hub_kernels
assert hub_kernels.is_kernels_available()
from kernels import logprobs
import torch
assert kernels.linear_logprobs is linear_logprobs is logprobs.linear_logprobs
assert linear_logprobs(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2])).shape == (2,)
"""


@pytest.mark.skipif(INTERPRETED, reason="needs no second run")
def test_hugging_faces_package_of_this_name_works_beside_it(alone, tmp_path: Path) -> None:
    """transformers imports names from Hugging Face's package, which a stand-in has here."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(STAND_IN)
    (tmp_path / "kernels/deeper.py").write_text("answer = 42\n")
    (tmp_path / "example.py").write_text(BESIDE)
    alone(tmp_path)
