"""Log-probabilities of given tokens: kernels/ beside its peers.

Ours gives each token's log-probability in fp32 and takes a gradient for each.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Ways, ours
from torch import Tensor

from kernels import linear_logprobs, token_logprobs

V_ODD, V_EVEN = 50257, 50304
TRL_TOKENS = 512  # tokens per sequence
CHECKED = 64  # rows whose log-probabilities are compared with float64
PRODUCTS = {"scoring": "one product", "frozen head": "two products", "trained head": "three products"}


def logps_of(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The textbook way: all logits at once."""
    return logps_of(F.linear(hidden, weight).float(), targets)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's function loops over sequences, here of TRL_TOKENS tokens."""
    from trl.trainer.utils import selective_log_softmax

    rows = len(targets) // TRL_TOKENS or 1
    logits = F.linear(hidden, weight).view(rows, -1, len(weight))
    return selective_log_softmax(logits, targets.view(rows, -1)).flatten()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")


def error(exact: Tensor, call: Callable[[], Tensor | None]) -> str:
    """A check for Ways: the largest error of the first log-probabilities against float64 on the same inputs."""
    logp = call()
    return "" if logp is None else f"error {(logp.detach()[:CHECKED].double() - exact).abs().max():.0e}"


def linear_ways(kind: str, N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Ways:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_(kind != "scoring")
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype).requires_grad_(kind == "trained head")
    targets, upstream = torch.randint(V, (N,), device=device), torch.randn(N, device=device)  # gradients have a sign
    aligned = torch.randn(V_EVEN, D, device=device).to(dtype)
    room = torch.empty(N, V_EVEN, dtype=dtype, device=device)

    def run(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(kind != "scoring"):
            logp = way(hidden, weight, targets)
        if kind != "scoring":
            (logp * upstream).sum().backward()
        hidden.grad = weight.grad = None  # Else the next call would free the gradients and seem to need less memory.
        return logp

    def floor() -> None:
        with torch.no_grad():
            torch.mm(hidden, aligned.T, out=room)
            if kind != "scoring":
                torch.mm(room, aligned)
            if kind == "trained head":
                torch.mm(room.T, hidden)

    torch._dynamo.reset()  # Otherwise torch.compile would silently run eager code after eight shapes.
    others = {
        "eager": eager,
        "torch.compile of eager": torch.compile(eager, dynamic=False),
        "TRL selective_log_softmax": trl,
    }
    if device.type == "cuda":
        others |= {"Liger, none": liger, "CCE, default (leaves out small gradients)": cce}
    calls = ours(partial(run, linear_logprobs), device) | {name: partial(run, way) for name, way in others.items()}
    calls[f"floor: {PRODUCTS[kind]}, V {V_EVEN}"] = floor
    exact = logps_of(hidden.detach()[:CHECKED].double() @ weight.detach().double().T, targets[:CHECKED])
    return Ways(calls, check=partial(error, exact))


def linear(kind: str, N: int, D: int, dtype: torch.dtype, V: int = V_ODD) -> Case:
    name = f"log-probabilities: {kind}, N {N}, D {D}, V {V}, {str(dtype).removeprefix('torch.')}"
    return Case(name, partial(linear_ways, kind, N, D, V, dtype), estimate=10)


def logits_ways(N: int, dtype: torch.dtype, device: torch.device) -> Ways:
    """Ours reads every logit once, so it should take half as long as a copy, which writes it, too."""
    torch.manual_seed(0)
    logits, targets = torch.randn(N, V_ODD, device=device).to(dtype), torch.randint(V_ODD, (N,), device=device)
    room = torch.empty_like(logits)

    def copy() -> None:
        room.copy_(logits)

    calls = ours(partial(token_logprobs, logits, targets), device)
    calls |= {"eager": lambda: logps_of(logits.float(), targets), "a copy of the logits": copy}
    return Ways(calls, check=partial(error, logps_of(logits[:CHECKED].double(), targets[:CHECKED])))


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "quick": [linear("frozen head", 64, 32, FP32, V=1001)],
    "cpu": [
        linear("frozen head", 512, 768, FP32),
        linear("scoring", 512, 768, FP32),
        linear("trained head", 512, 768, FP32),
        linear("frozen head", 512, 768, BF16),
    ],
    "cuda": [
        linear("frozen head", 8192, 2560, BF16),
        linear("scoring", 8192, 2560, BF16),
        linear("frozen head", 8192, 768, BF16),
        linear("trained head", 8192, 2560, BF16),
        linear("frozen head", 128, 2560, BF16),
        linear("frozen head", 2048, 2560, FP32),
        Case("log-probabilities from logits, N 8192, bfloat16", partial(logits_ways, 8192, BF16), estimate=5),
    ],
}
