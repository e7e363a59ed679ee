"""Claims of lab/common/exact.py, against brute force, other solvers and sums by hand."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import data
import ipo
import model
from lab.common import exact

WORLDS = [(0, 3, 0.1), (1, 4, 0.2), (2, 5, 0.5), (3, 4, 1.0)]  # seed, responses, tau
cases = pytest.mark.parametrize("seed, Y, tau", WORLDS)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def small(seed, Y, X=2):
    """Random p* (any, intransitive or not), reference and mu: (X,Y,Y), log (X,Y), (X,Y)."""
    upper = random(X, Y, Y, seed=seed).sigmoid().triu(1)
    pstar = upper + (1 - upper.mT).tril(-1)
    pstar.diagonal(dim1=1, dim2=2).fill_(0.5)
    ref, mu = random(2, X, Y, seed=seed + 100).log_softmax(-1)
    return pstar, ref, mu.exp()


def bradley_terry(seed, Y):
    _, ref, mu = small(seed, Y)
    r = 2 * random(*ref.shape, seed=seed + 200)
    pstar = (r[:, :, None] - r[:, None, :]).sigmoid()
    return r, pstar, ref, mu


def some_policy(world):
    torch.manual_seed(0)
    policy = model.GPT(model.GPTConfig(*world.sizes, 1, 2, 16))
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return policy


@pytest.fixture
def scored():
    """A policy, its table, and every response scored alone by ipo."""
    world = data.World("bt")
    policy = some_policy(world)
    rows = torch.arange(world.reward.numel())
    alone = ipo.sequence_logp(policy, *world.pairs.padded(rows))
    return policy, exact.Table(world)(policy), alone.view_as(world.reward)


def test_the_table_is_the_enumerated_policy(scored):
    _, table, alone = scored
    assert torch.allclose(table, alone, atol=1e-4)


def test_the_table_sums_to_one(scored):
    _, table, _ = scored
    assert torch.allclose(table.exp().sum(-1), torch.ones(4), atol=1e-4)


def test_the_table_has_the_gradients_of_the_enumerated_policy(scored):
    policy, table, alone = scored
    weights = torch.randn_like(table)
    parameters = list(policy.parameters())
    ours = torch.autograd.grad((table * weights).sum(), parameters)
    theirs = torch.autograd.grad((alone * weights).sum(), parameters)
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_the_table_reads_each_row_once():
    """4 prompts, followed by two of 7 words: what comes before a last word. Others are their beginnings."""
    table = exact.Table(data.World("bt"))
    assert len(table.inputs) == 4 * 49


@cases
def test_the_mean_over_pairs_is_a_sum_over_draws(seed, Y, tau):
    pstar, _, mu = small(seed, Y)
    cost = random(*pstar.shape, seed=seed)
    total = 0.0
    for x, y, z in itertools.product(range(2), range(Y), range(Y)):
        total += mu[x, y] * mu[x, z] * cost[x, y, z] / 2
    assert exact.mean_over_pairs(cost, mu).item() == pytest.approx(total.item(), abs=1e-12)


@cases
def test_weights_are_the_chances_of_pairs_that_are_not_equal(seed, Y, tau):
    _, _, mu = small(seed, Y)
    weights = exact.weights(mu)
    for x, y, z in itertools.product(range(2), range(Y), range(Y)):
        unequal = 1 - mu[x].square().sum()
        due = (y != z) * mu[x, y] * mu[x, z] / unequal
        assert weights[x, y, z].item() == pytest.approx(due.item(), abs=1e-12)


@cases
def test_the_minimiser_of_ipo_is_pi_star(seed, Y, tau):
    """Hard labels, any preferences, any mu: eq. 7's closed form with the paper's Psi."""
    pstar, ref, mu = small(seed, Y)
    certain = torch.ones((), dtype=torch.float64)

    def loss(logp):
        h = exact.margins(logp, ref)
        return exact.mean_over_pairs(pstar * ipo.ipo_loss(h, certain, tau), mu)

    found = exact.minimise(loss, torch.zeros_like(ref))
    assert torch.allclose(found, data.optimum(ref, pstar, mu, tau), atol=1e-6)


@cases
def test_the_minimiser_of_dpo_is_pi_star_under_bradley_terry(seed, Y, tau):
    """Psi = logit in eq. 7: ref exp(r/tau), whatever mu is."""
    r, pstar, ref, mu = bradley_terry(seed, Y)

    def loss(logp):
        h = exact.margins(logp, ref)
        return -exact.mean_over_pairs(pstar * logsigmoid(tau * h), mu)

    found = exact.minimise(loss, ref)
    assert torch.allclose(found, (ref + r / tau).log_softmax(-1), atol=1e-5)


@cases
def test_the_win_rate_is_a_sum_over_all_pairs(seed, Y, tau):
    pstar, ref, mu = small(seed, Y)
    total = 0.0
    for x, y, z in itertools.product(range(2), range(Y), range(Y)):
        total += ref[x, y].exp() * mu[x, z] * pstar[x, y, z] / 2
    assert exact.win(ref, pstar, mu).item() == pytest.approx(total.item())


@cases
def test_the_frontier_rises_from_the_reference(seed, Y, tau):
    pstar, ref, mu = small(seed, Y)
    kls, wins = exact.frontier(ref, pstar, mu)
    assert kls == sorted(kls)
    assert wins[0] == pytest.approx(exact.win(ref, pstar, mu).item(), abs=1e-3)


@cases
def test_the_frontier_ends_at_the_greedy_policy(seed, Y, tau):
    pstar, ref, mu = small(seed, Y)
    _, wins = exact.frontier(ref, pstar, mu)
    greedy = data.mean_over_opponents(pstar, mu).amax(-1).mean().item()
    assert wins[-1] == pytest.approx(greedy, abs=1e-4)


@cases
def test_no_policy_beats_the_frontier(seed, Y, tau):
    pstar, ref, mu = small(seed, Y)
    kls, wins = exact.frontier(ref, pstar, mu)
    for scale in (0.1, 1.0, 3.0):
        policy = (ref + scale * random(*ref.shape, seed=seed)).log_softmax(-1)
        best = np.interp(data.kl(policy, ref).item(), kls, wins)
        assert exact.win(policy, pstar, mu).item() < best + 1e-4


@cases
def test_the_optimum_of_the_identity_lies_on_the_frontier(seed, Y, tau):
    pstar, ref, mu = small(seed, Y)
    kls, wins = exact.frontier(ref, pstar, mu)
    policy = data.optimum(ref, pstar, mu, tau)
    best = np.interp(data.kl(policy, ref).item(), kls, wins)
    assert exact.win(policy, pstar, mu).item() == pytest.approx(best, abs=1e-4)


def test_noise_reverses_labels():
    """p = .8, reversed one time in four: .8 * .75 + .2 * .25."""
    assert exact.noisy(torch.tensor(0.8), 0.25).item() == pytest.approx(0.65)


@cases
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_limit_of_the_identity_is_pi_star(seed, Y, tau, labels):
    pstar, ref, mu = small(seed, Y)
    limit = exact.limit(ref, pstar, mu, tau, labels)
    assert torch.allclose(limit, data.optimum(ref, pstar, mu, tau), atol=1e-9)


@pytest.mark.parametrize("psi, labels, there", [
    (torch.logit, "soft", True),
    (lambda q: (2 * q - 1) ** 3, "soft", True),
    (lambda q: (2 * q - 1) ** 3, "hard", False),  # its odd part is not affine
    (torch.square, "soft", False)])               # Psi(q) + Psi(1-q) is no constant
def test_labels_lead_to_pi_star_if_psi_s_odd_part_suits_them(psi, labels, there, monkeypatch):
    monkeypatch.setattr(ipo, "psi", psi)
    pstar, ref, mu = small(0, 5)
    led = exact.limit(ref, pstar, mu, 0.2, labels)
    best = data.optimum(ref, psi(pstar), mu, 0.2)
    away = (led - best).abs().max().item()
    assert (away < 1e-6) == there


@cases
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_limit_minimises_the_expected_loss(seed, Y, tau, labels, monkeypatch):
    """Psi = q^3, a quarter of the labels reversed: LBFGS on ipo_loss itself, over all pairs and labels."""
    monkeypatch.setattr(ipo, "psi", lambda q: q ** 3)
    pstar, ref, mu = small(seed, Y)
    q = exact.noisy(pstar, 0.25)
    p = q if labels == "soft" else torch.ones_like(q)
    chance = torch.full_like(q, 0.5) if labels == "soft" else q  # a soft pair stands as it was drawn

    def loss(logp):
        h = exact.margins(logp, ref)
        return exact.mean_over_pairs(chance * ipo.ipo_loss(h, p, tau), mu)

    found = exact.minimise(loss, ref)
    assert torch.allclose(found, exact.limit(ref, q, mu, tau, labels), atol=1e-5)


@cases
def test_nash_is_a_fixed_point(seed, Y, tau):
    """pi = ref exp(E_{y'~pi} p* / tau) / Z, computed response by response."""
    pstar, ref, _ = small(seed, Y)
    logp, residual = exact.nash(ref, pstar, tau)
    assert residual <= 1e-12
    for x in range(2):
        weight = []
        for y in range(Y):
            wins = (pstar[x, y] * logp[x].exp()).sum()
            weight.append(math.exp(ref[x, y] + wins / tau))
        expected = [w / sum(weight) for w in weight]
        assert logp[x].exp().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["deterministic", "cyclic"])
def test_nash_converges_where_the_worlds_are_hard(name):
    world = data.World(name)
    _, residual = exact.nash(exact.of_base(world), world.pstar, 0.1)
    assert residual <= 1e-12


@cases
def test_nobody_gains_against_nash(seed, Y, tau):
    """LBFGS looks for a better answer to the Nash policy, in win rate less tau KL, and finds itself."""
    pstar, ref, _ = small(seed, Y)
    equal, _ = exact.nash(ref, pstar, tau)

    def lost(logp):
        return tau * data.kl(logp, ref) - exact.win(logp, pstar, equal.exp())

    best = exact.minimise(lost, ref)
    assert torch.allclose(best, equal, atol=1e-5)


@cases
def test_mirror_is_where_ipo_md_rests(seed, Y, tau):
    """pi is IPO's optimum against mu = pi^(1-b) ref^b, normalised."""
    pstar, ref, _ = small(seed, Y)
    logp, mu = exact.mirror(ref, pstar, tau, 0.5)
    assert torch.allclose((0.5 * logp + 0.5 * ref).log_softmax(-1), mu, atol=1e-10)
    assert torch.allclose(data.optimum(ref, pstar, mu.exp(), tau), logp, atol=1e-10)


@cases
def test_mirror_without_the_reference_is_nash(seed, Y, tau):
    pstar, ref, _ = small(seed, Y)
    mixed, _ = exact.mirror(ref, pstar, tau, 0.0)
    equal, _ = exact.nash(ref, pstar, tau)
    assert torch.allclose(mixed, equal, atol=1e-10)


@cases
def test_rewards_recover_bradley_terry(seed, Y, tau):
    """With its own p* the fit is the reward, up to each prompt's mean."""
    r, pstar, _, mu = bradley_terry(seed, Y)
    assert torch.allclose(exact.rewards(pstar, mu), r - r.mean(-1, keepdim=True), atol=1e-5)


@cases
def test_rewards_of_intransitive_preferences_match_win_rates(seed, Y, tau):
    """The likelihood's own condition: each response wins as often as the fit says."""
    pstar, _, mu = small(seed, Y)
    r = exact.rewards(pstar, mu)
    fit = (r[:, :, None] - r[:, None, :]).sigmoid()
    weights = exact.weights(mu)
    assert torch.allclose((weights * pstar).sum(-1), (weights * fit).sum(-1), atol=1e-7)
