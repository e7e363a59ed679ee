"""The claims of kto: its loss, z0, exact answer and rows with labels."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import ipo
from lab.common import start
from lab.methods import kto

pytestmark = pytest.mark.usefixtures("bt3")
WORLD = ["--data", "bt3", "--pairs", "2000", "--sft_steps", "20", "--device", "cpu", "--tau", "0.5"]
LINES = [
    {"prompt": f"say {a}:", "completion": a + end, "label": end == "!"}
    for a in "abcdef" for end in "!?"]
FILE = ["--tokenizer", "bytes", "--block_size", "24", "--n_layer", "1", "--n_head", "1", "--n_embd", "16",
        "--sft_steps", "20", "--steps", "60", "--lr", "1e-2", "--log_every", "30"]


@pytest.fixture(scope="module")
def made(bt3, tmp_path_factory):
    args = ipo.parse([*WORLD, "--out", str(tmp_path_factory.mktemp("kto"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipo, "psi", lambda q: q)
        policy, source = start.start(args, kto.World)
    return args, policy, source


@pytest.fixture
def begun(made):
    """(args, policy, source) before training, for each test its own."""
    return copy.deepcopy(made)


def test_the_cost_by_hand():
    def s(z):
        return 1 / (1 + math.exp(-z))

    f, label = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
    args = SimpleNamespace(tau=0.5)
    liked, disliked = kto.cost(f, torch.tensor(0.4), label, args).tolist()
    assert liked == pytest.approx(1 - s(-0.05), abs=1e-6)
    assert disliked == pytest.approx(1 - s(0.5 * 2.4), abs=1e-6)


def moved(policy):
    with torch.no_grad():
        policy.transformer.wte.weight += 0.1 * torch.randn_like(policy.transformer.wte.weight)


def test_z0_of_the_policy_is_its_kl(begun):
    args, policy, source = begun
    z0 = kto.anchor(policy, source, args)
    moved(policy)
    due = data.kl(source.table(policy), source.exact["ref"])
    assert z0(policy, None).item() == pytest.approx(due.item(), abs=1e-5)
    assert not z0(policy, None).requires_grad


def test_mismatched_z0_is_a_mean_after_other_prompts(begun):
    args, policy, source = begun
    args.data = "a file"  # so the paper's estimate is taken
    z0 = kto.anchor(policy, source, args)
    moved(policy)
    ratio = source.table(policy) - source.exact["ref"]
    other = ratio.roll(-2, 0).flatten()  # of the prompt two further on
    rows = other.topk(5).indices
    assert z0(policy, rows).item() == pytest.approx(other[rows].mean().item(), abs=1e-4)


def test_mismatched_z0_is_never_below_zero(begun):
    args, policy, source = begun
    args.data = "a file"  # so the paper's estimate is taken
    z0 = kto.anchor(policy, source, args)
    moved(policy)
    ratio = source.table(policy) - source.exact["ref"]
    rows = (-ratio.roll(-2, 0)).flatten().topk(5).indices
    assert z0(policy, rows) == 0


def test_pairs_give_as_many_liked_as_disliked_rows(begun):
    _, _, source = begun
    rows, label = source.labelled(source.train)
    assert torch.equal(rows[label == 1], source.pairs.chosen)
    assert torch.equal(rows[label == 0], source.pairs.rejected)


def test_a_step_descends_the_mean_over_its_rows(begun):
    """Ten pairs, so twenty rows, all in one batch."""
    args, policy, source = begun
    vars(args).update(batch_size=10, steps=1)
    source.train = source.train[:10]
    moved(policy)
    ratio = (source.table(policy) - source.exact["ref"]).flatten()
    z0, total = data.kl(source.table(policy), source.exact["ref"]), 0.0
    for chosen, rejected in zip(source.pairs.chosen[:10], source.pairs.rejected[:10]):
        total += (0.5 * (z0 - ratio[chosen])).sigmoid() / 20
        total += (0.5 * (ratio[rejected] - z0)).sigmoid() / 20
    found, = kto.losses(policy, source, args)
    assert found.item() == pytest.approx(total.item(), abs=1e-5)


def test_no_small_move_lowers_the_cost_of_the_answer(begun):
    """z0 is held at KL(answer||ref)."""
    args, _, world = begun
    best, ref, g = world.answer, world.exact["ref"], world.g
    z0 = data.kl(best, ref)

    def mean(logp):
        return kto.cost(logp - ref, z0, g, args).mean()

    random = torch.Generator().manual_seed(0)
    for move in torch.randn(50, *g.shape, dtype=torch.float64, generator=random):
        assert mean((best + 1e-3 * move).log_softmax(-1)) > mean(best) - 1e-9


def test_the_answer_leaves_nothing_where_g_is_below_one_half(begun):
    _, _, world = begun
    bad = world.answer.exp() * (world.g < 0.5)
    assert bad.sum() < 1e-3
    assert (world.g < 0.5).any()


def test_training_ends_near_the_answer(tmp_path):
    few = ["--pairs", "20000", "--steps", "400", "--lr", "5e-3", "--batch_size", "64", "--n_embd", "16"]
    argv = [*WORLD, *few, "--out", str(tmp_path)]
    assert start.main("kto", kto.run, argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["mass where g < 1/2"] < 0.02
    assert report["KL(answer||pi)"] < 0.1


# ------------------------------------------------------------------------------------------------------ files

def write(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return str(path)


def thumbs_of(tmp_path, lines, *more):
    argv = ["--data", write(tmp_path / "rows.jsonl", lines), "--tokenizer", "bytes", *more]
    return kto.Thumbs(ipo.parse(argv))


def test_unpaired_rows_are_learned(tmp_path, capsys):
    argv = ["--data", write(tmp_path / "rows.jsonl", LINES), *FILE, "--out", str(tmp_path / "o")]
    assert start.main("kto", kto.run, argv) == 0
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["liked"] > report["disliked"] + 0.5
    assert "Liked rows moved by" in capsys.readouterr().out


def test_a_row_ends_with_end_of_text_and_has_its_label(tmp_path):
    source = thumbs_of(tmp_path, LINES, "--holdout", "0")
    rows, label = source.labelled(source.train)
    tokens, mask = source.pairs.padded(rows[:1])
    assert source.tokenizer.decode(tokens[0][mask[0]].tolist()) == "a!<|endoftext|>"
    assert label.tolist() == [1, 0] * 6


def test_sft_sees_the_liked_rows_alone(tmp_path):
    source = thumbs_of(tmp_path, LINES, "--holdout", "0.34")
    seen = source.sft_weight.nonzero()[:, 0]
    rows, label = source.labelled(source.train)
    assert torch.equal(seen, rows[label == 1])


def test_no_prompt_is_on_both_sides(tmp_path):
    source = thumbs_of(tmp_path, LINES, "--holdout", "0.34")
    sides = [set(source.pairs.prompt[part].tolist()) for part in (source.train, source.held_out)]
    assert sides[0].isdisjoint(sides[1])


@pytest.mark.parametrize("line, why", [
    ({"prompt": "a", "completion": "b"}, "'label' is not among prompt, completion; write"),
    ({"prompt": "a", "completion": "b", "label": 1}, "'label' is 1"),
    ({"prompt": "a", "label": True}, "'completion' is not among prompt, label; write"),
    ({"prompt": 3, "completion": "b", "label": True}, "'prompt' is 3"),
    ("{", "no JSON")])
def test_a_bad_row_is_named(line, why, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [LINES[0], "", line])
    assert start.main("kto", kto.run, ["--data", path, *FILE, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"kto: {path}:3: ")
    assert why in said
    assert said.count("\n") == 1


def test_an_empty_file_is_told_what_kto_reads(tmp_path, capsys):
    """Its own keys, and not those of pairs."""
    path = write(tmp_path / "rows.jsonl", [])
    assert start.main("kto", kto.run, ["--data", path, *FILE, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert kto.NEEDED in said
    assert "chosen" not in said


def test_no_row_is_dropped_for_what_it_says(tmp_path, capsys):
    """A dash is an answer. The same answer with another label is not the same row."""
    lines = [{"prompt": "a", "completion": "-", "label": label} for label in (True, False)]
    source = thumbs_of(tmp_path, [*LINES, *lines], "--holdout", "0")
    assert len(source.train) == len(LINES) + 2
    said = capsys.readouterr().out
    assert "dropped" not in said
    assert "twice" not in said


def test_keys_that_kto_does_not_use_are_counted(tmp_path, capsys):
    thumbs_of(tmp_path, [*LINES, LINES[0] | {"score": 3}], "--holdout", "0")
    assert "1 lines with keys that are not used: 'score'" in capsys.readouterr().out


def test_one_kind_of_label_is_refused(tmp_path, capsys):
    path = write(tmp_path / "likes.jsonl", LINES[::2])
    assert start.main("kto", kto.run, ["--data", path, *FILE, "--out", str(tmp_path / "o")]) == 2
    assert "6 of 6 rows" in capsys.readouterr().err


@pytest.mark.parametrize("argv, why", [
    (["--data", "nosuch.jsonl", "--tokenizer", "bytes"], "nosuch"),
    (["--loss", "ipo"], "--loss does nothing")])
def test_bad_input_is_one_line(argv, why, tmp_path, capsys):
    assert start.main("kto", kto.run, ["--out", str(tmp_path), *argv]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
