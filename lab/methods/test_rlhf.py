"""The claims of reward, rlhf, rollout and equal: against enumeration, closed forms, sums over all draws."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import equal, reward, rlhf, rollout

pytestmark = pytest.mark.usefixtures("bt3")


def args_of(out, *flags, **own):
    args = ipo.parse(["--data", "bt3", "--out", str(out), "--device", "cpu", "--pairs", "4000", *flags])
    defaults = {"reward_steps": 100, "reward_lr": 3e-3, "ridge": 0.0, "kl": "reward", "clip": 0.0,
                "epochs": 1, "k": 3, "prompts": 2, "longest": 5, "reward": "true"}
    vars(args).update(defaults | own)
    return args


def case(k=3, Y=3, seed=0, tau=0.3, **own):
    """A table of logits, its reference, its rewards, and the flags: one prompt, Y responses."""
    generator = torch.Generator().manual_seed(seed)
    theta, ref, r = torch.randn(3, 1, Y, dtype=torch.float64, generator=generator)
    args = SimpleNamespace(**({"tau": tau, "kl": "reward", "clip": 0.0, "k": k} | own))
    return theta.requires_grad_(), ref.log_softmax(-1), r, args


def mean_gradient(theta, ref, r, args):
    """Of rlhf.loss, over every k-tuple of draws and its probability."""
    total = torch.zeros_like(theta)
    for draw in itertools.product(range(theta.shape[1]), repeat=args.k):
        logp = theta.log_softmax(-1)
        y = torch.tensor([draw])
        drawn = rollout.Drawn(y, ref.gather(1, y), r.gather(1, y))
        mine = logp.gather(1, y)
        gradient, = torch.autograd.grad(rlhf.loss(mine, mine.detach(), drawn, args), theta)
        total += mine.sum().exp().detach() * gradient
    return total


@pytest.mark.parametrize("kl", ["reward", "grad", "k3"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_gradient_is_that_of_the_objective(kl, k):
    """Enumerated. reward: E r - tau KL(pi||ref). grad: E r alone. k3: E r - tau KL(ref||pi)."""
    theta, ref, r, args = case(k=k, kl=kl)
    logp = theta.log_softmax(-1)
    kls = {"reward": data.kl(logp, ref), "grad": 0.0, "k3": data.kl(ref, logp)}
    objective = (logp.exp() * r).sum() - args.tau * kls[kl]
    exact, = torch.autograd.grad(objective, theta)
    assert torch.allclose(mean_gradient(theta, ref, r, args), -exact, atol=1e-12)


def test_the_baseline_leaves_the_sample_out():
    """By hand."""
    value = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 0.0]])
    assert torch.equal(rlhf.baseline(value), torch.tensor([[4.0, 3.5, 1.5], [1.5, 0.0, 1.5]]))


def test_kl_in_the_reward_has_no_gradient_of_its_own():
    """Where all R are equal nothing moves: rewards chosen as tau log(pi/ref)."""
    theta, ref, _, args = case()
    logp = theta.log_softmax(-1)
    drawn = rollout.Drawn(None, ref, args.tau * (logp - ref).detach())
    gradient, = torch.autograd.grad(rlhf.loss(logp, logp.detach(), drawn, args), theta)
    assert gradient.abs().max() < 1e-12


def test_the_advantage_stays_that_of_the_draw():
    """Off the draw's policy the gradient is -ratio * advantage / n, by hand: the KL in R is the old one, a
    number. (At the draw itself a gradient of it would cancel in the leave-one-out baseline.)"""
    args = SimpleNamespace(tau=0.5, kl="reward", clip=0.0)
    old, ref, r = torch.randn(3, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logp = (old + torch.tensor([[0.3, -0.2, 0.5]])).requires_grad_()
    gradient, = torch.autograd.grad(rlhf.loss(logp, old, rollout.Drawn(None, ref, r), args), logp)
    value = r - 0.5 * (old - ref)
    advantage = 1.5 * (value - value.mean())  # what leaving the sample out makes of it, k = 3
    assert torch.allclose(gradient, -(logp - old).exp() * advantage / 3)


def test_clip_stops_ratios_that_went_far_enough():
    """PPO: no gradient above 1 + clip if the advantage is positive, below 1 - clip if it is negative."""
    old = torch.zeros(1, 2, dtype=torch.float64)
    drawn = rollout.Drawn(None, torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # advantages 1, -1
    args = SimpleNamespace(tau=0.0, kl="reward", clip=0.2)
    for step, moves in ((0.1, (True, True)), (0.3, (False, False)), (-0.3, (True, True))):
        logp = torch.tensor([[step, -step]], dtype=torch.float64, requires_grad=True)
        gradient, = torch.autograd.grad(rlhf.loss(logp, old, drawn, args), logp)
        assert tuple((gradient[0] != 0).tolist()) == moves, step


@pytest.mark.parametrize("kl", ["reward", "k3"])
def test_answers_maximise_their_objectives(kl):
    """LBFGS on the objective, from elsewhere."""
    theta, ref, r, args = case(Y=5, kl=kl, seed=3)

    def lost(logp):
        kls = {"reward": data.kl(logp, ref), "k3": data.kl(ref, logp)}
        return args.tau * kls[kl] - (logp.exp() * r).sum(-1).mean()

    found = exact.minimise(lost, theta.detach())
    assert torch.allclose(rlhf.answer(ref, r, args), found, atol=1e-5)


def test_without_a_pull_all_goes_to_the_best():
    """--kl grad: probability 1 on the greatest reward, shared on ties."""
    _, ref, _, args = case(kl="grad")
    r = torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64)
    assert rlhf.answer(ref, r, args).exp().tolist() == [[0.0, pytest.approx(0.5), pytest.approx(0.5)]]


@pytest.mark.parametrize("flags", [[], ["--clip", "0.2", "--epochs", "2"]])
def test_rloo_and_ppo_end_at_the_exact_answer(tmp_path, flags, capsys):
    """A world of 4 responses: KL to ref exp(r/tau) / Z, recomputed from the checkpoint, falls below .003."""
    argv = ["--data", "bt3", "--steps", "300", "--sft_steps", "20", "--pairs", "100", "--out", str(tmp_path)]
    assert start.report("rlhf", rlhf.run, [*argv, *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    args = args_of(tmp_path, "--sft_steps", "20", "--pairs", "100", "--overwrite")
    world = ipo.WorldSource(args)
    policy, reference = (model.load(tmp_path / name)[0] for name in ("ckpt.pt", "ref.pt"))
    logp, ref = world.enumerate(policy), world.enumerate(reference)
    exact = (ref + world.reward / 0.5).log_softmax(-1)
    kl = (logp.exp() * (logp - exact)).sum(-1).mean().item()
    assert kl == pytest.approx(report["kl"], abs=1e-5) and kl < 3e-3
    assert data.kl(ref, exact) > 0.05
    assert report["kl_ref"] == pytest.approx(data.kl(logp, ref).item(), abs=1e-5)
    win = (logp.exp()[:, :, None] * world.pstar).sum(1).mean(-1).mean().item()
    assert report["win"] == pytest.approx(win, abs=1e-5)


@pytest.mark.parametrize("kl", ["reward", "k3"])
def test_the_figures_are_what_they_are_called(tmp_path, kl):
    """An untrained policy, rewards that are not the true ones: each figure from its definition."""
    args = args_of(tmp_path, "--sft_steps", "5", kl=kl)
    policy, world, _, _ = start.start(args)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn_like(p)
    r = 2 * torch.randn(4, 4, dtype=torch.float64)
    found = rlhf.Enumerated(world, r, args).numbers(policy)
    logp = world.enumerate(policy)
    pi = logp.exp()
    ends = {"kl": rlhf.answer(world.ref, r, args), "kl_ref": world.ref,
            "kl_rlhf": (world.ref + r / args.tau).log_softmax(-1),
            "kl_true": (world.ref + world.reward / args.tau).log_softmax(-1)}
    exact = {name: (pi * (logp - end)).sum(-1).mean().item() for name, end in ends.items()}
    exact["reward"] = (pi * r).sum(-1).mean().item()
    exact["best"] = pi.gather(1, r.argmax(-1, keepdim=True)).mean().item()
    exact["win"] = (pi[:, :, None] * world.pstar).sum(1).mean().item()
    assert found == pytest.approx(exact, abs=1e-5)


def test_draws_come_from_the_policy(tmp_path):
    """Shares of 40,000 draws against the policy's table; ref_logp and reward are those of what was drawn."""
    args = args_of(tmp_path, "--sft_steps", "5", k=40_000)
    policy, world, _, generator = start.start(args)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn_like(p)
    drawn = rlhf.Enumerated(world, world.reward, args).draw(policy, generator)
    shares = torch.nn.functional.one_hot(drawn.where, 4).double().mean(1)
    assert (shares - world.enumerate(policy).exp()).abs().max() < 0.015
    assert (shares - world.ref.exp()).abs().max() > 0.03
    x = torch.arange(4)[:, None]
    assert torch.equal(drawn.ref_logp, world.ref[x, drawn.where].float())
    assert torch.equal(drawn.reward, world.reward[x, drawn.where].float())


