"""The claims of others, kto and thumbs: against sums by hand, closed forms, second derivatives."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import ipo
import model
from lab.common import exact, start
from lab.methods import kto, others, thumbs

pytestmark = pytest.mark.usefixtures("bt3")


def flags_of(method, **own):
    usual = {"tau": 0.5, "lam": 0.7, "delta": 1.0, "smoothing": 0.1, "noise": 0.0, "method": method}
    return SimpleNamespace(**(usual | own))


def kto_flags(**own):
    usual = {"tau": 0.5, "liked": 1.0, "disliked": 1.0, "noise": 0.0, "z0": "policy"}
    return SimpleNamespace(**(usual | own))


@pytest.fixture
def begun(tmp_path):
    argv = ["--data", "bt3", "--pairs", "2000", "--sft_steps", "20", "--device", "cpu"]
    args = ipo.parse([*argv, "--out", str(tmp_path)])
    vars(args).update(vars(kto_flags()))
    return args, *start.start(args)


def small(seed, Y=4, X=2):
    """A world's tables, random: p* that may be intransitive, and responses of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(X, Y, Y, dtype=torch.float64, generator=generator).triu(1)
    pstar = upper + (1 - upper.mT).tril(-1) + torch.eye(Y, dtype=torch.float64) / 2
    pstar.diagonal(dim1=1, dim2=2).fill_(0.5)
    ref = torch.randn(X, Y, dtype=torch.float64, generator=generator).log_softmax(-1)
    rows = [([9], [1] * n) for n in (1 + torch.arange(X * Y) % 3).tolist()]
    return SimpleNamespace(pstar=pstar, ref=ref, mu=torch.full((X, Y), 1 / Y).double(),
                           pairs=data.PairData(rows), base=torch.arange(Y).double() / sum(range(Y)))


BY_HAND = {
    "cpo": lambda w, l, n, m: math.log1p(math.exp(-0.5 * (w - l))) - 0.7 * w,
    "slic": lambda w, l, n, m: max(0.0, 1 - w + l),
    "orpo": lambda w, l, n, m: -w / n - 0.7 * math.log(1 / (1 + math.exp(-(odds(w / n) - odds(l / m))))),
}


def odds(m):
    return math.log(math.exp(m) / (1 - math.exp(m)))


@pytest.mark.parametrize("method", BY_HAND)
def test_costs_are_the_papers(method):
    """Three pairs with plain floats: sums of log-probs, but orpo's means over tokens."""
    for w, l, n, m in ((-1.2, -3.4, 2, 3), (-4.0, -0.3, 3, 1), (-2.0, -2.1, 1, 1)):
        winner, loser = (others.Side(*torch.tensor([x, -1.0, k]).double()) for x, k in ((w, n), (l, m)))
        cost = others.COSTS[method](winner, loser, flags_of(method))
        assert cost.item() == pytest.approx(BY_HAND[method](w, l, n, m), abs=1e-6)


def test_dpo_is_the_core_s_and_cdpo_a_soft_label():
    """h from both ratios; label smoothing e is p = 1 - e."""
    w, l = others.Side(-1.0, -2.5, 1), others.Side(-3.0, -2.0, 1)
    w, l = (others.Side(*map(torch.tensor, map(float, side))) for side in (w, l))
    h = torch.tensor(2.5)
    assert torch.allclose(others.dpo(w, l, flags_of("dpo")), ipo.dpo_loss(h, 1.0, 0.5))
    assert torch.allclose(others.cdpo(w, l, flags_of("cdpo")), ipo.dpo_loss(h, 0.9, 0.5))


