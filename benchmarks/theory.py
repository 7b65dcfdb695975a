"""Theory beside measurement: the sharpening exponent, the expected gradient at a start, games that are enumerated."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.examples import Example
from evaluate import Row
from player import Player
from runtime.work import Work as Run
from spin import spin_loss

# ---------------------------------------------------------------- the exponent

PROMPTS, SAMPLES = 400, 8  # held-out prompts, and responses to each


def samples_of_start(player: Player, run: Run, start: str) -> tuple[list, np.ndarray]:
    """Responses of the start to held-out prompts, several to each, and its log-probabilities of them."""
    player.model.load_weights(start)
    prompts = [e.prompt_ids for e in run.heldout[:PROMPTS] for _ in range(SAMPLES)]
    items = [(prompt, ids) for prompt, (ids, _) in zip(prompts, player.respond(prompts, run.seed(0, "exponent")))]
    return items, logps_of(player, items)


def logps_of(player: Player, items: list) -> np.ndarray:
    """(prompts, samples), in nats."""
    return np.array([logp for (logp,) in player.logps(items)]).reshape(-1, SAMPLES)


def exponent(player: Player, samples: tuple[list, np.ndarray]) -> float:
    """The slope of log p_theta(y|x) on log p_0(y|x) over the start's responses to the same prompt.

    If p_theta is p_0^g, normalised, the slope is g: the normaliser is the same for all responses to a prompt.
    """
    items, before = samples
    now = logps_of(player, items)
    before, now = (values - values.mean(1, keepdims=True) for values in (before, now))
    return float((before * now).sum() / (before**2).sum())


def optimum_on_samples(player: Player, samples: tuple[list, np.ndarray], temperature: float, beta: float) -> Row:
    """What an iteration would lead to if the start were the data, over the start's responses to the same prompt.

    The optimum is log p_0 + (log p_0 - log q) / beta, with q the opponent's distribution, which is tempered token by
    token. "slope": of the optimum on log p_0. "slope at equal length", "nats per token": of the two together.
    """
    items, before = samples
    cooled = np.array([logp for (logp,) in player.logps(items, temperature=temperature)]).reshape(before.shape)
    optimum, lengths = before + (before - cooled) / beta, np.array([len(ids) for _, ids in items]).reshape(before.shape)
    x, length, y = ((v - v.mean(1, keepdims=True)).ravel() for v in (before, lengths, optimum))
    both = np.linalg.lstsq(np.stack([x, length], 1), y, rcond=None)[0]
    return {"slope": float(x @ y / (x @ x)), "slope at equal length": float(both[0]), "nats per token": float(both[1])}


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


def first_gradients(start: str, temperature: float, prompts: int = 32) -> tuple[float, float, float]:
    """(cosine, norm of the supervised gradient, norm of SPIN's times 2 / beta) at the first step of an iteration.

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
    return float(a @ b / (a.norm() * b.norm())), float(a.norm()), float(b.norm())


# ---------------------------------------------------------------- the gradient

BLOCKS = 32


def gradients(player: Player, run: Run, examples: Sequence[Example]) -> Row:
    """Expected gradients over the data, estimated without bias from independent blocks of examples.

    With s(y) = grad log p(y|x), the gradient of supervised training is -E s(real), and that of Eq. 4.7 at its start,
    for beta 1, is -E [s(real) - s(generated)] / 2; E s(generated) is 0 at temperature 1. Returns [value, standard
    error] of their squared norms and of the product of the supervised and the greedy opponent's gradient, and the noise
    of one example or pair: the trace of the gradient's covariance.
    """
    player.model.eval()
    parameters = [p for p in player.model.parameters() if p.requires_grad]
    size = len(examples) // BLOCKS
    found: dict[str, list[Tensor]] = {"real": [], "generated": [], "likeliest": []}
    for block in range(BLOCKS):
        some = examples[block * size : (block + 1) * size]
        prompts, seed = [e.prompt_ids for e in some], run.seed(block, "gradient")
        responses = {"real": [e.real_ids for e in some]}
        for name, temperature in (("generated", 1.0), ("likeliest", 0.0)):
            responses[name] = [ids for ids, _ in player.respond(prompts, seed, temperature=temperature)]
        for name, blocks in found.items():
            for parameter in parameters:
                parameter.grad = None
            items = list(zip(prompts, responses[name]))
            for chunk in player.micro_batches([sum(map(len, item)) for item in items]):
                (player.response_logps([items[i] for i in chunk]).sum() / len(items)).backward()
            blocks.append(torch.cat([p.grad.flatten() for p in parameters]).double())
    real, generated, likeliest = map(torch.stack, found.values())
    spin, greedy = (real - generated) / 2, (real - likeliest) / 2
    return {
        "real": squared_norm(real), "generated": squared_norm(generated), "spin": squared_norm(spin),
        "greedy": squared_norm(greedy), "real and greedy": product(real, greedy),
        "noise_real": float(size * real.var(0).sum()), "noise_spin": float(size * spin.var(0).sum()),
        "examples": size * BLOCKS,
    }  # fmt: skip


def squared_norm(blocks: Tensor) -> list[float]:
    """[|E g|^2, standard error] from independent estimates g of shape (blocks, parameters)."""
    return product(blocks, blocks)


def product(a: Tensor, b: Tensor) -> list[float]:
    """[E a . E b, standard error] from estimates of shape (blocks, parameters), independent from block to block.

    The mean product of two different blocks is unbiased; the jackknife over blocks gives its standard error, up to the
    root of 2 too large if noise prevails.
    """
    gram = (a @ b.T + b @ a.T) / 2
    n = len(gram)
    off = gram - torch.diag(gram.diagonal())
    whole = off.sum() / (n * (n - 1))
    without = (off.sum() - 2 * off.sum(1)) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return [float(whole), float(error)]