def test_a_learned_reward_is_the_one_that_is_maximised(tmp_path):
    """--reward model: the rewards are those of OUT/reward.pt, not the world's."""
    args = args_of(tmp_path, "--sft_steps", "5", "--steps", "1", reward="model", reward_steps=5)
    _, task = rlhf.rlhf(args)
    learned = reward.rewards(reward.load(tmp_path / "reward.pt"), task.world, args)
    assert torch.equal(task.r, learned)


@pytest.mark.parametrize("epochs", [1, 3])
def test_samples_serve_as_many_steps_as_asked(tmp_path, monkeypatch, epochs):
    """Draws in 6 steps; at each fresh draw the ratio pi/old is 1, and with three epochs only there."""
    args = args_of(tmp_path, "--sft_steps", "5", "--steps", "6", epochs=epochs)
    policy, world, _, _ = start.start(args)
    task, ones, usual = rlhf.Enumerated(world, world.reward, args), [], rlhf.loss

    def seen(logp, old_logp, drawn, args):
        ones.append(torch.equal(logp, old_logp))
        assert not old_logp.requires_grad
        return usual(logp, old_logp, drawn, args)

    monkeypatch.setattr(rlhf, "loss", seen)
    rlhf.train(policy, task, args)
    assert ones == [step % epochs == 0 for step in range(6)]


