"""Log-probabilities of given tokens: kernels/ and its peers, as the README of this folder explains.

Ours gives each token's log-probability and takes a gradient for each. Peers that give less are marked.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case
from torch import Tensor

from kernels import linear_logprobs, onednn, token_logprobs

V_ODD, V_EVEN = 50257, 50304


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The textbook way: all logits at once."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def with_onednn(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprobs(hidden, weight, targets)


def peers(device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """({name: function of hidden, weight and targets giving logps or their sum}, {name: what to know of it})."""
    ways: dict[str, Callable] = {"eager": eager, "torch.compile of eager": torch.compile(eager)}
    notes: dict[str, str] = {}
    try:
        from trl.trainer.utils import selective_log_softmax

        ways["TRL selective_log_softmax"] = lambda h, w, t: selective_log_softmax(F.linear(h, w), t)
    except ImportError:
        notes["TRL selective_log_softmax"] = "not installed"
    if hasattr(F, "linear_cross_entropy"):
        for name, options in (("whole", None), ("chunked", torch.nn.LinearCrossEntropyOptions())):
            ways[f"torch linear_cross_entropy, {name}"] = lambda h, w, t, options=options: (
                -F.linear_cross_entropy(h, w, t, reduction="none", options=options)
            )
    else:
        notes["torch linear_cross_entropy"] = "not in this torch"
    if device.type != "cuda":
        return ways, notes
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for reduction in ("none", "sum"):
            loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
            ways[f"Liger, {reduction}"] = lambda h, w, t, loss=loss: -loss(w, h, t)
        notes["Liger, sum"] = "one gradient for all tokens"
    except ImportError:
        notes["Liger"] = "not installed"
    try:
        from cut_cross_entropy import linear_cross_entropy

        for impl, name in (("cce", "CCE, default"), ("cce_exact", "CCE, exact")):
            ways[name] = lambda h, w, t, impl=impl: -linear_cross_entropy(h, w, t, reduction="none", impl=impl)
        notes["CCE, default"] = "leaves out small gradients"
    except ImportError:
        notes["CCE"] = "not installed"
    return ways, notes


def inputs(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """hidden, weight as model.py keeps it, targets, and a signed gradient for each token."""
    rng = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, device=device).to(dtype)
    storage = torch.zeros((V + 63) // 64 * 64, D, device=device, dtype=dtype)
    storage[:V] = torch.randn(V, D, generator=rng, device=device) * D**-0.5
    targets = torch.randint(V, (N,), generator=rng, device=device)
    return hidden, storage[:V], targets, torch.randn(N, generator=rng, device=device)


def worst_error(way: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> str:
    """The largest error of 64 log-probabilities, against float64 on the same inputs."""
    few = hidden[:64].detach(), weight, targets[:64]
    with torch.no_grad():
        logp = way(*few)
    if logp.dim() == 0:
        return ""
    exact = eager_in_float64(*few)
    return f"error {(logp.double() - exact).abs().max():.0e}"


def eager_in_float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def linear_case(
    kind: str, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, others: tuple[dict, dict]
) -> Case:
    hidden, weight, targets, upstream = inputs(N, D, V, dtype, device)
    hidden.requires_grad_(kind != "scoring")
    weight.requires_grad_(kind == "trained head")
    aligned = torch.randn(V_EVEN, D, device=device).to(dtype)
    room = torch.empty(N, V_EVEN, dtype=dtype, device=device)

    def run(way: Callable) -> None:
        hidden.grad = weight.grad = None
        with onednn.products() if way is with_onednn else contextlib.nullcontext():
            with torch.set_grad_enabled(kind != "scoring"):
                logp = way(hidden, weight, targets)
            if kind != "scoring":
                (logp if logp.dim() == 0 else (logp * upstream).sum()).backward()

    def floor() -> None:
        with torch.no_grad():
            torch.mm(hidden, aligned.T, out=room)
            if kind != "scoring":
                torch.mm(room, aligned)
            if kind == "trained head":
                torch.mm(room.T, hidden)

    ways, notes = {"ours": linear_logprobs} | others[0], dict(others[1])
    if device.type == "cpu":
        ways = {"ours": with_onednn} | {"ours without onednn.py": linear_logprobs} | others[0]
    for name, way in ways.items():
        try:
            error = worst_error(way, hidden, weight, targets)
        except Exception:  # bench.py reports it
            continue
        notes[name] = ", ".join(filter(None, [notes.get(name), error]))
    products = {"scoring": "one product", "frozen head": "two products", "trained head": "three products"}[kind]
    return Case(
        f"log-probabilities: {kind}, N {N}, D {D}, V {V}, {str(dtype).removeprefix('torch.')}",
        {name: partial(run, way) for name, way in ways.items()} | {f"floor: {products}, V {V_EVEN}": floor},
        notes,
    )


def row_case(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """token_logprobs alone against a copy of the logits: it reads them once; with the gradient, twice and writes it."""
    rng = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, generator=rng, device=device).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=rng, device=device)
    upstream = torch.randn(N, generator=rng, device=device)
    copy = torch.empty_like(logits)
    size = N * V * dtype.itemsize / 1e9
    textbook = lambda z, t: z.float().log_softmax(-1).gather(1, t[:, None])[:, 0]  # noqa: E731
    try:
        from trl.trainer.utils import selective_log_softmax

        others = {"eager": textbook, "TRL selective_log_softmax": selective_log_softmax}
    except ImportError:
        others = {"eager": textbook}

    def score(way: Callable) -> None:
        with torch.no_grad():
            way(logits, targets)

    def train(way: Callable) -> None:
        logits.grad = None
        (way(logits, targets) * upstream).sum().backward()

    def duplicate() -> None:
        with torch.no_grad():
            copy.copy_(logits)

    for kind, call, passes in (("forward", score, 1), ("forward + backward", train, 3)):
        ways = {"ours": token_logprobs} | others
        yield Case(
            f"log-probabilities from logits: {kind}, N {N}, V {V}, {str(dtype).removeprefix('torch.')}",
            {name: partial(call, way) for name, way in ways.items()} | {"a copy of the logits": duplicate},
            rates={"ours": (passes * size, "GB"), "a copy of the logits": (2 * size, "GB")},
        )


def cases(device: torch.device) -> Iterator[Case]:
    others = peers(device)
    if device.type == "cpu":
        for kind in ("frozen head", "scoring", "trained head"):
            yield linear_case(kind, 512, 768, V_ODD, torch.float32, device, others)
        yield linear_case("frozen head", 512, 768, V_ODD, torch.bfloat16, device, others)
        yield from row_case(512, V_ODD, torch.float32, device)
        return
    bf16, fp32 = torch.bfloat16, torch.float32
    for kind in ("frozen head", "scoring"):
        for D in (768, 2048, 2560):
            for N in (128, 2048, 8192, 16384):
                yield linear_case(kind, N, D, V_ODD, bf16, device, others)
            yield linear_case(kind, 8192, D, V_EVEN, bf16, device, others)
            yield linear_case(kind, 2048, D, V_ODD, fp32, device, others)
    yield linear_case("trained head", 8192, 2048, V_ODD, bf16, device, others)
    for V, dtype in ((V_ODD, bf16), (V_EVEN, bf16), (V_ODD, fp32)):
        yield from row_case(8192, V, dtype, device)
