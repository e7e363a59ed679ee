"""Claims of lab/methods/online.py, selfplay.py and family.py: which pairs are drawn, where training rests, what is
shown.
"""
import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import data
import ipo
import model
from lab.common import exact
from lab.methods import family, online, selfplay

WORDS = (["superb", "dull", "hot"], 2)  # 13 responses
FAST = ["--steps", "300", "--sft_steps", "40", "--pairs", "4000", "--lr", "6e-3", "--batch_size", "128",
        "--log_every", "150"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Both worlds with 13 responses."""
    for name in ("bt", "deterministic"):
        monkeypatch.setitem(data.WORLDS, name, WORDS)


def far_from(world, seed):
    """A policy nowhere near uniform, whose next word depends on the one before."""
    torch.manual_seed(seed)
    policy = model.GPT(model.GPTConfig(*world.sizes, 1, 4, 32))
    for weight in policy.parameters():
        weight.data *= 8 if weight.dim() == 2 else 1
    return policy


def setting(*flags):
    """Flags, a world whose ref is far from the policy, the policy, a generator."""
    args = online.flags(["--out", "nowhere", *flags])
    world = data.World(args.data)
    world.ref = exact.Table(world)(far_from(world, 1)).detach().double()
    return args, world, far_from(world, 2), torch.Generator().manual_seed(0)


def unlikely(counts, law):  # (X,Y,Y), (X,Y,Y) -> how many deviations Pearson's statistic is from its mean
    """Cells with less than 5 expected are pooled."""
    expected = law * counts.sum((1, 2), keepdim=True)
    large = expected >= 5
    seen = torch.cat([counts[large], counts[~large].sum()[None]])
    ours = torch.cat([expected[large], expected[~large].sum()[None]]).clamp(min=1e-9)
    freedom = len(seen) - 1 - len(counts)
    return (((seen - ours) ** 2 / ours).sum().item() - freedom) / (2 * freedom) ** 0.5


def counted(batch, shape):
    """(X,Y,Y) how often each ordered pair of responses stands in a batch of a world; from its token rows."""
    world = data.World("bt")
    rows = {tuple(row): i for i, row in enumerate(world.pairs.padded(torch.arange(shape.numel()))[0].tolist())}
    found = torch.tensor([rows[tuple(row)] for row in batch.tokens.tolist()])
    first, second = found.chunk(2)
    X, Y = shape
    assert (first // Y == second // Y).all(), "a pair has one prompt"
    return torch.bincount(first * Y + second % Y, minlength=X * Y * Y).view(X, Y, Y).double(), found


@pytest.mark.parametrize("pairs_from", ["mu", "policy", "mixture"])
def test_a_pair_is_two_independent_draws_from_its_mu(pairs_from):
    """Pearson's statistic of 40,000 pairs against mu(y) mu(y') / P(y != y'); a token-wise mixture is far off."""
    args, world, policy, generator = setting("--pairs_from", pairs_from, "--b", "0.4", "--labels", "soft",
                                             "--batch_size", "40000")
    pi, ref = exact.Table(world)(policy).detach().double(), world.ref
    fixed = far_logp = exact.Table(world)(far_from(world, 3)).detach().double()
    geometric = pi.exp() ** 0.6 * ref.exp() ** 0.4
    laws = {"mu": far_logp.exp(), "policy": pi.exp(), "mixture": geometric / geometric.sum(-1, keepdim=True)}
    batch, ref_logp = next(online.batches(policy, world, world.pstar, fixed, args, generator))
    counts, rows = counted(batch, pi.shape)
    assert abs(unlikely(counts, exact.weights(laws[pairs_from]))) < 4
    for name, law in laws.items():
        assert name == pairs_from or unlikely(counts, exact.weights(law)) > 20
    token_wise = exact.Table(world)(TokenMixture(policy, far_from(world, 1))).detach().double()
    assert unlikely(counts, exact.weights(token_wise.exp())) > 10
    assert torch.allclose(ref_logp.double(), ref.flatten()[rows], atol=1e-5), "the reference's, row by row"
    assert torch.allclose(batch.p.double(), world.pstar.flatten()[(rows[:40000] * 13 + rows[40000:] % 13)])


class TokenMixture(torch.nn.Module):
    """.6 of one model's logits and .4 of another's: the mixture token by token, not over whole responses."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def hidden(self, tokens, wanted=None):
        return torch.cat([self.one.hidden(tokens, wanted), self.other.hidden(tokens, wanted)], -1)

    def head(self, x):
        one, other = x.chunk(2, -1)
        return 0.6 * self.one.head(one).log_softmax(-1) + 0.4 * self.other.head(other).log_softmax(-1)


def test_the_sampler_follows_the_policy_and_the_judge_and_carries_no_gradient():
    """The next batch comes from the changed policy; the first wins as often as the judge, not the world, says."""
    args, world, policy, generator = setting("--batch_size", "40000")
    judge, recorded, hidden = 1 - world.pstar, [], policy.hidden

    def watched(*of):
        recorded.append(torch.is_grad_enabled())
        return hidden(*of)

    policy.hidden = watched
    pairs = online.batches(policy, world, judge, None, args, generator)
    for seed in (5, 6):
        policy.load_state_dict(far_from(world, seed).state_dict())
        batch, ref_logp = next(pairs)
        counts, _ = counted(batch, world.reward.shape)
        mu = exact.Table(world)(policy).detach().double().exp()
        law = 2 * exact.weights(mu) * judge  # a coin flip puts the winner first
        assert abs(unlikely(counts, law)) < 4
        assert (batch.p == 1).all() and not ref_logp.requires_grad
    assert recorded == [False, True, False, True], "the sampler's reading, this test's, and again"


def test_nash_is_where_the_gradient_without_the_sampler_vanishes():
    """Float64 autograd on the exact mean over pairs; with the gradient through mu = pi it does not vanish there."""
    world, tau = data.World("deterministic"), 0.2
    ref = torch.randn(world.reward.shape, dtype=torch.float64).log_softmax(-1)

    def slope(logp, frozen):  # at log pi, of E over y, y' ~ pi and the label
        theta = logp.clone().requires_grad_()
        pi = theta.log_softmax(-1)
        mu = pi.exp().detach() if frozen else pi.exp()
        h = exact.margins(pi, ref)
        cost = world.pstar * (h - 0.5 / tau) ** 2
        (2 * mu[:, :, None] * mu[:, None, :] * cost).sum((1, 2)).mean().backward()
        return theta.grad

    equal, _ = exact.nash(ref, world.pstar, tau)
    assert slope(equal, True).abs().max() < 1e-12 < 1e-3 < slope(equal, False).abs().max()
    pi = torch.randn(ref.shape, dtype=torch.float64).log_softmax(-1)
    f, g = pi - ref, exact.against(world.pstar, pi.exp())
    centred = f - g / tau - (pi.exp() * (f - g / tau)).sum(-1, keepdim=True)
    assert torch.allclose(slope(pi, True), 4 / len(pi) * pi.exp() * centred, atol=1e-12), "methods: mu(y) [...]"


@pytest.mark.parametrize("flags", [["--noise", "0.1"], ["--labels", "soft"], ["--labels", "soft", "--noise", "0.2"]])
def test_what_labels_ask_for_is_the_mean_over_their_coin_flips(flags, monkeypatch):
    """Both coins of every pair enumerated, with a Psi that is not affine."""
    monkeypatch.setattr(ipo, "psi", lambda q: q ** 3)
    args = online.flags(["--out", "nowhere", *flags])
    p, noise, tau = data.World("bt").pstar, args.noise, args.tau
    if args.labels == "soft":
        q = p * (1 - noise) + (1 - p) * noise  # as the core's soft labels
        mean = (q ** 3 - (1 - q) ** 3) / (2 * tau)
    else:
        asks = 1 / (2 * tau)
        mean = sum(w * side * asks for w, side in
                   [(p * (1 - noise), 1), (p * noise, -1), ((1 - p) * noise, 1), ((1 - p) * (1 - noise), -1)])
    assert torch.allclose(online.asked(p, args), tau * mean)


def test_dpo_needs_labels_that_are_bradley_terrys():
    args = online.flags(["--out", "nowhere", "--loss", "dpo"])
    bt = data.World("bt")
    gap = bt.reward[:, :, None] - bt.reward[:, None, :]
    assert torch.allclose(online.asked(bt.pstar, args), gap, atol=1e-3)
    for name in ("cyclic", "deterministic"):
        with pytest.raises(ipo.Refused, match="Bradley-Terry"):
            online.asked(data.World(name).pstar, args)


def test_rejection_draws_from_the_tilted_reference_a_pools_maximum_does_not():
    """400,000 candidates: shares within 5 deviations of ref exp(r/beta)/Z; keeping by a pool of 8's own maximum is
    beyond 20. --from_ref adds the reference."""
    args, world, _, generator = setting("--pairs_from", "rejection", "--beta", "0.4", "--pairs", "400000")
    ref, r = world.ref, world.reward
    law = (ref + r / 0.4).softmax(-1)
    accepted = (ref.exp() * ((r - r.amax(-1, keepdim=True)) / 0.4).exp()).sum(-1, keepdim=True)
    deviation = (law / (args.pairs * accepted)).sqrt()
    shares = online.pool(ref, r, args, generator).exp()
    assert ((shares - law) / deviation).abs().max() < 5
    args.from_ref = 0.25
    assert torch.allclose(online.pool(ref, r, args, generator).exp(), 0.75 * law + 0.25 * ref.exp(), atol=0.01)
    y = torch.multinomial(ref.exp(), args.pairs, replacement=True, generator=generator).view(4, -1, 8)
    worth = r.gather(1, y.flatten(1)).view(y.shape)
    keep = torch.rand(y.shape, generator=generator) < ((worth - worth.amax(-1, keepdim=True)) / 0.4).exp()
    pooled = torch.zeros_like(ref).scatter_add(1, y.flatten(1), keep.flatten(1).double())
    pooled = pooled / pooled.sum(-1, keepdim=True)
    assert ((pooled - law) / deviation).abs().max() > 20


def test_a_temperature_that_accepts_nothing_is_refused():
    args, world, _, generator = setting("--pairs_from", "rejection", "--beta", "1e-6", "--pairs", "1")
    world.reward[:, 0] = 9  # ref gives it little
    world.ref[:, 0] = -99
    with pytest.raises(ipo.Refused, match="beta"):
        online.pool(world.ref, world.reward, args, generator)


def finished(tmp_path, program, name, *flags):
    """report.json of a run of this program in the tiny deterministic world."""
    out = f"{tmp_path}/{name}"
    assert program.main(["--out", out, "--data", "deterministic", *FAST, *flags]) == 0
    with open(f"{out}/report.json") as file:
        return json.load(file)


@pytest.mark.parametrize("pairs_from", ["policy", "mixture", "rejection", "mu"])
def test_training_rests_at_its_own_answer(tmp_path, pairs_from):
    """Near the exact answer, at least 5 times as near as to the farther of Nash and offline optimum."""
    report = finished(tmp_path, online, pairs_from, "--pairs_from", pairs_from, "--tau", "0.3", "--labels", "soft")
    assert report["kl"] == report["kl_answer"] < 0.01 < report["before"]["kl_answer"] / 5
    assert report["kl"] < max(report["kl_nash"], report["kl_opt"]) / 5
    for key in ("kl_ref", "win", "kl_nash", "kl_opt"):
        assert report[key] == report["after"][key]
    own = {"policy": "kl_nash", "mu": "kl_opt"}.get(pairs_from)
    assert own is None or report["answer"][own] < 1e-12


def test_a_reward_model_judges_in_the_place_of_the_truth(tmp_path, monkeypatch):
    """One trained on the pairs ranks nearly as the truth, so the policy wins; one that likes what is bad: it loses."""
    flags = ["--labels_by", "reward", "--tau", "0.3", "--labels", "soft", "--reward_steps", "100"]
    honest = finished(tmp_path, online, "honest", *flags)
    learned = online.reward.rewards
    monkeypatch.setattr(online.reward, "rewards", lambda *of: -learned(*of))
    contrary = finished(tmp_path, online, "contrary", *flags)
    assert max(honest["kl"], contrary["kl"]) < 0.02
    before = honest["before"]["win"]
    assert contrary["win"] < before - 0.1 < before + 0.1 < honest["win"]


# ------------------------------------------------------------------------------------------------------- SPIN

def two_policies(seed):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 5, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("lam", [0.6, 1.0, 3.0])
def test_a_rounds_answer_minimises_the_exact_logistic_loss(lam):
    """LBFGS on the sum over all (chosen, rejected); three prompts, five responses."""
    p_data, opponent = two_policies(0)

    def loss(logp):
        h = exact.margins(logp, opponent)
        return (p_data.exp()[:, :, None] * opponent.exp()[:, None, :] * F.softplus(-lam * h)).sum((1, 2)).mean()

    found = exact.minimise(loss, opponent)
    assert data.kl(found, selfplay.answer(opponent, p_data, lam)) < 1e-10


def test_rounds_converge_only_beyond_one_half():
    """60 exact rounds: below 1/2 they leave, at 1/2 they alternate, above they arrive; at 1 after one."""
    p_data, start = two_policies(1)

    def after(lam, rounds):
        logp = start
        for _ in range(rounds):
            logp = selfplay.answer(logp, p_data, lam)
        return data.kl(p_data, logp).item()

    assert after(0.45, 60) > 10 and after(0.55, 60) < 1e-6 and after(5, 60) < 1e-6
    assert math.isclose(after(0.5, 60), after(0.5, 0)) and after(1.0, 1) < 1e-12


def test_chosen_come_from_the_data_and_rejected_from_the_opponent():
    """Pearson's statistic against p_data(y) pi_t(y')."""
    world = data.World("bt")
    p_data, opponent = (exact.Table(world)(far_from(world, s)).detach().double() for s in (1, 2))
    args = Namespace(batch_size=40_003)
    batch, ref_logp = next(selfplay.batches(world, p_data, opponent, args, torch.Generator().manual_seed(0)))
    counts, rows = counted(batch, p_data.shape)
    law = p_data.exp()[:, :, None] * opponent.exp()[:, None, :]
    assert abs(unlikely(counts, law)) < 4 < 20 < unlikely(counts, law.mT)
    assert torch.allclose(ref_logp.double(), opponent.flatten()[rows], atol=1e-5) and (batch.p == 1).all()


def test_spin_reaches_each_rounds_answer_and_the_data(tmp_path):
    """lambda 2: a round goes half of the way, in the exponent, the next half of the rest, and so do exact ones."""
    report = finished(tmp_path, selfplay, "spin", "--tau", "0.3", "--rounds", "2", "--lam", "2", "--batch_size", "256")
    first, second = report["rounds"]
    assert max(first["kl_round"], second["kl_round"]) < 0.01 < second["kl_data_exact"] < first["kl_data_exact"] / 3
    assert abs(first["kl_data"] - first["kl_data_exact"]) < 0.03
    assert abs(second["kl_data"] - second["kl_data_exact"]) < 0.02
    assert report["kl"] == report["after"]["kl_data"] < report["before"]["kl_data"] / 5
    assert report["kl_likelihood"] < 0.02


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("program, flags, status", [
    (online, ["--data", "pairs.jsonl"], 2), (online, ["--b", "1"], 2), (online, ["--beta", "0"], 2),
    (online, ["--pairs_from", "elsewhere"], 2), (online, ["--logp", "mean"], 2), (online, ["--plot", "nowhere"], 2),
    (selfplay, ["--lam", "0"], 2), (selfplay, ["--rounds", "0"], 2), (selfplay, ["--loss", "dpo"], 2),
    (online, ["--sft_steps", "1", "--pairs", "8", "--lr", "1e9", "--steps", "30"], 1),
])
def test_bad_input_and_divergence_end_in_one_line(tmp_path, capsys, program, flags, status):
    """One line that names the program; its status."""
    if "--plot" in flags:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert program.main(["--out", f"{tmp_path}/out", *flags]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(program.__name__.split(".")[1] + ": ")


# ----------------------------------------------------------------------------------------------------- family

def test_the_family_stands_below_the_frontier_and_says_what_it_skips(tmp_path, capsys):
    """An exact optimum lies on the frontier; a policy moved off it lies below; others' runs are named."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    flags = ["--sft_steps", "150", "--steps", "20", "--pairs", "500", "--log_every", "20"]
    assert ipo.main(["--out", f"{tmp_path}/core", *flags]) == 0
    for name in ("exact", "bent", "seed", "broken"):
        shutil.copytree(tmp_path / "core", tmp_path / name)
    config = (tmp_path / "core/config.json").read_text()
    (tmp_path / "seed/config.json").write_text(json.dumps(json.loads(config) | {"seed": 3}))
    assert ipo.main(["--out", f"{tmp_path}/dpo", "--loss", "dpo", "--tau", "1", *flags]) == 0
    report = json.loads((tmp_path / "exact/report.json").read_text())
    best = {key: report["opt"][key] for key in ("kl_ref", "win")} | {"kl": 0.0, "seconds": 7}
    (tmp_path / "exact/report.json").write_text(json.dumps(best | {"name": "on it"}))
    (tmp_path / "bent/report.json").write_text(json.dumps(best | {"name": "off it", "win": best["win"] - 0.05}))
    (tmp_path / "broken/report.json").write_text("{}")
    capsys.readouterr()
    assert family.main([str(tmp_path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    runs = {run["name"]: run for run in json.loads((tmp_path / "report.json").read_text())}
    assert set(runs) == {"core", "dpo", "on it", "off it"}
    assert abs(runs["on it"]["lost"]) < 1e-3 and abs(runs["off it"]["lost"] - 0.05) < 1e-3
    assert runs["core"]["kl"] == report["after"]["kl_labels"] and runs["core"]["lost"] > -1e-6
    assert "seed: skipped" in said and "broken: skipped" in said
    assert runs["core"]["exact"] and not runs["dpo"]["exact"] and f"{runs['dpo']['kl']:.4f}* |" in said
    assert family.main([f"{tmp_path}/none", "--out", str(tmp_path)]) == 2


def test_pictures_are_drawn_from_files(tmp_path):
    pytest.importorskip("matplotlib")
    report = finished(tmp_path, online, "one", "--steps", "2")
    for program, flags in ((online, ["--plot", f"{tmp_path}/one"]), (family, [str(tmp_path), "--data", "deterministic"])):
        assert program.main([*flags, "--out", f"{tmp_path}/pictures"]) == 0
    assert {path.name for path in (tmp_path / "pictures").glob("*.png")} == {"online.png", "family.png"}
    [run] = json.loads((tmp_path / "pictures/report.json").read_text())
    assert all(run[key] == report[key] for key in ("name", "kl", "kl_ref", "win", "seconds"))