def test_the_wrong_ways_end_elsewhere(tmp_path, capsys):
    """k3 ends at tau ref / (nu - r), grad near the largest mean reward, .55; both far from the right one."""
    for kl in ("k3", "grad"):
        argv = ["--data", "bt3", "--kl", kl, "--steps", "400", "--sft_steps", "20", "--pairs", "100"]
        assert start.report("rlhf", rlhf.run, [*argv, "--out", str(tmp_path)]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["kl_rlhf"] > 0.015, kl
        assert report["kl"] < 1e-3 if kl == "k3" else report["reward"] > 0.45, kl


# --------------------------------------------------------------------------------------------- reward model

def taught(tmp_path, *flags, **own):
    args = args_of(tmp_path, "--sft_steps", "5", *flags, **own)
    policy, source, _, generator = start.start(args)
    return reward.fit(policy, source, args, generator), source, args


def test_the_reward_model_learns_the_reward(tmp_path):
    """Soft labels: RMSE below .05 of rewards .5 apart; a fit that mixed up winner and loser has 2 x .5."""
    learned, source, args = taught(tmp_path, "--labels", "soft", reward_steps=300)
    assert reward.numbers(learned, source, args)["rmse"] < 0.05


def test_winner_and_loser_are_two_rows(tmp_path):
    """A gap between a row and itself would be 0 and teach nothing: the mean gap of hard pairs is not."""
    learned, source, args = taught(tmp_path)
    winner, loser = reward.score(learned, source.pairs, source.pairs.pair_rows(source.train), args).chunk(2)
    assert (winner - loser).mean() > 0.1


def test_padding_does_not_move_a_reward(tmp_path):
    """A row alone, and beside longer ones; another last token does move it."""
    torch.manual_seed(0)
    net = reward.RewardModel(model.GPT(model.GPTConfig(12, 20, 0, 1, 2, 8)))
    torch.nn.init.normal_(net.value.weight)
    rows = data.PairData([([1, 2], [3, 4]), ([1, 2], [5, 6, 7, 8, 9]), ([1, 2], [3, 5])])
    alone = [net(*rows.padded(torch.tensor([i]))) for i in range(3)]
    together = net(*rows.padded(torch.arange(3)))
    assert torch.allclose(torch.cat(alone), together, atol=1e-6)
    assert (alone[0] - alone[2]).abs() > 1e-6


def test_what_noise_and_ridge_teach_is_the_minimum(tmp_path):
    """Certain preferences: no finite answer without a ridge; with one, each response's slope is 0."""
    args = args_of(tmp_path, "--noise", "0.1")
    world = ipo.WorldSource(args)
    world.mu = torch.full_like(world.reward, 0.25)
    r = reward.taught(world, args)
    noisy = 0.1 + 0.8 * world.pstar
    fit = (r[:, :, None] - r[:, None, :]).sigmoid()
    assert torch.allclose((fit - noisy).sum(-1), torch.zeros(4, 4).double(), atol=1e-6)
    args.noise, args.ridge, args.data = 0.0, 0.01, "deterministic"
    world.pstar = (world.reward[:, :, None] > world.reward[:, None, :]).double()
    world.pstar += (world.reward[:, :, None] == world.reward[:, None, :]).double() / 2
    r = reward.taught(world, args)
    gap = r[:, :, None] - r[:, None, :]
    slope = 0.02 * gap - world.pstar * (-gap).sigmoid() + (1 - world.pstar) * gap.sigmoid()
    assert torch.allclose(slope.sum(-1), torch.zeros(4, 4).double(), atol=1e-6)
    args.ridge = 0.0
    assert reward.taught(world, args).isnan().all()


def test_the_reward_model_s_figures_are_what_they_are_called(tmp_path, monkeypatch):
    """Rewards off by a constant a prompt and by .3 on one response: RMSE after centring, by hand."""
    args = args_of(tmp_path, "--sft_steps", "5")
    _, world, _, _ = start.start(args)
    off = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()[:, None].repeat(1, 4)
    off[:, 2] += 0.3
    learned = world.reward + off
    monkeypatch.setattr(reward, "rewards", lambda *given: learned)
    found = reward.numbers(None, world, args)
    best, exact = ((world.ref + r / args.tau).log_softmax(-1) for r in (learned, world.reward))
    assert found["rmse"] == pytest.approx(0.3 * (3 / 16) ** 0.5)
    assert found["gap"] == pytest.approx((learned.amax(-1) - learned.amin(-1)).mean().item())
    assert found["kl"] == pytest.approx((best.exp() * (best - exact)).sum(-1).mean().item())
    assert found["kl_ref"] == pytest.approx((best.exp() * (best - world.ref)).sum(-1).mean().item())
    assert found["win"] == pytest.approx((best.exp()[:, :, None] * world.pstar).sum(1).mean().item())


def test_where_no_reward_is_true_the_likeliest_stands_for_it(tmp_path, monkeypatch):
    """cyclic: each response wins as often under the fit as it does, over all opponents; bt3: the world's."""
    monkeypatch.setitem(data.WORLDS, "cyclic", data.WORLDS["bt3"])
    args = args_of(tmp_path, "--data", "cyclic", "--sft_steps", "5")
    _, world, _, _ = start.start(args)
    r = reward.truth(world)
    fit = (r[:, :, None] - r[:, None, :]).sigmoid()
    assert torch.allclose((fit - world.pstar).sum(-1), torch.zeros(4, 4).double(), atol=1e-6)
    centred = world.reward - world.reward.mean(-1, keepdim=True)
    assert (r - centred).abs().max() > 0.1
    args.data = "bt3"
    assert torch.equal(reward.truth(world), world.reward)


def test_certain_preferences_stretch_the_reward_and_a_ridge_holds_it(tmp_path, monkeypatch):
    """deterministic: the gap at 240 steps is more than 1.5 times that at 60; with a ridge less than 1.2."""
    monkeypatch.setitem(data.WORLDS, "deterministic", data.WORLDS["bt3"])
    gaps = {}
    for ridge in (0.0, 0.05):
        for steps in (60, 240):
            flags = ["--data", "deterministic", "--sft_steps", "5", "--overwrite"]
            learned, source, args = taught(tmp_path, *flags, reward_steps=steps, ridge=ridge)
            gaps[ridge, steps] = reward.numbers(learned, source, args)["gap"]
    assert gaps[0.0, 240] > 1.5 * gaps[0.0, 60]
    assert gaps[0.05, 240] < 1.2 * gaps[0.05, 60]


def test_a_reward_model_is_saved_and_loaded(tmp_path):
    """The same rewards; a policy's checkpoint is refused."""
    learned, source, args = taught(tmp_path, reward_steps=5)
    reward.save(tmp_path / "reward.pt", learned)
    again = reward.load(tmp_path / "reward.pt")
    assert torch.equal(reward.rewards(learned, source, args), reward.rewards(again, source, args))
    with pytest.raises(model.Refused, match="no reward model"):
        reward.load(tmp_path / "ref.pt")


# ------------------------------------------------------------------------------------------ start, sampling

def test_start_is_how_ipo_starts(tmp_path, capsys):
    """Reference and pairs equal those of a run of ipo.py with the same flags, bit for bit."""
    args = args_of(tmp_path / "a", "--steps", "1", "--sft_steps", "5")
    policy, source, ref_logp, _ = start.start(args)
    theirs = ipo.WorldSource(args)
    args.out = str(tmp_path / "b")
    ipo.run(args, source=theirs)
    reference, saved = model.load(tmp_path / "b" / "ref.pt")
    assert torch.equal(saved["ref_logp"], ref_logp)
    assert torch.equal(theirs.pairs.chosen, source.pairs.chosen)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), reference.parameters()))


