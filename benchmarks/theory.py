"""Theory: self-play on small games, in float64, with exact expectations."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from evaluate import Row
from spin import spin_loss

# ---------------------------------------------------------------- optima of the loss

DATA = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64).log()  # of seven responses


def slope(x: Tensor, y: Tensor) -> float:
    """Of the line of least squares."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def limited_capacity(temperature: float, beta: float, iterations: int) -> list[float]:
    """KL(p_data || p_t) less its least value, nats, of a model with one parameter for seven responses, by iterate.

    Supervised training ends at the least value. At temperature 1 the opponent's own samples have expected score 0, so
    an iterate that self-play does not change is a stationary point of supervised training, whatever the model can be.
    """
    features = torch.tensor([[0, 1, 0, 1, 0, 1, 2]], dtype=torch.float64).T

    def log_p(weights: Tensor) -> Tensor:
        return (features @ weights).log_softmax(0)

    def nll(weights: Tensor) -> Tensor:
        return -(DATA.exp() * log_p(weights)).sum()

    weights = torch.zeros(1, dtype=torch.float64)
    least, found = nll(minimised(nll, weights)), [weights]
    for _ in range(iterations):
        generated = (log_p(found[-1]) / temperature).softmax(0)
        found.append(played(log_p, found[-1], DATA.exp(), generated, beta))
    return [float(nll(weights) - least) for weights in found]


def played(log_p: Callable, weights: Tensor, data: Tensor, generated: Tensor, beta: float) -> Tensor:
    """The minimiser of the expected loss of Eq. 4.7, from the opponent's `weights` on.

    log_p(weights), data and generated: (responses,); the last two are probabilities.
    """
    opponent = log_p(weights).detach()
    pairs = data[:, None] * generated  # probabilities of (real, generated)

    def loss(weights: Tensor) -> Tensor:
        ratios = log_p(weights) - opponent
        real, generated = ratios[:, None].expand_as(pairs), ratios[None].expand_as(pairs)
        return (pairs * spin_loss(real, generated, beta)).sum()

    return minimised(loss, weights)


def minimised(loss: Callable, weights: Tensor) -> Tensor:
    weights = weights.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


# ---------------------------------------------------------------- sequences, all of them enumerated

SYMBOLS, LONGEST = 3, 3  # a response has at most three symbols; shorter ones end with a further token
SEQUENCES = [y for n in range(LONGEST + 1) for y in itertools.product(range(SYMBOLS), repeat=n)]  # 40
PREFIXES = {y: i for i, y in enumerate(y for y in SEQUENCES if len(y) < LONGEST)}  # 13, each with a softmax
CHOICES = torch.zeros(len(SEQUENCES), len(PREFIXES), SYMBOLS + 1, dtype=torch.float64)  # 1: a token of the sequence
for row, y in enumerate(SEQUENCES):
    for i, token in enumerate((*y, SYMBOLS)[:LONGEST]):
        CHOICES[row, PREFIXES[y[:i]], token] = 1
LENGTHS = CHOICES.sum((1, 2))  # in tokens


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
    responses, "slope at equal length" and "nats per token" are the coefficients if length counts, too, "length" is the
    mean. "closed form" is the largest error of log p_{t-1} + (log p_data - log q) / beta, normalised.
    """
    logits = random_table(0)
    data, tokenwise = sequence_logps(logits), sequence_logps(logits * temperature)
    whole, rows, formula = (temperature * data).log_softmax(0), [], data
    columns = torch.stack([data, LENGTHS, torch.ones_like(data)], 1)
    for _ in range(iterations + 1):
        now = sequence_logps(logits)
        both = torch.linalg.lstsq(columns, now[:, None]).solution.flatten()
        row = {"by token": kl(tokenwise, now), "by response": kl(whole, now), "slope": slope(data, now)}
        row |= {"slope at equal length": float(both[0]), "nats per token": float(both[1])}
        rows.append(row | {"length": float(now.exp() @ LENGTHS), "closed form": float((now - formula).abs().max())})
        generated = sequence_logps(logits, temperature)
        formula = (now + (data - generated) / beta).log_softmax(0)
        logits = played(sequence_logps, logits, data.exp(), generated.exp(), beta)
    return rows


def kl(p: Tensor, q: Tensor) -> float:
    return float(p.exp() @ (p - q))


def first_gradients(start: str, temperature: float, prompts: int = 32) -> Row:
    """Norms of the "supervised" gradient and of "spin", times 2 / beta, at the first step, and their "cosine".

    Exact expectations over as many prompts, each with a table of its own and random data. The start is the data
    ("data"), is less or more certain ("flatter", "sharper": logits times 0.8 or 1.25), or errs at random ("other").
    """
    supervised, spin = [], []
    for seed in range(prompts):
        truth = random_table(seed)
        noise = 0.3 * random_table(prompts + seed) if start == "other" else 0.0
        logits = {"flatter": 0.8, "sharper": 1.25}.get(start, 1.0) * truth + noise
        real, generated = sequence_logps(truth).exp(), sequence_logps(logits, temperature).exp()
        logits.requires_grad_()
        for weights, found in ((real, supervised), (real - generated, spin)):
            found.append(torch.autograd.grad(-(weights * sequence_logps(logits)).sum(), logits)[0].flatten())
    a, b = torch.cat(supervised) / prompts, torch.cat(spin) / prompts
    return {"cosine": float(a @ b / (a.norm() * b.norm())), "supervised": float(a.norm()), "spin": float(b.norm())}