@pytest.mark.parametrize("method", others.COSTS)
def test_the_objective_is_the_mean_of_what_training_sees(method):
    """Every ordered pair, both outcomes, flipped labels and, for slic, every SFT response, summed by hand."""
    world, args = small(1), flags_of(method, noise=0.2)
    logp = torch.randn(2, 4, dtype=torch.float64).log_softmax(-1)
    length, total = others.lengths(world.pairs).view(2, 4), 0.0
    for x in range(2):
        sides = [others.Side(logp[x, y], world.ref[x, y], length[x, y]) for y in range(4)]
        for y, z in itertools.permutations(range(4), 2):
            p = 0.8 * world.pstar[x, y, z] + 0.2 * world.pstar[x, z, y]
            costs = [others.COSTS[method](sides[a], sides[b], args) for a, b in ((y, z), (z, y))]
            total += (p * costs[0] + (1 - p) * costs[1]) / 12 / 2
        if method == "slic":
            total -= 0.7 * (world.base * logp[x]).sum() / 2
    assert others.objective(world, args)(logp).item() == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize("method", others.COSTS)
def test_a_step_descends_the_mean_of_its_pairs(method, begun, monkeypatch):
    """By enumeration: soft labels, so each pair counts in both orders; for slic also three SFT responses. The
    lengths, all 1 in so small a world, are made up."""
    lengths = 1 + torch.arange(16) % 3
    monkeypatch.setattr(others, "lengths", lambda pairs: lengths)
    args, policy, source, ref_logp, generator = begun
    vars(args).update(vars(flags_of(method)))
    source.draw(6, source.mu, "soft", 0.0, generator)
    with torch.no_grad():
        policy.transformer.wte.weight += 0.1 * torch.randn_like(policy.transformer.wte.weight)
    logp, pairs, sft = source.enumerate(policy).flatten(), torch.tensor([4, 1, 3]), torch.tensor([2, 11, 6])
    total = 0.0
    for pair in pairs.tolist():
        sides = []
        for row in (source.pairs.chosen[pair], source.pairs.rejected[pair]):
            x, y = divmod(row.item(), 4)
            sides.append(others.Side(logp[row], source.ref[x, y], lengths[row]))
        p = source.pairs.p[pair].item()
        cost = others.COSTS[method]
        total += (p * cost(*sides, args) + (1 - p) * cost(*sides[::-1], args)) / 3
    if method == "slic":
        total -= 0.7 * logp[sft].mean()
    found = others.batch_loss(policy, source, ref_logp, pairs, sft, args)
    assert found.item() == pytest.approx(total.item(), abs=1e-5) and found.requires_grad


def test_lengths_are_of_responses():
    """In tokens, the end included, the prompt not."""
    world = data.World("bt")
    found = others.lengths(world.pairs).view(4, 400)
    for y, text in enumerate(world.responses):
        assert found[2, y] == min(len(text.split()) + 1, 3)


def test_flipped_and_smoothed_labels_have_one_expectation():
    """dpo with --noise e is cdpo with --smoothing e."""
    world = small(2)
    logp = torch.randn(2, 4, dtype=torch.float64).log_softmax(-1)
    flipped = others.objective(world, flags_of("dpo", noise=0.1))(logp)
    assert torch.allclose(flipped, others.objective(world, flags_of("cdpo", smoothing=0.1))(logp), atol=1e-12)


def test_cdpo_s_minimiser_is_a_closed_form():
    """Bradley-Terry p*, two responses: h = logit(p (1 - e) + (1 - p) e) / tau."""
    world = small(3, Y=2)
    best, _ = others.minimum(world, flags_of("cdpo"), torch.Generator().manual_seed(0))
    h = (best - world.ref)[:, 0] - (best - world.ref)[:, 1]
    p = world.pstar[:, 0, 1]
    assert torch.allclose(h, (0.9 * p + 0.1 * (1 - p)).logit() / 0.5, atol=1e-5)


def test_curvature_is_the_hessian_s():
    """Against torch's own second derivatives and eigenvalues."""
    world = small(4, X=1)
    f = others.objective(world, flags_of("cpo", lam=0.3))
    hessian = torch.func.hessian(lambda theta: f(theta[None].log_softmax(-1)))(world.ref[0])
    least, *_, largest = torch.linalg.eigvalsh(hessian).tolist()
    found = others.curvature(f, world.ref, torch.Generator().manual_seed(0), n=300)
    assert found == pytest.approx(least / largest, abs=1e-3)


