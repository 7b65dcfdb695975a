"""The losses of self-play fine-tuning and of its relatives. They need torch alone, so this file can be copied.

All are functions of (real_ratios, generated_ratios, beta); SPIN's own, Eq. 4.7, is in spin.py. A ratio is
log p_theta(response|x) - log q(response|x) in nats, summed over the response's tokens, where q is the reference.

Shapes: real_ratios (B,); generated_ratios (B,), or (K, B) for K responses to each prompt; the result has the shape of
generated_ratios. Probabilities and log-probabilities of the responses broadcast to these.

Optimum: what a player with enough capacity reaches in one iteration, for y from p_data and y' from p_t = q. Each was
reached by a trained softmax table (tests/test_losses.py). "Source" also says if the equation does not come from the
paper's own text but from a summary of it, or was derived from what its abstract states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta * margin): pairs whose margin has reached 1 / beta have no gradient.

    Source: one of the losses that SPIN's Eq. 4.2 admits; as a loss on pairs SLiC-HF (arXiv 2305.10425) and RSO
    (arXiv 2309.06657).
    """
    return torch.relu(1 - beta * (real_ratios - generated_ratios))


def ipo_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2: the margin has a goal that it must not exceed, so it stays bounded.

    Divide each ratio by its response's length in tokens first, as the authors say they did: otherwise the goal would
    depend on the length. Source: arXiv 2310.12036, Eq. 17, with beta for its tau.
    """
    return (real_ratios - generated_ratios - 1 / (2 * beta)) ** 2


def sppo_loss(
    real_ratios: Tensor,
    generated_ratios: Tensor,
    beta: float,
    real_wins: Tensor | float = 1.0,
    generated_wins: Tensor | float = 0.0,
) -> Tensor:
    """Half the sum of (ratio - (P - 1/2) / beta)^2 over both responses: each ratio has a goal of its own.

    P, in [0, 1], is the probability that a response is preferred to one of the opponent's; 1 and 0 are the `hard` form.
    Source: arXiv 2405.00675, Eq. 4.7, with 1 / beta for its eta; halved as in the authors' code.
    """
    real = (real_ratios - (real_wins - 0.5) / beta) ** 2
    generated = (generated_ratios - (generated_wins - 0.5) / beta) ** 2
    return (real + generated) / 2


def space_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float, mu: float = 1.0) -> Tensor:
    """-log s(beta * ratio) - mu log(1 - s(beta * ratio')), s(x) = 1 / (1 + mu exp(-x)): noise-contrastive estimation.

    Real and generated responses are classified each on its own, s being the probability that a response is real if
    there are mu generated ones per real one. So the size of each ratio matters, not the margin alone.
    Optimum at the paper's beta of 1: p_data, whatever the opponent and mu. Another beta scales the ratio as in the
    other losses; its goal log(p_data / p_t) / beta is then no log-ratio of two distributions, and met approximately.
    Source: SPACE, arXiv 2512.07175; found in a summary, and the same as the abstract's "binary classification".
    """
    log_mu = real_ratios.new_tensor(mu).log()
    return F.softplus(log_mu - beta * real_ratios) + mu * F.softplus(beta * generated_ratios - log_mu)


GSIL_FORMS = {  # losses of a real and of a generated response with reward R
    "bernoulli": (lambda R: F.softplus(-R), F.softplus),
    "brier": (lambda R: torch.sigmoid(-R) ** 2, lambda R: torch.sigmoid(R) ** 2),
    "kliep": (torch.neg, torch.exp),
    "lsif": (lambda R: -torch.exp(R), lambda R: torch.exp(2 * R) / 2),
}


def gsil_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float, form: str = "bernoulli") -> Tensor:
    """Self-imitation: an estimate of the density ratio p_data / p_t, whose logarithm is the reward R = beta * ratio.

    bernoulli: logistic classification, which is SPACE's loss at mu 1. brier: its squares, which are bounded, so that
    wrong labels weigh less. kliep: exponentials, E_t exp(R) - E_data R, the variational form of the KL divergence.
    lsif: squares of the density ratio itself. Gradients grow like exp(R) for kliep's generated and lsif's real
    responses, and like exp(2 R) for lsif's generated ones, so a few responses can dominate a batch.
    Optimum: as of SPACE, p_data at beta 1 for every form.
    Source: GSIL, arXiv 2410.10093; the forms are those of the authors' code, which adds a constant to R.
    """
    of_real, of_generated = GSIL_FORMS[form]
    return of_real(beta * real_ratios) + of_generated(beta * generated_ratios)


def spif_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """((1 - R)^2 + (1 + R')^2) / 2 with the reward R = beta * ratio: rewards are drawn to 1 and -1, and stay bounded.

    This is hard SPPO at beta / 2, times beta^2. As adversarial imitation it is 1 - E [R - R' - (R^2 + R'^2) / 2]; that
    mean is largest at R = (p_data - p_t) / (p_data + p_t), a chi-squared divergence between the data and the mixture.
    Optimum: as near to that as beta times a log-ratio can be, so a step towards p_data, and p_data once p_t is p_data.
    Source: SPIF, arXiv 2602.01357. Its equations were not found; derived from the abstract (chi-squared variational
    objective, bounded reward) and from LS-IQ, arXiv 2303.00599, on which it builds.
    """
    return beta**2 * sppo_loss(real_ratios, generated_ratios, beta / 2)


def tspin_loss(
    real_logps: Tensor,
    generated_logps: Tensor,
    beta: float,
    start_logps: Tensor | None = None,
    historical: float = 1.0,
) -> Tensor:
    """l(beta * [real - generated]) + historical * l(beta * [generated - start]), of plain log-probabilities.

    A triplet: y from the data, y' from the opponent, y0 from the start theta_0, with the logistic loss l. The second
    term, the historical advantage, is not lost when y' becomes as good as y. An entropy term of the opponent's in place
    of the KL to p_t leaves no reference: q = 1. In the first iteration y0 is y' and the second term has no gradient:
    `start_logps` is None. The paper writes alpha for beta, and beta for historical.

    Optimum without the second term: proportional to (p_data / p_t)^(1/beta). So p_data is no fixed point: against an
    opponent that writes like the data, current advantages are best if all responses are equally likely. With small
    steps that shows late; training each iteration to its optimum swings for any beta up to 1.
    Source: T-SPIN, arXiv 2601.08198; found in a summary.
    """
    loss = F.softplus(-beta * (real_logps - generated_logps))
    if start_logps is not None:
        loss = loss + historical * F.softplus(-beta * (generated_logps - start_logps))
    return loss


def iris_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float, order: float = 0.5) -> Tensor:
    """(1 / order) log E exp(order R') - (1 / (order - 1)) log E exp((order - 1) R), with R = beta * ratio.

    The variational form of the Renyi divergence between data and opponent: two risks, each tilted by exponential
    weights over the given batch. The mean of the result is the objective. Above order 1 real responses with a large
    reward weigh most, below it those with a small one; of generated responses always those with a large one. At 1 the
    first risk is a plain mean, at 0 the second.
    Optimum: proportional to p_t (p_data / p_t)^(1/beta), p_data at the paper's beta of 1, for every order; there the
    objective is -R_order / order, with R_order the Renyi divergence of p_data from p_t.
    As tested: order 1 is the KL divergence, with the gradient of SPACE with a large mu and of supervised training (in
    expectation), not that of SPIN's logistic loss; 0 is SPACE with a small mu. At 2 the objective is
    -log(1 + chi^2) / 2, with the chi-squared divergence of p_data from p_t.
    Source: IRIS, arXiv 2604.20933, of which a summary names the two risks' weights; the factors are those of the
    variational form (Birrell et al., arXiv 2007.03814).
    """
    return tilted_risk(beta * generated_ratios, order) - tilted_risk(beta * real_ratios, order - 1)


def tilted_risk(rewards: Tensor, tilt: float) -> Tensor:
    """Terms whose mean has the value and gradient of (1 / tilt) log mean exp(tilt * reward), at tilt 0 mean reward."""
    if tilt == 0:
        return rewards
    log_mean = (tilt * rewards).detach().flatten().logsumexp(0) - rewards.new_tensor(rewards.numel()).log()
    return (log_mean + torch.expm1(tilt * rewards - log_mean)) / tilt