def test_samples_have_the_policy_s_probabilities():
    """Every string of a tiny vocabulary: frequencies of 20,000 draws against enumeration, prompts of two
    lengths in one batch."""
    torch.manual_seed(0)
    policy = model.GPT(model.GPTConfig(6, 3, 0, 1, 1, 8))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.5 * torch.randn_like(p)
    n, prompts = 20_000, ([1], [2, 1, 1])
    tokens, mask = rollout.sample(policy, [p for p in prompts for _ in range(n)], 0, 2, None)
    for number, prompt in enumerate(prompts):
        part = slice(number * n, (number + 1) * n)
        said = [tuple(t[m].tolist()) for t, m in zip(tokens[part], mask[part])]
        strings = [(0,), *itertools.product((1, 2), (0, 1, 2))]
        assert set(said) <= set(strings) and (tokens[part][:, :len(prompt)] == torch.tensor(prompt)).all()
        rows = data.PairData([(prompt, list(s)) for s in strings])
        exact = ipo.sequence_logp(policy, *rows.padded(torch.arange(len(strings)))).exp()
        assert exact.sum().item() == pytest.approx(1, abs=1e-5)
        shares = torch.tensor([said.count(s) / n for s in strings])
        assert (shares - exact).abs().max() < 0.015


def test_samples_end_at_the_context(tmp_path):
    """A prompt that leaves two tokens of room gets two at most."""
    policy = model.GPT(model.GPTConfig(6, 3, 0, 1, 1, 8))
    tokens, mask = rollout.sample(policy, [[1] * 4] * 50, 0, 10, None)
    assert tokens.shape[1] <= 6 and mask.sum(1).max() == 2