def test_the_hinge_alone_is_flat():
    """Its second derivatives are 0, so nothing speaks for one start; JSON has no nan."""
    _, known = others.minimum(small(4), flags_of("slic", lam=0.0), torch.Generator().manual_seed(0))
    assert known["curvature"] is None and known["starts"] == 3


def test_orpo_is_not_convex_and_the_others_are():
    """Where one response has nearly all mass: curvature below 0 for orpo, the others' at worst rounding."""
    for method in others.COSTS:
        _, known = others.minimum(small(5), flags_of(method), torch.Generator().manual_seed(0))
        assert (known["curvature"] < -1e-5) == (method == "orpo"), method
        assert known["starts"] == (3 if method == "orpo" else 1) and known["apart"] < 1e-6, method


def test_the_best_of_several_starts_is_taken(monkeypatch):
    """With a minimiser that stays where it starts, the answer is the start of least objective."""
    monkeypatch.setattr(exact, "minimise", lambda f, start: start.log_softmax(-1))
    for seed in range(5):
        world, args = small(seed), flags_of("orpo")
        best, known = others.minimum(world, args, torch.Generator().manual_seed(0))
        f = others.objective(world, args)
        flat = torch.zeros_like(world.ref).log_softmax(-1)
        assert f(best) <= min(f(world.ref), f(flat)) and known["apart"] > 0.1


@pytest.mark.parametrize("method", others.COSTS)
def test_training_ends_at_the_minimiser(method, tmp_path, capsys):
    """300 steps in a world of 4 responses: .005 nats."""
    argv = ["--data", "bt3", "--method", method, "--steps", "300", "--sft_steps", "20", "--pairs", "40000"]
    assert start.report("others", others.run, [*argv, "--lr", "3e-3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval"]["kl_answer"] == report["kl"] < 5e-3
    assert report["kl_ref"] > 2 * report["kl"] and 0 < report["win"] < 1


# ------------------------------------------------------------------------------------------------------- KTO

def test_kto_s_loss_by_hand():
    """lambda_D (1 - s(tau (f - z0))) if liked, lambda_U (1 - s(tau (z0 - f))) if not."""
    def s(z):
        return 1 / (1 + math.exp(-z))
    f, label, args = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0]), kto_flags(liked=2.0, disliked=3.0)
    found = kto.loss(f, torch.tensor(0.4), label, args).tolist()
    assert found == pytest.approx([2 * (1 - s(-0.05)), 3 * (1 - s(0.5 * 2.4))], abs=1e-6)


@pytest.mark.parametrize("kind", ["policy", "mismatched", "data", "zero"])
def test_z0_is_what_its_name_says_and_has_no_gradient(kind, begun):
    """Of a moved policy, by enumeration; never below 0; a number."""
    args, policy, source, ref_logp, _ = begun
    args.z0 = kind
    anchor = kto.Anchor(policy, source, args)
    with torch.no_grad():
        policy.transformer.wte.weight += 0.1 * torch.randn_like(policy.transformer.wte.weight)
    logp = source.enumerate(policy)
    ratio = (logp - source.ref).float()
    other = ratio.roll(-2, 0)  # the response after the prompt two further on
    rows = (other if kind == "mismatched" else ratio).flatten().topk(5).indices  # else it is clamped
    f = kto.ratio(policy, source.pairs, ref_logp, rows, args)
    due = {"policy": data.kl(logp, source.ref), "mismatched": other.flatten()[rows].mean(),
           "data": ratio.flatten()[rows].mean(), "zero": torch.zeros(())}
    z0 = anchor(policy, rows, f)
    assert not z0.requires_grad and f.requires_grad
    assert z0.item() == pytest.approx(due[kind].item(), abs=1e-5)
    assert (z0 > 0) == (kind != "zero"), "a case that tells nothing"
    if kind == "data":
        assert anchor(policy, rows, f * 0 - 1) == 0


def test_mismatched_z0_is_never_below_zero(begun):
    """A policy that makes these very rows unlikely: their mean log-ratio is far below 0."""
    args, policy, source, _, generator = begun
    args.z0 = "mismatched"
    anchor = kto.Anchor(policy, source, args)
    rows = torch.arange(16)
    anchor.ref_logp = anchor.ref_logp + 1.0
    assert kto.ratio(policy, anchor.other, anchor.ref_logp, rows, args).mean() < -0.9
    assert anchor(policy, rows, None) == 0


