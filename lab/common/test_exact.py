"""The claims of lab/common/exact.py, against brute force: worlds of 3 to 5 responses, other solvers, sums by hand."""
import itertools
import json
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import data
import ipo
import model
from lab.common import exact

WORLDS = [(0, 3, 0.1), (1, 4, 0.2), (2, 5, 0.5), (3, 4, 1.0)]  # seed, responses, tau


def small(seed, Y, X=2):
    """Random p* (any, intransitive or not), reference and mu: (X,Y,Y), log (X,Y), (X,Y)."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(X, Y, Y, dtype=torch.float64, generator=generator).triu(1)
    pstar = upper + (1 - upper.mT).tril(-1) + torch.eye(Y, dtype=torch.float64) / 2
    pstar.diagonal(dim1=1, dim2=2).fill_(0.5)
    ref, mu = torch.randn(2, X, Y, dtype=torch.float64, generator=generator).log_softmax(-1)
    return pstar, ref, mu.exp()


def bradley_terry(seed, Y):
    _, ref, mu = small(seed, Y)
    r = 2 * torch.randn(ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return r, (r[:, :, None] - r[:, None, :]).sigmoid(), ref, mu


def test_the_table_is_the_enumerated_policy():
    """Prefix by prefix, or every response scored alone by ipo: the same numbers and the same gradients."""
    torch.manual_seed(0)
    world = data.World("bt")
    policy = model.GPT(model.GPTConfig(*world.sizes, 1, 2, 16))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * torch.randn_like(p)
    table = exact.Table(world)(policy)
    tokens, mask = world.pairs.padded(torch.arange(world.reward.numel()))
    alone = ipo.sequence_logp(policy, tokens, mask).view_as(world.reward)
    assert torch.allclose(table, alone, atol=1e-4)
    assert torch.allclose(table.exp().sum(-1), torch.ones(len(world.prompts)), atol=1e-4)
    weights = torch.randn_like(table)
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), list(policy.parameters()))
                              for x in (table, alone))):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_table_takes_each_prefix_once():
    """A prompt's responses have 1 + 7 + 49 distinct prefixes, from which every token is predicted."""
    table = exact.Table(data.World("bt"))
    assert len(table.first) == 4 * (1 + 7 + 49)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_expected_is_the_mean_over_drawn_pairs(seed, Y, tau):
    """All ordered pairs that are not equal and both outcomes of the coin, summed by hand."""
    pstar, _, mu = small(seed, Y)
    cost = torch.randn(pstar.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for x in range(2):
        pairs = list(itertools.permutations(range(Y), 2))
        chance = [mu[x, y] * mu[x, z] for y, z in pairs]
        means = [pstar[x, y, z] * cost[x, y, z] + pstar[x, z, y] * cost[x, z, y] for y, z in pairs]
        total += sum(c * m for c, m in zip(chance, means)) / sum(chance) / 2
    assert exact.expected(cost, pstar, mu).item() == pytest.approx(float(total), abs=1e-12)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_the_minimiser_of_ipo_is_pi_star(seed, Y, tau, monkeypatch):
    """Hard labels, any preferences, any mu: eq. 7's closed form with the paper's Psi."""
    monkeypatch.setattr(ipo, "psi", lambda q: q)
    pstar, ref, mu = small(seed, Y)

    def loss(logp):
        return exact.expected(ipo.ipo_loss(exact.margins(logp, ref), torch.ones(()).double(), tau), pstar, mu)

    found = exact.minimise(loss, torch.zeros_like(ref))
    assert torch.allclose(found, data.optimum(ref, pstar, mu, tau), atol=1e-6)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_the_minimiser_of_dpo_is_pi_star_under_bradley_terry(seed, Y, tau):
    """Psi = logit in eq. 7: ref exp(r/tau), whatever mu is."""
    r, pstar, ref, mu = bradley_terry(seed, Y)

    def loss(logp):
        return -exact.expected(logsigmoid(tau * exact.margins(logp, ref)), pstar, mu)

    found = exact.minimise(loss, ref)
    assert torch.allclose(found, (ref + r / tau).log_softmax(-1), atol=1e-5)
    assert torch.allclose(found, data.optimum(ref, pstar.logit(), mu, tau), atol=1e-5)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_nash_is_a_fixed_point(seed, Y, tau):
    """pi = ref exp(E_{y'~pi} p* / tau) / Z, computed response by response."""
    pstar, ref, _ = small(seed, Y)
    logp, residual = exact.nash(ref, pstar, tau)
    assert residual <= 1e-12
    for x in range(2):
        weight = [math.exp(ref[x, y]) * math.exp((pstar[x, y] * logp[x].exp()).sum() / tau) for y in range(Y)]
        assert logp[x].exp().tolist() == pytest.approx([w / sum(weight) for w in weight], abs=1e-12)


def test_nash_converges_where_the_worlds_are_hard():
    """The three worlds at tau .1 and the base distribution as reference: residual at most 1e-12."""
    for name in data.WORLDS:
        world, ref = of_base(name)
        assert exact.nash(ref, world.pstar, 0.1)[1] <= 1e-12, name


def of_base(name):
    world = data.World(name)
    return world, (world.base + 1e-4).log().expand_as(world.reward).log_softmax(-1)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_nash_is_unique(seed, Y, tau):
    """Another solver from eight other starts: a best response that moves a little at a time, in probability."""
    pstar, ref, _ = small(seed, Y)
    logp, _ = exact.nash(ref, pstar, tau)
    starts = torch.randn(8, *ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for start in 4 * starts:
        pi, step = start.softmax(-1), 0.5 * tau
        for _ in range(3000):
            answer = (ref + exact.against(pstar, pi) / tau).softmax(-1)
            pi = (1 - step) * pi + step * answer
        assert torch.allclose(pi, logp.exp(), atol=1e-9)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_exploitability_is_what_a_best_response_gains(seed, Y, tau):
    """LBFGS finds the best response's value; nobody gains against Nash, somebody against any other policy."""
    pstar, ref, _ = small(seed, Y)
    equal, _ = exact.nash(ref, pstar, tau)
    assert abs(exact.exploitability(equal, ref, pstar, tau).item()) < 1e-12
    for other in torch.randn(4, *ref.shape, dtype=torch.float64).log_softmax(-1):
        wins = exact.against(pstar, other.exp())

        def lost(logp):
            return (logp.exp() * (tau * (logp - ref) - wins)).sum(-1).mean()

        gain = lost(other) - lost(exact.minimise(lost, ref))
        found = exact.exploitability(other, ref, pstar, tau)
        assert found > 1e-3 and torch.allclose(found, gain, atol=1e-8)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_spectral_radius_is_that_of_the_iteration(seed, Y, tau):
    """tau times the largest eigenvalue of the derivative, by autograd, of logits -> (ref + P pi / tau)."""
    pstar, ref, _ = small(seed, Y)
    logp, _ = exact.nash(ref, pstar, tau)
    radii = []
    for x in range(2):
        def step(theta):
            return (ref[x] + pstar[x] @ theta.softmax(-1) / tau).log_softmax(-1)
        jacobian = torch.autograd.functional.jacobian(step, logp[x])
        radii.append(tau * torch.linalg.eigvals(jacobian).abs().max().item())
    assert exact.spectral_radius(logp, pstar).item() == pytest.approx(max(radii), abs=1e-9)


@pytest.mark.parametrize("name, tau, converges", [
    ("bt", 0.1, True), ("cyclic", 0.1, False), ("cyclic", 0.2, True),
    ("deterministic", 0.1, False), ("deterministic", 0.5, True)])
def test_the_undamped_iteration_converges_iff_lambda_is_below_tau(name, tau, converges):
    """It starts 1e-6 from the Nash policy: its distance shrinks, or grows, as lambda / tau says."""
    world, ref = of_base(name)
    logp, _ = exact.nash(ref, world.pstar, tau)
    assert (exact.spectral_radius(logp, world.pstar) < tau) == converges
    noise = torch.randn(ref.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = (logp + 1e-6 * noise).log_softmax(-1)
    policy, distance = start, []
    for _ in range(200):
        policy = (ref + exact.against(world.pstar, policy.exp()) / tau).log_softmax(-1)
        distance.append((policy - logp).abs().max().item())
    assert (distance[-1] < 1e-8) == converges
    assert converges or max(distance) > 1e-3


def test_undamped_nash_is_that_iteration():
    """damped=False: in cyclic at tau .1 its residual stays far above 1e-12; in bt it vanishes."""
    for name, ends in (("cyclic", False), ("bt", True)):
        world, ref = of_base(name)
        _, residual = exact.nash(ref, world.pstar, 0.1, damped=False, steps=1000)
        assert (residual < 1e-12) == ends and (ends or residual > 1e-2)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_mirror_is_where_ipo_md_rests(seed, Y, tau):
    """pi is IPO's optimum against mu = pi^(1-b) ref^b; b = 0 is Nash."""
    pstar, ref, _ = small(seed, Y)
    logp, mu = exact.mirror(ref, pstar, tau, 0.5)
    assert torch.allclose((0.5 * logp + 0.5 * ref).log_softmax(-1), mu, atol=1e-10)
    assert torch.allclose(data.optimum(ref, pstar, mu.exp(), tau), logp, atol=1e-10)
    assert torch.allclose(exact.mirror(ref, pstar, tau, 0.0)[0], exact.nash(ref, pstar, tau)[0], atol=1e-10)


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_rewards_recover_bradley_terry(seed, Y, tau):
    """With its own p* the fit is the reward, up to each prompt's mean."""
    r, pstar, _, mu = bradley_terry(seed, Y)
    assert torch.allclose(exact.rewards(pstar, mu), r - r.mean(-1, keepdim=True), atol=1e-5)


def test_rewards_recover_those_of_bt():
    """400 responses, uniform mu."""
    world = data.World("bt")
    uniform = torch.full_like(world.reward, 1 / 400)
    centred = world.reward - world.reward.mean(-1, keepdim=True)
    assert (exact.rewards(world.pstar, uniform) - centred).abs().max() < 1e-3


@pytest.mark.parametrize("seed, Y, tau", WORLDS)
def test_rewards_of_intransitive_preferences_match_win_rates(seed, Y, tau):
    """The likelihood's own condition: each response wins as often as the fit says."""
    pstar, _, mu = small(seed, Y)
    r = exact.rewards(pstar, mu)
    fit = (r[:, :, None] - r[:, None, :]).sigmoid()
    w = exact.weights(mu)
    assert torch.allclose((w * pstar).sum(-1), (w * fit).sum(-1), atol=1e-7)


def test_the_program_leaves_its_figures(tmp_path, capsys):
    """`kl_ref` and `win` are recomputed from scratch."""
    assert exact.main(["--data", "cyclic", "--tau", "0.5", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    world, ref = of_base("cyclic")
    logp, _ = exact.nash(ref, world.pstar, 0.5)
    assert report["kl_ref"] == pytest.approx(((logp - ref) * logp.exp()).sum(-1).mean().item())
    joint = logp.exp()[:, :, None] / 400 * world.pstar
    assert report["win"] == pytest.approx(joint.sum((1, 2)).mean().item())
    assert report["residual"] <= 1e-12
    assert exact.main(["--tau", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
