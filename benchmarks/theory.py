"""Theory beside measurement: the sharpening exponent, the expected gradient at a start, iterates of a softmax table."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from data.examples import Example
from evaluate import Row
from player import Player
from runtime.work import Work as Run
from spin import spin_loss

# ---------------------------------------------------------------- the exponent

PROMPTS, SAMPLES = 400, 8


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


# ---------------------------------------------------------------- a softmax table


def exponents(temperature: float, beta: float, iterations: int) -> list[float]:
    """The exponents g of the iterates p_data^g, normalised, from g = 1 on: each is the optimum of SPIN on the last.

    p_{t+1} is p_t (p_data / q)^(1/beta), with q what the opponent samples from, p_t^(1/T). So g_{t+1} is
    g_t + (1 - g_t / T) / beta, which ends at T.
    """
    found = [1.0]
    for _ in range(iterations):
        found.append(found[-1] + (1 - found[-1] / temperature) / beta)
    return found


DATA = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64).log()  # of seven responses


def table_exponents(temperature: float, beta: float, iterations: int) -> list[float]:
    """The same, of a softmax table over seven responses that is trained on the expected loss of Eq. 4.7."""
    logits, found = DATA.clone(), [1.0]
    for _ in range(iterations):
        logits = played(lambda logits: logits.log_softmax(0), logits, temperature, beta)
        x, y = DATA - DATA.mean(), logits - logits.mean()
        found.append(float((x * y).sum() / (x * x).sum()))
    return found


def limited_capacity(temperature: float, beta: float, iterations: int) -> list[float]:
    """KL(p_data || p_t) less its least value, nats, of a model with one parameter for seven responses, by iterate.

    Supervised training ends at the least value. At temperature 1 the opponent's own samples have expected score 0, so
    an iterate that self-play does not change is a stationary point of supervised training, whatever the model can be.
    """
    features = torch.tensor([[0, 1, 0, 1, 0, 1, 2]], dtype=torch.float64).T

    def log_p(weights: torch.Tensor) -> torch.Tensor:
        return (features @ weights).log_softmax(0)

    def nll(weights: torch.Tensor) -> torch.Tensor:
        return -(DATA.exp() * log_p(weights)).sum()

    weights = torch.zeros(1, dtype=torch.float64)
    least, found = nll(minimised(nll, weights)), [weights]
    for _ in range(iterations):
        found.append(played(log_p, found[-1], temperature, beta))
    return [float(nll(weights) - least) for weights in found]


def played(log_p: Callable, weights: torch.Tensor, temperature: float, beta: float) -> torch.Tensor:
    """The minimiser of the expected loss of Eq. 4.7, from the opponent's `weights` on; log_p(weights): (responses,)."""
    opponent = log_p(weights).detach()
    pairs = DATA.exp()[:, None] * (opponent / temperature).softmax(0)  # probabilities of (real, generated)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        ratios = log_p(weights) - opponent
        real, generated = ratios[:, None].expand_as(pairs), ratios[None].expand_as(pairs)
        return (pairs * spin_loss(real, generated, beta)).sum()

    return minimised(loss, weights)


def minimised(loss: Callable, weights: torch.Tensor) -> torch.Tensor:
    weights = weights.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


# ---------------------------------------------------------------- the gradient

BLOCKS = 32


def gradients(player: Player, run: Run, examples: Sequence[Example]) -> Row:
    """Expected gradients over the data, estimated without bias from independent blocks of examples.

    With s(y) = grad log p(y|x), the gradient of supervised training is -E s(real), and that of Eq. 4.7 at its start,
    for beta 1 and temperature 1, is -E [s(real) - s(generated)] / 2; E s(generated) is 0. Returns [value, standard
    error] of their squared norms, and the noise of one example or pair: the trace of the gradient's covariance.
    """
    player.model.eval()
    parameters = [p for p in player.model.parameters() if p.requires_grad]
    size = len(examples) // BLOCKS
    real, generated = [], []
    for block in range(BLOCKS):
        some = examples[block * size : (block + 1) * size]
        drawn = player.respond([e.prompt_ids for e in some], run.seed(block, "gradient"))
        for found, responses in ((real, [e.real_ids for e in some]), (generated, [ids for ids, _ in drawn])):
            for parameter in parameters:
                parameter.grad = None
            items = [(e.prompt_ids, ids) for e, ids in zip(some, responses)]
            for chunk in player.micro_batches([sum(map(len, item)) for item in items]):
                (player.response_logps([items[i] for i in chunk]).sum() / len(items)).backward()
            found.append(torch.cat([p.grad.flatten() for p in parameters]).double())
    real, generated = torch.stack(real), torch.stack(generated)
    spin = (real - generated) / 2
    return {
        "real": squared_norm(real), "generated": squared_norm(generated), "spin": squared_norm(spin),
        "noise_real": float(size * real.var(0).sum()), "noise_spin": float(size * spin.var(0).sum()),
        "examples": size * BLOCKS,
    }  # fmt: skip


def squared_norm(blocks: torch.Tensor) -> list[float]:
    """[|E g|^2, standard error] from independent estimates g of shape (blocks, parameters).

    The mean product of two different blocks is unbiased; the jackknife over blocks gives its standard error, up to the
    root of 2 too large where noise prevails.
    """
    gram = blocks @ blocks.T
    n = len(gram)
    off = gram - torch.diag(gram.diagonal())
    whole = off.sum() / (n * (n - 1))
    without = (off.sum() - 2 * off.sum(1)) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return [float(whole), float(error)]