def test_a_step_of_kto_descends_its_rows(begun):
    """The first step's gradient: by enumeration, from 20 labelled rows, z0 a number."""
    args, policy, source, ref_logp, generator = begun
    args.z0, args.liked, args.disliked, args.batch_size, args.steps = "zero", 1.5, 0.5, 10, 1
    args.log_every, args.lr = 1, 0.0
    source.train = source.train[:10]  # all of them are in the batch
    rows, label = torch.cat([source.pairs.chosen[:10], source.pairs.rejected[:10]]), [1] * 10 + [0] * 10
    logp = exact.Table(source)(policy).flatten()
    due = 0.0
    for row, liked in zip(rows.tolist(), label):
        z = 0.5 * (logp[row] - ref_logp[row])
        due = due + (1.5 * (1 - z.sigmoid()) if liked else 0.5 * z.sigmoid()) / 20
    due, = torch.autograd.grad(due, policy.transformer.wte.weight)
    found = []

    def descend(policy, optimizer, *more):
        found.append(policy.transformer.wte.weight.grad.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "descend", descend)
        kto.train(policy, source, ref_logp, args, lambda policy: {}, generator)
    assert torch.allclose(found[0], due, atol=1e-6) and due.abs().max() > 1e-3


def test_pairs_give_as_many_liked_as_disliked_rows(begun):
    """Chosen rows are liked with p, rejected ones with 1 - p."""
    _, _, source, _, _ = begun
    rows, label = thumbs.examples(source, source.train)
    assert torch.equal(rows[label == 1], source.pairs.chosen)
    assert torch.equal(rows[label == 0], source.pairs.rejected)


