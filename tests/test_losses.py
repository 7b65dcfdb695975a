"""methods/losses.py, the references of methods/family.py, and DFT: hand-computed numbers, and optima in closed form.

The optima are those of a softmax table of five responses, trained on the loss in expectation.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import TABLES

import sft
import spin
from methods import family, losses

# ---------------------------------------------------------------- losses, in numbers


@pytest.mark.parametrize("name", family.LOSSES)
def test_every_loss_is_a_function_of_two_ratios_and_beta(name):
    """A loss maps (B,) and (B,) to (B,) fp32 and K generated responses to K pairs; a pair's loss depends on the pair
    alone, but for IRIS, which weighs each pair by its share of the batch. The defaults are those of the options."""
    function, default = family.LOSSES[name].function, inspect.Parameter.empty
    parameters = inspect.signature(function).parameters
    required = [p for p in parameters.values() if p.default is default]
    assert len(required) == 3
    options = [option for option, loss in family.SETTINGS.items() if loss == name]
    assert all(parameters[option].default == getattr(family.FamilyOptions, option) for option in options)
    real, *generated = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    together = function(real, generated[0], 0.5)
    assert together.shape == (7,) and together.dtype == torch.float32
    assert function(real, torch.stack(generated), 0.5).shape == (3, 7)
    if name != "iris":
        alone = torch.cat([function(*pair, 0.5) for pair in zip(real.split(1), generated[0].split(1))])
        torch.testing.assert_close(together, alone)
        each = [function(real, r, 0.5) for r in generated]
        torch.testing.assert_close(function(real, torch.stack(generated), 0.5), torch.stack(each))


def test_losses_on_hand_computed_numbers():
    """The ratios are 1 and -2, so the margin is 3. The other losses are compared with float64 in test_family.py."""
    real, generated = torch.tensor([1.0]), torch.tensor([-2.0])
    assert losses.hinge_loss(real, generated, 0.25).item() == 0.25
    assert losses.hinge_loss(real, generated, 0.5).item() == 0
    assert losses.ipo_loss(real, generated, 0.25).item() == (3 - 2) ** 2
    assert losses.sppo_loss(real, generated, 0.5).item() == ((1 - 1) ** 2 + (-2 + 1) ** 2) / 2
    wins = torch.tensor([0.75]), torch.tensor([0.25])
    assert losses.sppo_loss(real, generated, 0.25, *wins).item() == ((1 - 1) ** 2 + (-2 + 1) ** 2) / 2
    assert family.mixture_logp(-2.0, -6.0, 0.25) == -3
    many = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.gsil_loss(*many, 0.7), losses.space_loss(*many, 0.7, mu=1.0))


# ---------------------------------------------------------------- losses, in closed form


def trained(loss_of, p_opponent, p_data, p_start=None):
    """A softmax table of five responses, trained on the loss in expectation over y ~ p_data, y' ~ p_opponent."""
    logits = (p_opponent if p_start is None else p_start).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], 1, 2000, 4000, 1e-13, 1e-16, line_search_fn="strong_wolfe")
    real, generated = (i.flatten() for i in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        loss = (p_data[real] * p_opponent[generated] * loss_of(logp, real, generated)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def normalised(p):
    return p / p.sum()


def of_ratios(loss, reference, *args):
    """A loss of log-ratios to `reference` for `trained`; without one, of log-probabilities."""
    q = torch.zeros(5, dtype=torch.float64) if reference is None else reference.log()
    return lambda logp, i, j: loss((logp - q)[i], (logp - q)[j], *args)


def is_optimum(found, expected, atol=1e-5):
    torch.testing.assert_close(found, normalised(expected), atol=atol, rtol=0)


P_0 = torch.tensor([0.3, 0.1, 0.1, 0.4, 0.1], dtype=torch.float64)
UNIFORM = torch.full((5,), 0.2, dtype=torch.float64)


@pytest.mark.parametrize("alpha, beta", [(0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.3, 3.0), (1.0, 1.0)])
def test_minimiser_of_spin_and_of_alpha_spin(alpha, beta):
    """The minimiser is proportional to q (p_data / p_t)^(1/beta) with q = p_t^(1 - alpha) p_0^alpha, whose normaliser
    cancels: without alpha one step leads to the data at beta = 1."""
    p_data, p_t = TABLES
    q = family.mixture_logp(p_t.log(), P_0.log(), alpha).exp()
    is_optimum(trained(of_ratios(spin.spin_loss, q, beta), p_t, p_data), q * (p_data / p_t) ** (1 / beta))


@pytest.mark.parametrize("p_data", [TABLES[0], P_0])
def test_ditto_balances_its_three_kinds_of_pairs(p_data):
    """At the minimiser each response wins and loses as much. p_data is no fixed point: when all write like the data,
    the player is drawn back to the start."""
    equal, beta = p_data is P_0, 0.7
    p_start, p_t, p_old = (UNIFORM, P_0, P_0) if equal else (P_0, TABLES[1], UNIFORM)
    shares = zip(family.DITTO_SHARES, ((p_data, p_t), (p_data, p_old), (p_t, p_old)))
    weights = sum(share * torch.outer(better, worse) for share, (better, worse) in shares)
    loss = of_ratios(spin.spin_loss, p_start, beta)
    found = trained(lambda logp, i, j: weights[i, j] / (p_data[i] * p_t[j]) * loss(logp, i, j), p_t, p_data)
    rewards = beta * (found / p_start).log()
    pulls = weights * torch.sigmoid(rewards[None] - rewards[:, None])
    torch.testing.assert_close(pulls.sum(0), pulls.sum(1), atol=1e-6, rtol=0)
    if equal:
        is_optimum(found, p_start)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_minimiser_of_fictitious_play(beta):
    """The minimiser, for ratios to the newest of three averaged opponents, is p_t (p_data / average)^(1/beta)."""
    p_data, p_t = TABLES
    average = (p_t + p_data.flip(0) + UNIFORM) / 3
    expected = p_t * (p_data / average) ** (1 / beta)
    is_optimum(trained(of_ratios(spin.spin_loss, p_t, beta), average, p_data, p_t), expected)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_minimiser_of_ipo(beta):
    """The minimiser is p_t exp(D s), normalised, with s = (p_data - p_t) / (p_data + p_t), D = 1 / (beta (2 + K)) and
    K = sum (p_data - p_t)^2 / (p_data + p_t): a least-squares problem, solved by hand."""
    p_data, p_t = TABLES
    s = (p_data - p_t) / (p_data + p_t)
    K = ((p_data - p_t) ** 2 / (p_data + p_t)).sum()
    found = trained(of_ratios(losses.ipo_loss, p_t, beta), p_t, p_data)
    is_optimum(found, p_t * torch.exp(s / (beta * (2 + K))), atol=1e-6)


@pytest.mark.parametrize("wins", [(1.0, 0.0), (0.8, 0.35)])
def test_minimiser_of_sppo(wins):
    """The problem is convex, so its minimiser is the table at which, for the ratio f of every response and one mu,
    (p_data + p_t) f - p_data g - p_t g' + mu p_t exp(f) = 0, with the goals g, g' of the two sides."""
    p_data, p_t = TABLES
    beta = 0.8
    found = trained(of_ratios(losses.sppo_loss, p_t, beta, *wins), p_t, p_data)
    goals = [(p - 0.5) / beta for p in wins]
    mu = (p_data * goals[0] + p_t * goals[1] - (p_data + p_t) * (found / p_t).log()) / found
    assert mu.max() - mu.min() < 1e-5 and (found - p_t).abs().max() > 0.02


def test_hinge_without_a_finite_optimum_still_points_to_the_data():
    """If no pair has reached its margin, the loss is linear: its gradient is beta times the supervised one's
    difference to the opponent, p_t - p_data in the logits."""
    p_data, p_t = TABLES
    logits = p_t.log().requires_grad_()
    ratios = logits.log_softmax(0) - p_t.log()
    weights = p_data[:, None] * p_t
    (weights * losses.hinge_loss(ratios[:, None], ratios[None], 0.5)).sum().backward()
    torch.testing.assert_close(logits.grad, 0.5 * (p_t - p_data))


@pytest.mark.parametrize("p_t", [TABLES[1], TABLES[0].flip(0), UNIFORM])
@pytest.mark.parametrize(
    "loss, more",
    [
        *((losses.space_loss, [mu]) for mu in (0.5, 1.0, 4.0)),
        *((losses.gsil_loss, [form]) for form in losses.GSIL_FORMS),
    ],
)
def test_minimiser_of_space_and_gsil_is_the_data_whatever_the_opponent(loss, more, p_t):
    """One iteration leads to p_data at beta 1, and not at another beta, where p_data against itself stays optimal."""
    p_data = TABLES[0]
    is_optimum(trained(of_ratios(loss, p_t, 1.0, *more), p_t, p_data), p_data, atol=1e-6)
    if more == [4.0]:
        assert (trained(of_ratios(loss, p_t, 2.0, *more), p_t, p_data) - p_data).abs().max() > 0.02
        is_optimum(trained(of_ratios(loss, p_data, 2.0, *more), p_data, p_data, p_t), p_data, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_spif_is_sppo_and_leads_to_the_data(beta):
    """SPIF is SPPO's hard form at beta / 2. Rewards of one step are within [-1, 1] on average; many end at p_data."""
    p_data, p_t = TABLES
    reward = ((p_data - p_t) / (p_data + p_t)).requires_grad_()  # the best free reward: 1 - chi^2 to the mixture
    value = (p_data[:, None] * p_t * losses.spif_loss(reward[:, None] / beta, reward[None] / beta, beta)).sum()
    assert torch.autograd.grad(value, reward)[0].abs().max() < 1e-12
    mixture = (p_data + p_t) / 2
    torch.testing.assert_close(value, 1 - ((p_data - mixture) ** 2 / mixture).sum())
    distances = []
    for _ in range(40):
        before = p_t
        p_t = trained(of_ratios(losses.spif_loss, before, beta), before, p_data)
        assert (beta * (p_t / before).log()).abs().max() < 1.1
        distances.append((p_t - p_data).abs().max().item())
    assert distances[0] > 0.02 and distances[-1] < 1e-3 * distances[0]


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_minimiser_of_tspin_is_not_the_data(beta):
    """With current advantages alone the minimiser is (p_data / p_t)^(1/beta): uniform if the opponent writes like the
    data. From iteration to iteration log p_data / (1 + beta) is reached if beta is above 1; below, players swing."""
    p_data, p_t = TABLES
    loss = of_ratios(losses.tspin_loss, None, beta)
    is_optimum(trained(loss, p_t, p_data), (p_data / p_t) ** (1 / beta))
    is_optimum(trained(loss, p_data, p_data), UNIFORM)
    goal, player = normalised(p_data ** (1 / (1 + beta))), p_t
    distances = []
    for _ in range(30 if beta > 1 else 7):
        player = normalised((p_data / player) ** (1 / beta))
        distances.append((player - goal).abs().max().item())
    assert distances[-1] < 1e-7 if beta > 1 else distances[-1] > distances[0] > 0.1


def test_the_historical_advantage_balances_three_distributions():
    """At the minimum, of all triplets with weights s(-beta * advantage), what raises a response equals what lowers it:
    checked without autograd. Against p_data itself the optimum is still not p_data."""
    p_data = TABLES[0]
    beta, historical = 0.8, 0.7
    for p_t in (TABLES[1], p_data):

        def loss(logp, i, j, p_t=p_t):  # The start's response is in expectation.
            terms = [P_0[k] * losses.tspin_loss(logp[i], logp[j], beta, logp[k], historical) for k in range(5)]
            return torch.stack(terms).sum(0)

        logp = trained(loss, p_t, p_data).log()
        pull = torch.sigmoid(-beta * (logp[:, None] - logp))  # (better, worse)
        flow = p_data[:, None] * p_t * pull + historical * p_t[:, None] * P_0 * pull
        torch.testing.assert_close(flow.sum(1), flow.sum(0), atol=1e-6, rtol=0)
        assert (logp.exp() - p_data).abs().max() > 0.05


def renyi(p, q, order):
    """The Renyi divergence of p from q, nats, with its limits; at 0 over the order it is KL(q, p)."""
    if order == 1:
        return (p * (p / q).log()).sum()
    return (p**order * q ** (1 - order)).sum().log() / (order - 1)


def batch_of(p):
    """Twenty responses with the frequencies p: the means of IRIS over them are expectations."""
    return torch.arange(5).repeat_interleave((20 * p).round().long())


def iris_in_expectation(real, generated, p_data, p_t, beta, order):
    return losses.iris_loss(real[batch_of(p_data)], generated[batch_of(p_t)], beta, order).mean()


@pytest.mark.parametrize("order, beta", [(0.0, 1.0), (0.3, 2.0), (1.0, 2.0), (2.0, 1.0), (3.0, 2.0)])
def test_minimiser_of_iris(order, beta):
    """p_t (p_data / p_t)^(1/beta) is best for every order; its value is minus the Renyi divergence over the order."""
    p_data, p_t = TABLES

    def value(logp):
        ratios = logp - p_t.log()
        return iris_in_expectation(ratios, ratios, p_data, p_t, beta, order)

    optimum = normalised(p_t * (p_data / p_t) ** (1 / beta))
    is_optimum(trained(lambda logp, i, j: value(logp).expand(25), p_t, p_data), optimum)
    expected = -renyi(p_data, p_t, order) / order if order else -renyi(p_t, p_data, 1)
    torch.testing.assert_close(value(optimum.log()), expected, atol=1e-9, rtol=0)
    if order == 2:
        chi_squared = ((p_data - p_t) ** 2 / p_t).sum()
        torch.testing.assert_close(expected, -torch.log1p(chi_squared) / 2)


def test_limits_of_iris():
    """Far from both distributions, the gradient is compared with those of the losses that the paper calls its limits.

    At order 1 the gradient is SPACE's with mu to infinity, the supervised one: p_theta - p_data in the logits, not that
    of Eq. 4.7 at any beta, and generated responses do not have equal weights. At order 0 the gradient is SPACE's with
    mu to 0, apart from a factor on the real side. If the player is the opponent, all gradients point the same way.
    """
    p_data, p_t = TABLES
    p_theta = torch.tensor([0.15, 0.35, 0.2, 0.2, 0.1], dtype=torch.float64)

    def gradients(loss_of, at):
        """Gradients by the log-probabilities of the responses as real and as generated ones, and by the logits."""
        real, generated, logits = (at.log().clone().requires_grad_() for _ in range(3))
        sides = torch.autograd.grad(loss_of(real, generated), [real, generated])
        logp = logits.log_softmax(0)
        return *sides, *torch.autograd.grad(loss_of(logp, logp), [logits])

    def pairs(loss, *args):
        weights, q = p_data[:, None] * p_t, p_t.log()
        return lambda real, generated: (weights * loss((real - q)[:, None], (generated - q)[None], *args)).sum()

    def iris(order):
        return lambda real, fake: iris_in_expectation(real - p_t.log(), fake - p_t.log(), p_data, p_t, 1.0, order)

    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=0).item()

    one, large = gradients(iris(1.0), p_theta), gradients(pairs(losses.space_loss, 1.0, 1e8), p_theta)
    for a, b in zip(one, large):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(one[2], p_theta - p_data)
    torch.testing.assert_close(one[1], p_t * (p_theta / p_t))  # Equal weights would give p_t.
    zero, small = gradients(iris(0.0), p_theta), gradients(pairs(losses.space_loss, 1.0, 1e-8), p_theta)
    assert cosine(zero[0], 1e8 * small[0]) == pytest.approx(1) and cosine(zero[1], 1e8 * small[1]) == pytest.approx(1)
    for beta in (1e-3, 0.1, 1.0, 5.0):
        assert cosine(one[2], gradients(pairs(spin.spin_loss, beta), p_theta)[2]) < 0.995
    everything = [iris(order) for order in (0.0, 0.5, 1.0, 2.0)]
    everything += [pairs(loss, 1.0) for loss in (spin.spin_loss, losses.space_loss, losses.spif_loss)]
    for loss_of in everything:
        assert cosine(gradients(loss_of, p_t)[2], p_t - p_data) == pytest.approx(1)


# ---------------------------------------------------------------- the opponent's true distribution


@pytest.mark.parametrize("temperature, beta", [(0.7, 2.0), (1.5, 1.0), (1.5, 0.5)])
def test_minimisers_with_either_reference_of_a_tempered_opponent(beta, temperature):
    """y' is from q, p_t at a temperature. Reference p_t gives p_t (p_data / q)^(1/beta), which for p_t = p_data is
    p_t^(1 + (1 - 1/T) / beta): a hot opponent sharpens for ever. Reference q gives q (p_data / q)^(1/beta), then
    p_t^(1 + (1 - 1/T) (1/beta - 1)): p_data at beta 1."""
    p_data = TABLES[0]
    for p_t in (TABLES[1], p_data):
        q = normalised(p_t ** (1 / temperature))
        plain, sampled = (trained(of_ratios(spin.spin_loss, reference, beta), q, p_data) for reference in (p_t, q))
        is_optimum(plain, p_t * (p_data / q) ** (1 / beta))
        is_optimum(sampled, q * (p_data / q) ** (1 / beta))
        if p_t is p_data:
            power = (1 - 1 / temperature) / beta
            is_optimum(plain, p_t ** (1 + power))
            is_optimum(sampled, p_t ** (1 + power * (1 - beta)))


# ---------------------------------------------------------------- supervised training and DFT


def after_steps(loss: str, start, p_data, steps: int):
    """The table after steps of gradient descent at rate 1 on sft.py's own loss in expectation."""
    logits = start.log().requires_grad_()
    examples = [SimpleNamespace(prompt_ids=[], real_ids=[i]) for i in range(5)]
    table = SimpleNamespace(
        response_logps=lambda items: [logits.log_softmax(0)], token_logps=lambda items: [logits.log_softmax(0)[:, None]]
    )
    loss_of = sft.token_loss(table, examples, loss)
    for _ in range(steps):
        logits.grad = None
        (p_data * loss_of(examples)["loss"]).sum().backward()
        with torch.no_grad():
            logits -= logits.grad
    return logits.detach().softmax(0)


def test_dft_ends_at_the_likeliest_response_and_hardly_learns_an_unlikely_one():
    """DFT's gradient is that of minus the mean probability of the real responses, sum p_data p. So all probability ends
    on the likeliest, and the NLL rises without bound: from p_data at once, from a flatter start after a fall. A
    response that the start wrongly thinks unlikely has a small gradient; supervised training learns it."""
    p_data, start = TABLES
    logits = start.log().requires_grad_()
    (gradient,) = torch.autograd.grad(-(p_data * logits.softmax(0)).sum(), logits)
    torch.testing.assert_close((after_steps("dft", start, p_data, 1) / start).log().diff(), -gradient.diff())
    uniform, later, last = (after_steps("dft", UNIFORM, p_data, steps) for steps in (0, 20, 1000))
    assert last.argmax() == p_data.argmax() and last.max() > 0.99
    best, near, *nlls = (-(p_data * p.log()).sum() for p in (p_data, after_steps("dft", p_data, p_data, 20), uniform))
    nlls += [-(p_data * p.log()).sum() for p in (later, last)]
    assert near > best and nlls[1] < nlls[0] < nlls[2]
    is_optimum(after_steps("nll", UNIFORM, p_data, 1000), p_data)
    unlikely = normalised(torch.tensor([1e-4, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    dft, supervised = (after_steps(loss, unlikely, p_data, 100)[0] for loss in ("dft", "nll"))
    assert dft < 1e-3 and supervised > 0.35
