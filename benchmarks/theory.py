"""Theory: self-play on small games, in float64, with exact expectations."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from evaluate import Row
from spin import spin_loss


def results() -> dict[str, list[Row]]:
    """What evidence.py stores; first gradients are those of the greedy opponent."""
    games, starts = ((1, 1), (1, 3), (1, 0.3), (1.5, 1)), ("flatter", "sharper", "other", "data")
    return {
        "capacity": [dict(temperature=t, beta=b, nats=limited_capacity(t, b, 6)) for t, b in games],
        "sequences": [dict(temperature=1.5, beta=b, iterates=sequence_game(1.5, b, 8)) for b in (1, 3)],
        "first gradients": [{"start": start} | first_gradients(start, 0) for start in starts],
    }


# ---------------------------------------------------------------- optima of the loss

DATA = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64).log()  # log p of seven responses
FEATURES = torch.tensor([0, 1, 0, 1, 0, 1, 2], dtype=torch.float64)


def limited(weight: Tensor) -> Tensor:
    """log p of the seven responses under a model with one parameter, (1,)."""
    return (FEATURES * weight).log_softmax(0)


def limited_capacity(temperature: float, beta: float, iterations: int) -> list[float]:
    """KL(p_data || p_t) less its least value, nats, of the model `limited`, by iterate.

    Supervised training ends at the least value. At temperature 1 the opponent's own samples have expected score 0, so
    an iterate that self-play does not change is a stationary point of supervised training, whatever the model can be.
    """
    data, found = DATA.exp(), [torch.zeros(1, dtype=torch.float64)]
    best = minimised(lambda weight: -data @ limited(weight), found[0])
    for _ in range(iterations):
        generated = (limited(found[-1]) / temperature).softmax(0)
        found.append(played(limited, found[-1], data, generated, beta))
    return [float(data @ (limited(best) - limited(weight))) for weight in found]


def played(log_p: Callable, weights: Tensor, data: Tensor, generated: Tensor, beta: float) -> Tensor:
    """The minimiser of the expected loss of Eq. 4.7, from the opponent's `weights` on.

    log_p(weights), data and generated: (responses,); the last two are probabilities.
    """
    opponent = log_p(weights).detach()
    pairs = data[:, None] * generated  # probabilities of (real, generated)

    def loss(weights: Tensor) -> Tensor:
        ratios = log_p(weights) - opponent
        return (pairs * spin_loss(ratios[:, None].expand_as(pairs), ratios[None].expand_as(pairs), beta)).sum()

    return minimised(loss, weights)


def minimised(loss: Callable, weights: Tensor) -> Tensor:
    """The weights at the end of L-BFGS, which begins at `weights`."""
    weights = weights.detach().clone().requires_grad_()
    limits = dict(max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-13)
    optimizer = torch.optim.LBFGS([weights], line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


# ---------------------------------------------------------------- sequences, all of them enumerated

SYMBOLS, LONGEST = 3, 3  # a response has at most three symbols; shorter ones end with a further token
SEQUENCES = [y for n in range(LONGEST + 1) for y in itertools.product(range(SYMBOLS), repeat=n)]  # 40 sequences
PREFIXES = {y: i for i, y in enumerate(y for y in SEQUENCES if len(y) < LONGEST)}  # 13 prefixes, each with a softmax
CHOICES = torch.zeros(len(SEQUENCES), len(PREFIXES), SYMBOLS + 1, dtype=torch.float64)  # 1: a token of the sequence
for row, y in enumerate(SEQUENCES):
    for i, token in enumerate((*y, SYMBOLS)[:LONGEST]):
        CHOICES[row, PREFIXES[y[:i]], token] = 1
LENGTHS = CHOICES.sum((1, 2))  # lengths in tokens


def random_table(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), SYMBOLS + 1, dtype=torch.float64, generator=rng)


def sequence_logps(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log-probability of every sequence, (40,), if each token is sampled at this temperature; 0: greedily."""
    if temperature:
        return CHOICES.flatten(1) @ (logits / temperature).log_softmax(1).flatten()
    likeliest = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return ((CHOICES * likeliest).sum((1, 2)) == LENGTHS).double().log()


def sequence_game(temperature: float, beta: float, iterations: int) -> list[Row]:
    """Iterates from the data on, each the optimum on the last, beside two candidates for where they end.

    "by token", "by response": KL(candidate || iterate), nats, of the data with every token's distribution to the power
    T, and of the data's distribution of responses to that power. "slope" is that of log p_t on log p_data over all
    responses, "slope at equal length" and "nats per token" are the coefficients if length counts, too. "closed form" is
    the largest error of log p_{t-1} + (log p_data - log q) / beta, normalised.
    """
    logits = random_table(0)
    data, tokenwise = sequence_logps(logits), sequence_logps(logits * temperature)
    whole, rows, formula = (temperature * data).log_softmax(0), [], data
    for _ in range(iterations + 1):
        now = sequence_logps(logits)
        row = {"by token": kl(tokenwise, now), "by response": kl(whole, now), "slope": coefficients(now, data)[0]}
        row["slope at equal length"], row["nats per token"] = coefficients(now, data, LENGTHS)
        rows.append(row | {"closed form": float((now - formula).abs().max())})
        generated = sequence_logps(logits, temperature)
        formula = (now + (data - generated) / beta).log_softmax(0)
        logits = played(sequence_logps, logits, data.exp(), generated.exp(), beta)
    return rows


def kl(p: Tensor, q: Tensor) -> float:
    return float(p.exp() @ (p - q))


def coefficients(y: Tensor, *columns: Tensor) -> list[float]:
    """The columns' coefficients in the fit of y by least squares, with an intercept."""
    *found, _ = torch.linalg.lstsq(torch.stack([*columns, torch.ones_like(y)], 1), y[:, None]).solution.flatten()
    return [float(one) for one in found]


def first_gradients(start: str, temperature: float, prompts: int = 32) -> Row:
    """Norms of the "supervised" gradient and of "spin", times 2 / beta, at the first step, and their "cosine".

    Exact expectations over as many prompts, each with a table of its own and random data. The start is the data
    ("data"), is less or more certain ("flatter", "sharper": logits times 0.8 or 1.25), or errs at random ("other").
    """
    supervised, spin = [], []
    for seed in range(prompts):
        truth = random_table(seed)
        noise = 0.3 * random_table(prompts + seed) if start == "other" else 0.0
        logits = ({"flatter": 0.8, "sharper": 1.25}.get(start, 1.0) * truth + noise).requires_grad_()
        real, generated = sequence_logps(truth).exp(), sequence_logps(logits.detach(), temperature).exp()
        for weights, found in ((real, supervised), (real - generated, spin)):
            found.append(torch.autograd.grad(-weights @ sequence_logps(logits), logits)[0].flatten())
    a, b = torch.cat(supervised) / prompts, torch.cat(spin) / prompts
    return {"cosine": float(a @ b / (a.norm() * b.norm())), "supervised": float(a.norm()), "spin": float(b.norm())}