def test_the_answer_of_kto_is_a_minimum_at_its_own_z0(begun):
    """No small move of any kind lowers the exact expectation, z0 held at KL(answer||ref); and where g < 1/2
    nothing is left."""
    args, _, world, _, _ = begun
    best = kto.answer(world, args, world.ref)
    seen, g = kto.wins(world, args)
    z0 = data.kl(best, world.ref)

    def cost(logp):
        f = logp - world.ref
        liked, disliked = 1 - (0.5 * (f - z0)).sigmoid(), 1 - (0.5 * (z0 - f)).sigmoid()
        return (seen * (g * liked + (1 - g) * disliked)).sum()

    for move in torch.randn(50, *g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        assert cost((best + 1e-3 * move).log_softmax(-1)) > cost(best) - 1e-9
    assert (best.exp() * (g < 0.5)).sum() < 1e-3
    joint = world.pstar.sum(-1) - 0.5  # uniform mu: against the three other responses
    assert torch.allclose(g, joint / 3) and z0 > 0.1
    flipped = kto.wins(world, kto_flags(noise=0.2))[1]
    assert torch.allclose(flipped - 0.5, 0.6 * (g - 0.5))


def test_what_is_said_of_a_policy_of_kto(begun, capsys):
    """Of the answer itself and of the reference: KL from the answer, bad mass and win rate, by loops."""
    args, _, world, ref_logp, _ = begun
    args.z0 = "zero"
    said = kto.exactly(world, args)
    best, g = kto.answer(world, args, world.ref), kto.wins(world, args)[1]
    assert said(best)["kl"] == pytest.approx(0.0, abs=1e-6) and said(best)["bad"] < 1e-3
    bad = sum(world.ref[x, y].exp().item() for x in range(4) for y in range(4) if g[x, y] < 0.5) / 4
    kl = sum(best[x].exp() @ (best[x] - world.ref[x]).nan_to_num() for x in range(4)) / 4
    found = said(world.ref)
    assert found["bad"] == pytest.approx(bad) and 0.05 < bad < 0.95
    assert found["kl"] == pytest.approx(kl.item(), abs=1e-6) and found["kl_ref"] == 0


def test_kto_ends_near_its_answer(tmp_path, capsys):
    """A world of 4 responses: the bad ones lose nearly all mass; KL(answer||pi) falls to a tenth."""
    argv = ["--data", "bt3", "--steps", "500", "--lr", "5e-3", "--sft_steps", "20", "--pairs", "20000"]
    assert start.report("kto", kto.run, [*argv, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad"] < 0.02 and report["kl"] < 0.1


LINES = [{"prompt": f"say {a}:", "response": a + end, "label": end == "!"} for a in "abcdef" for end in "!?"]
SMALL = ["--tokenizer", "bytes", "--block_size", "24", "--n_layer", "1", "--n_head", "1", "--n_embd", "16",
         "--sft_steps", "20", "--steps", "60", "--lr", "1e-2", "--log_every", "30"]


def write(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("".join(f"{text}\n" for text in texts).encode(errors="surrogateescape"))
    return str(path)


def test_unpaired_rows_are_learned(tmp_path, capsys):
    """Held-out prompts: liked rows rise against disliked ones."""
    path = write(tmp_path / "rows.jsonl", LINES)
    for z0 in ("mismatched", "data"):
        argv = ["--data", path, "--z0", z0, *SMALL, "--out", str(tmp_path / z0)]
        assert start.report("kto", kto.run, argv) == 0
        report = json.loads((tmp_path / z0 / "report.json").read_text())
        assert report["liked"] > report["disliked"] + 0.5


def test_rows_are_encoded_as_pairs_are(tmp_path):
    """<|endoftext|> ends a response; prompts are cut on the left; the mismatched row fits, too."""
    lines = LINES + [{"prompt": "y" * 42 + "x" * 8, "response": "yes", "label": True}]
    argv = ["--data", write(tmp_path / "rows.jsonl", lines), "--tokenizer", "bytes", "--holdout", "0"]
    source = thumbs.make(ipo.parse([*argv, "--block_size", "12"]))
    tokens, mask = source.pairs.padded(torch.tensor([0, 12]))
    decode = source.tokenizer.decode
    assert decode(tokens[0][mask[0]].tolist()) == "a!<|endoftext|>"
    assert decode(tokens[1].tolist()) == "x" * 8 + "yes<|endoftext|>"
    assert source.label.tolist() == [1, 0] * 6 + [1] and len(source.train) == 13
    other = kto.mismatched(source.pairs, 12)
    tokens, mask = other.padded(torch.tensor([0, 7]))
    assert decode(tokens[0].tolist()).startswith("say d:a!<|endoftext|>")
    assert decode(tokens[1].tolist()).startswith("say a:d?<|endoftext|>")


def test_sft_sees_liked_rows_and_no_prompt_is_on_both_sides(tmp_path, capsys):
    """Twelve rows of six prompts, a third of the prompts held out."""
    argv = ["--data", write(tmp_path / "rows.jsonl", LINES), "--tokenizer", "bytes", "--holdout", "0.34"]
    source = thumbs.make(ipo.parse(argv))
    assert source.label[source.sft_rows(5, None)].tolist() == [1.0] * 4
    assert len(source.train) == 8 and len(source.eval) == 4
    sides = [{tuple(source.pairs.prompt_ids(row)) for row in rows} for rows in (source.train, source.eval)]
    assert not sides[0] & sides[1]


def test_held_out_ratios_are_means_by_label(tmp_path, capsys):
    """log pi/ref of each held-out row, in a loop; no reference passed is the policy's own."""
    argv = ["--data", write(tmp_path / "rows.jsonl", LINES), "--tokenizer", "bytes", "--holdout", "0.34"]
    args = ipo.parse([*argv, "--block_size", "24", "--n_layer", "1", "--n_embd", "16"])
    source = thumbs.make(args)
    policy = model.GPT(model.GPTConfig(*source.sizes, 1, 4, 16))
    ref_logp = torch.randn(12, generator=torch.Generator().manual_seed(0))
    sums = {0.0: 0.0, 1.0: 0.0}
    for row in source.eval.tolist():
        logp = ipo.sequence_logp(policy, *source.pairs.padded(torch.tensor([row]))).item()
        sums[source.label[row].item()] += (logp - ref_logp[row].item()) / 2
    found = kto.held_out(source, ref_logp, args)(policy)
    assert found["liked"] == pytest.approx(sums[1.0], abs=1e-4)
    assert found["disliked"] == pytest.approx(sums[0.0], abs=1e-4)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "response"}


@pytest.mark.parametrize("first, kind", [
    ("", thumbs.Thumbs), (LINES[0], thumbs.Thumbs), (LINES[0] | PAIR, ipo.FileSource),
    (PAIR, ipo.FileSource)])
def test_the_kind_of_file_is_told_by_its_first_line(first, kind, tmp_path, capsys):
    """A blank line counts as none, a text "response" as no key."""
    lines = [first, *LINES] if kind is thumbs.Thumbs else [first, PAIR]
    argv = ["--data", write(tmp_path / "rows.jsonl", lines), "--tokenizer", "bytes"]
    assert type(thumbs.make(ipo.parse(argv))) is kind


@pytest.mark.parametrize("line, why", [
    ({"prompt": "a", "response": "b"}, "'label' is 'None'"),
    ({"prompt": "a", "response": "b", "label": 1}, "'label' is '1'"),
    (json.dumps({"prompt": "a", "label": True}), '"response": TEXT'), ("\udcff", "no JSON in UTF-8"),
    ({"prompt": "a", "response": "", "label": True}, "'response' is empty"), ("[1]", '"response": TEXT'),
    ({"prompt": 3, "response": "b", "label": True}, '"response": TEXT'), ("{", "no JSON")])
def test_a_bad_row_is_named(line, why, tmp_path, capsys):
    """file:line, one line, exit status 2."""
    path = write(tmp_path / "rows.jsonl", [LINES[0], "", line])
    assert start.report("kto", kto.run, ["--data", path, *SMALL, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path}:3: " in said and why in said


@pytest.mark.parametrize("run, argv, why", [
    (others.run, ["--method", "ppo"], "--method"), (others.run, ["--lam", "-1"], "--lam"),
    (others.run, ["--method", "cdpo", "--smoothing", "1.1"], "--smoothing"),
    (others.run, ["--data", "nosuch.jsonl", "--tokenizer", "bytes"], "nosuch"),
    (kto.run, ["--data", "nosuch.jsonl", "--tokenizer", "bytes"], "nosuch"),
    (thumbs.run, [], "JSONL")])
def test_bad_input_is_one_line(run, argv, why, tmp_path, capsys):
    """Exit status 2."""
    assert start.report("lab", run, ["--out", str(tmp_path), *argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and why in said


def test_one_kind_of_label_is_refused(tmp_path, capsys):
    """A file of likes alone, also if the only others are held out or too long: what there is, what to do."""
    long = {"prompt": "a", "response": "x" * 30, "label": False}
    other = {"prompt": "say a:", "response": "?", "label": False}
    cases = [([], "6 of 6 are true (too long: 0"), ([long], "(too long: 1"), ([other], "(held out: ")]
    for more, said in cases:
        path = write(tmp_path / "likes.jsonl", LINES[::2] + more)
        out = ["--holdout", "0.9", "--out", str(tmp_path / "o")]
        seeds = range(8) if "held out" in said else [0]  # one of them holds the prompt of `other` out
        for seed in seeds:
            argv = ["--data", path, *SMALL, *out, "--steps", "1", "--seed", str(seed)]
            status = start.report("kto", kto.run, argv)
            text = capsys.readouterr().err
            if status:
                break
        assert status == 2 and "true and with false" in text and said in text and text.count("\n") == 1


def test_an_unknown_policy_has_no_z0_by_enumeration(tmp_path, capsys):
    """--z0 policy for a file."""
    rows = write(tmp_path / "rows.jsonl", LINES)
    argv = ["--data", rows, *SMALL, "--z0", "policy", "--out", str(tmp_path)]
    assert start.report("kto", kto.run, argv) == 2
    assert "--z0 policy" in capsys.readouterr().err