@pytest.fixture
def pairs(tmp_path):
    """Ends in '!' are preferred."""
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"say {a}{b}:", "chosen": a + "!", "rejected": b + "?"}
             for a, b in itertools.product("abcde", repeat=2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SMALL = ["--tokenizer", "bytes", "--block_size", "24", "--n_layer", "1", "--n_head", "1", "--n_embd", "16"]


def test_drawn_responses_are_judged_one_by_one(tmp_path, pairs, capsys, monkeypatch):
    """A judge that adds up ids: k rows a prompt, in order; no_end off where no end came; no gradient."""
    args = args_of(tmp_path, "--data", pairs, *SMALL, k=64, longest=8, no_end=7.0)
    source = ipo.FileSource(args)
    policy, reference = (model.GPT(model.GPTConfig(*source.sizes, 1, 1, 16)) for _ in range(2))
    usual, with_gradient = policy.hidden, []

    def hidden(*given):
        with_gradient.append(torch.is_grad_enabled())
        return usual(*given)

    monkeypatch.setattr(policy, "hidden", hidden)
    factor = torch.ones((), requires_grad=True)

    def judge(tokens, mask):
        return factor * (tokens * mask).sum(1)

    task = rollout.Sampled(source, reference, judge, args)
    rows = source.pairs.chosen[source.eval][:2]
    drawn = task.draw(policy, torch.Generator().manual_seed(0), rows)
    tokens, mask = drawn.where
    for number, row in enumerate(rows.repeat_interleave(64)):
        prompt = source.pairs.prompt_ids(row)
        assert tokens[number, :len(prompt)].tolist() == prompt and not mask[number, :len(prompt)].any()
    ended = torch.stack([t[m][-1] == source.tokenizer.eot_token for t, m in zip(tokens, mask)])
    assert ended.any() and not ended.all() and (mask.sum(1)[~ended] == 8).all()
    assert torch.equal(drawn.reward.flatten(), (tokens * mask).sum(1) - 7.0 * ~ended)
    ref_logp = ipo.sequence_logp(reference, tokens, mask).view(2, 64)
    assert torch.allclose(drawn.ref_logp, ref_logp, atol=1e-5)
    assert not any(with_gradient) and not drawn.reward.requires_grad and not drawn.ref_logp.requires_grad
    usual_luck = torch.Generator().manual_seed(args.seed).get_state()
    assert torch.equal(task.luck().get_state(), task.luck().get_state())
    assert not torch.equal(task.luck().get_state(), usual_luck)  # with which rlhf.train draws
    args.k = 8
    task.show(policy, rows)
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    first = [float(value) for value in printed[:8]]
    assert len(printed) == 16 and first == sorted(first, reverse=True) and first[0] > first[-1]


def test_a_file_of_pairs_is_learned_by_sampling(tmp_path, pairs, capsys):
    """SFT, reward model, RLOO: the reward of samples for held-out prompts rises, the win rate passes .6."""
    argv = ["--data", pairs, *SMALL, "--sft_steps", "150", "--sft_lr", "1e-2", "--reward_steps", "150",
            "--lr", "3e-3", "--reward_lr", "1e-2", "--steps", "40", "--longest", "4", "--tau", "0.05",
            "--k", "8"]
    out = ["--out", str(tmp_path / "run")]
    assert start.report("rlhf", rlhf.run, [*argv, *out]) == 0
    report, said = json.loads((tmp_path / "run" / "report.json").read_text()), capsys.readouterr().out
    assert report["win"] > 0.6 and report["kl_ref"] > 0
    assert "before: " in said and "win 0.5000" in said and said.count("\n'say ") == 4
    more = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "more"), "--k", "2"]
    assert start.report("rollout", rollout.run, ["--data", pairs, *more]) == 0
    assert "!" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- equality, bad input

