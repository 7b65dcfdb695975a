"""The rest of the family: losses beside Eq. 4.7 of SPIN (spin.spin_loss), and mixtures in place of the opponent.

Pure functions of (B,) fp32 tensors, in nats. A *ratio* is log p_theta(response|x) - log q(response|x), summed over the
response's tokens, where q is the reference: the opponent p_t, a mixture, or, for given pairs, the start.
"""

import torch
from torch import Tensor


def hinge_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta * margin): pairs whose margin has reached 1 / beta have no gradient.

    Source: one of the losses that SPIN's Eq. 4.2 admits; as a loss on pairs SLiC-HF (arXiv 2305.10425) and RSO
    (arXiv 2309.06657).
    """
    return torch.relu(1 - beta * (real_ratios - generated_ratios))


def ipo_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2: the margin has a goal that it must not exceed, so that it stays bounded.

    Give ratios a token (each over its response's length), as the authors say they did: else the goal would depend on
    the length. Source: arXiv 2310.12036, Eq. 17, with beta for its tau.
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


def mixture_logps(opponent_logps: Tensor, base_logps: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) log p_t + alpha log p_0, the geometric mixture of the opponent and the base policy, not normalised.

    In place of log p_t it adds to self-play a KL term that keeps the player near the base policy. Its normaliser
    depends on the prompt alone, so it cancels in a margin (not in `sppo_loss`, where it shifts both ratios).
    Source: alpha-SPIN, arXiv 2404.04291; alpha 0 is SPIN, alpha 1 plays against the base policy for ever.
    """
    return (1 - alpha) * opponent_logps + alpha * base_logps
