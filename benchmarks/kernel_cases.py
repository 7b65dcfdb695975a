"""Log-probabilities of given tokens: kernels/ and its peers, as the README of this folder explains.

Ours gives each token's log-probability and takes a gradient for each. Peers that give less are marked.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Ways, optional, ours
from torch import Tensor

from kernels import linear_logprobs, token_logprobs

V_ODD, V_EVEN = 50257, 50304
TRL_TOKENS = 512  # of a sequence
CHECKED = 64  # rows whose log-probabilities are compared with float64
PRODUCTS = {"scoring": "one product", "frozen head": "two products", "trained head": "three products"}
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def logps_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The textbook way: all logits at once."""
    return logps_of(F.linear(hidden, weight).float(), targets)


def peers(device: torch.device) -> tuple[dict[str, Logps], dict[str, str]]:
    """({name: function of hidden, weight and targets giving logps or their sum}, {name: what to know of it})."""
    torch._dynamo.reset()  # else, after eight shapes, torch.compile would run eager code without a word
    ways: dict[str, Logps] = {"eager": eager, "torch.compile of eager": torch.compile(eager, dynamic=False)}
    notes: dict[str, str] = {}
    with optional(notes, "TRL selective_log_softmax"):
        trl = trl_function()
        ways["TRL selective_log_softmax"] = lambda h, w, t: trl(F.linear(h, w), t)
    if hasattr(F, "linear_cross_entropy"):
        for name, options in (("whole", None), ("chunked", torch.nn.LinearCrossEntropyOptions())):
            ways[f"torch linear_cross_entropy, {name}"] = lambda h, w, t, options=options: (
                -F.linear_cross_entropy(h, w, t, reduction="none", options=options)
            )
    else:
        notes["torch linear_cross_entropy"] = "not in this torch"
    if device.type != "cuda":
        return ways, notes
    with optional(notes, "Liger"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        for reduction in ("none", "sum"):
            loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
            ways[f"Liger, {reduction}"] = lambda h, w, t, loss=loss: -loss(w, h, t)
        notes["Liger, sum"] = "one gradient for all tokens"
    with optional(notes, "CCE"):
        from cut_cross_entropy import linear_cross_entropy

        for impl, name in (("cce", "CCE, default"), ("cce_exact", "CCE, exact")):
            ways[name] = lambda h, w, t, impl=impl: -linear_cross_entropy(h, w, t, reduction="none", impl=impl)
        notes["CCE, default"] = "leaves out small gradients"
    return ways, notes


def trl_function() -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's log-probabilities from logits (N, V), in sequences of TRL_TOKENS tokens, over which it loops."""
    from trl.trainer.utils import selective_log_softmax

    def call(logits: Tensor, targets: Tensor) -> Tensor:
        rows = len(targets) // TRL_TOKENS or 1
        return selective_log_softmax(logits.view(rows, -1, logits.shape[1]), targets.view(rows, -1)).flatten()

    return call


def error(exact: Tensor, logp: Tensor | None) -> str:
    """A check for Ways: the largest error of the first log-probabilities against float64 on the same inputs."""
    if logp is None or logp.dim() == 0:
        return ""
    return f"error {(logp.detach()[:CHECKED].double() - exact).abs().max():.0e}"


def linear_ways(kind: str, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Ways:
    rng = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, device=device).to(dtype).requires_grad_(kind != "scoring")
    weight = (torch.randn(V, D, generator=rng, device=device) * D**-0.5).to(dtype)
    weight.requires_grad_(kind == "trained head")
    targets = torch.randint(V, (N,), generator=rng, device=device)
    upstream = torch.randn(N, generator=rng, device=device)  # a signed gradient for each token
    aligned = torch.randn(V_EVEN, D, device=device).to(dtype)
    room = torch.empty(N, V_EVEN, dtype=dtype, device=device)

    def run(way: Logps) -> Tensor:
        with torch.set_grad_enabled(kind != "scoring"):
            logp = way(hidden, weight, targets)
        if kind != "scoring":
            (logp if logp.dim() == 0 else (logp * upstream).sum()).backward()
        hidden.grad = weight.grad = None  # freed here, or the next call would free it and seem to need less memory
        return logp

    def floor() -> None:
        with torch.no_grad():
            torch.mm(hidden, aligned.T, out=room)
            if kind != "scoring":
                torch.mm(room, aligned)
            if kind == "trained head":
                torch.mm(room.T, hidden)

    others, notes = peers(device)
    exact = logps_of(hidden.detach()[:CHECKED].double() @ weight.detach().double().T, targets[:CHECKED])
    calls = ours(partial(run, linear_logprobs), device) | {name: partial(run, way) for name, way in others.items()}
    calls[f"floor: {PRODUCTS[kind]}, V {V_EVEN}"] = floor
    return Ways(calls, notes, check=partial(error, exact))


def linear_case(kind: str, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Case:
    name = f"log-probabilities: {kind}, N {N}, D {D}, V {V}, {str(dtype).removeprefix('torch.')}"
    return Case(name, partial(linear_ways, kind, N, D, V, dtype, device), estimate=10 * (device.type == "cuda"))


def row_ways(backward: bool, N: int, V: int, dtype: torch.dtype, device: torch.device) -> Ways:
    """token_logprobs against a copy of the logits: it reads them once; with the gradient, twice, and writes it."""
    rng = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, generator=rng, device=device).to(dtype).requires_grad_(backward)
    targets = torch.randint(V, (N,), generator=rng, device=device)
    upstream = torch.randn(N, generator=rng, device=device)
    copy = torch.empty_like(logits)
    size = N * V * dtype.itemsize / 1e9
    notes: dict[str, str] = {}
    ways: dict[str, Callable] = {"ours": token_logprobs, "eager": lambda z, t: logps_of(z.float(), t)}
    with optional(notes, "TRL selective_log_softmax"):
        ways["TRL selective_log_softmax"] = trl_function()

    def run(way: Callable) -> Tensor:
        logp = way(logits, targets)
        if backward:
            (logp * upstream).sum().backward()
            logits.grad = None
        return logp

    def duplicate() -> None:
        with torch.no_grad():
            copy.copy_(logits)

    exact = logps_of(logits.detach()[:CHECKED].double(), targets[:CHECKED])
    return Ways(
        {name: partial(run, way) for name, way in ways.items()} | {"a copy of the logits": duplicate},
        notes,
        rates={"ours": ((3 if backward else 1) * size, "GB"), "a copy of the logits": (2 * size, "GB")},
        check=partial(error, exact),
    )


def row_cases(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for kind, backward in (("forward", False), ("forward + backward", True)):
        name = f"log-probabilities from logits: {kind}, N {N}, V {V}, {str(dtype).removeprefix('torch.')}"
        yield Case(name, partial(row_ways, backward, N, V, dtype, device), estimate=5 * (device.type == "cuda"))


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    frozen, trained = "frozen head", "trained head"
    if quick:
        sizes, rows = [(frozen, 64, 32, 1001, fp32)], (64, 1001, fp32)
    elif device.type == "cpu":
        sizes = [(kind, 512, 768, V_ODD, fp32) for kind in (frozen, "scoring", trained)]
        sizes, rows = [*sizes, (frozen, 512, 768, V_ODD, bf16)], (512, V_ODD, fp32)
    else:
        sizes = [(kind, 8192, D, V_ODD, bf16) for D in (2560, 768) for kind in (frozen, "scoring")]
        sizes += [(trained, 8192, 2560, V_ODD, bf16), (frozen, 128, 2560, V_ODD, bf16)]
        sizes += [(frozen, 2048, 2560, V_ODD, fp32)]
        rows = (8192, V_ODD, bf16)
    return [linear_case(*size, device) for size in sizes] + list(row_cases(*rows, device))