def test_three_ways_to_one_policy(tmp_path, monkeypatch, capsys):
    """Proposition 1 in small: RLHF, DPO, and IPO's loop with Psi = logit, pairwise and from the exact one."""
    monkeypatch.setitem(data.WORLDS, "bt", data.WORLDS["bt3"])
    argv = ["--pairs", "4000", "--steps", "300", "--reward_steps", "200", "--sft_steps", "20"]
    assert start.report("equal", equal.run, [*argv, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kl"] <= 2e-3 and len(report) == 13
    assert min(report.values()) > 0  # four policies, none of them another's copy
    assert ipo.psi(torch.tensor(0.3)) == torch.tensor(0.3)  # psi is put back


@pytest.mark.parametrize("program, argv, why", [
    (rlhf, ["--k", "1"], "--k"), (rlhf, ["--kl", "k4"], "--kl"), (rlhf, ["--tau", "-1"], "--tau"),
    (rlhf, ["--resume"], "run"), (rlhf, ["--ridge", "-1"], "--ridge"), (rlhf, ["--clip", "nan"], "--clip"),
    (rlhf, ["--logp", "mean"], "--logp mean"), (rlhf, ["--epochs", "0"], "--epochs"),
    (rlhf, ["--data", "nosuch.jsonl", "--tokenizer", "bytes"], "nosuch"),
    (rlhf, ["--data", "nosuch.jsonl", "--reward", "true"], "--reward true"),
    (reward, ["--reward_lr", "x"], "--reward_lr"), (reward, ["--init_from", "nosuch.pt"], "nosuch.pt"),
    (equal, ["--labels", "hard"], "--labels soft"), (equal, ["--data", "cyclic"], "--data must be bt"),
    (equal, ["--noise", "0.1"], "--noise"), (equal, ["--kl", "k3"], "--kl"),
    (rollout, ["--data", "bt"], "enumerated"), (rollout, ["--data", "x.jsonl", "--k", "0"], "--k"),
    (rollout, ["--data", "x.jsonl", "--run", "nosuch"], "nosuch/ckpt.pt")])
def test_bad_input_is_one_line(program, argv, why, tmp_path, capsys):
    """Exit status 2."""
    assert start.report("name", program.run, ["--out", str(tmp_path), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("name: ") and said.count("\n") == 1 and why in said


def test_nothing_saved_is_lost(tmp_path, pairs, capsys, monkeypatch):
    """A run of a file, or one that was cut short, is refused as --out; its files stay as they were."""
    monkeypatch.setitem(data.WORLDS, "bt", data.WORLDS["bt3"])
    kept = {tmp_path / "run" / "ref.pt", tmp_path / "all" / "dpo" / "ref.pt"}
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("a run")
    few = ["--pairs", "100", "--steps", "1", "--reward_steps", "1", "--sft_steps", "1"]
    file = ["--data", pairs, *SMALL]
    run, everything = str(tmp_path / "run"), str(tmp_path / "all")
    for program, argv in ((rlhf, few), (reward, few), (rlhf, [*file, *few]), (reward, [*file, *few]),
                          (rollout, [*file, "--run", run])):
        assert start.report("name", program.run, [*argv, "--out", run]) == 2, program
    assert start.report("name", equal.run, [*few, "--out", everything]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all("holds a run" in line for line in said)
    assert all(path.read_text() == "a run" for path in kept)


@pytest.mark.parametrize("program, rate", [(rlhf, "--lr"), (reward, "--reward_lr")])
def test_divergence_is_one_line(program, rate, tmp_path, capsys):
    """Exit status 1."""
    argv = ["--data", "bt3", rate, "1e8", "--steps", "50", "--sft_steps", "1", "--pairs", "100"]
    assert start.report("name", program.run, [*argv, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
