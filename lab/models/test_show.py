"""Claims of lab/models/show.py: what it prints of a run is what the run's loss saw, token by token.
"""
import json
import re

import pytest
import torch

import data
import ipo
import model
from lab.models import show

WORLD = ["--steps", "6", "--sft_steps", "6", "--pairs", "300", "--batch_size", "32", "--lr", "1e-2"]
FILE = ["--steps", "6", "--sft_steps", "3", "--batch_size", "2", "--tokenizer", "bytes", "--n_layer", "1",
        "--n_embd", "16", "--lr", "1e-2", "--block_size", "40"]
NUMBER = r"([-+.\d]+)"


def run(tmp_path, *flags):
    """A finished run in tmp_path/out, on the CPU."""
    assert ipo.main([*flags, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    return str(tmp_path / "out")


def pairs_file(tmp_path):
    items = [{"prompt": "Q?\n" * n, "chosen": "abc", "rejected": "abd\t", "p": 0.5 + n / 40}
             for n in range(1, 20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(tmp_path / "pairs.jsonl")


CASES = [
    ["--data", "bt"], ["--data", "cyclic", "--mu", "ref", "--noise", "0.2"],
    ["--labels", "soft", "--loss", "dpo"],
    ["FILE"], ["FILE", "--logp", "mean", "--holdout", "0"], ["FILE", "--dtype", "bfloat16"]]


@pytest.mark.parametrize("more", CASES)
def test_sums_are_those_in_the_loss(tmp_path, more):
    """Tokens' log ref sum to the cache that training subtracted, log pi to the checkpoint's, and the
    pairs are those that the run trained on: its generator draws them again."""
    flags = [*FILE, "--data", pairs_file(tmp_path), *more[1:]] if more[0] == "FILE" else [*WORLD, *more]
    seen = []
    batch = data.PairData.batch

    def watched(self, pairs, device="cpu"):
        seen.extend(zip(pairs.tolist(), self.chosen[pairs].tolist(), self.rejected[pairs].tolist()))
        return batch(self, pairs, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.PairData, "batch", watched)
        out = run(tmp_path, *flags)
    args, source, rows, ref, pi = show.rescore(out, 300)
    assert len(rows) == 2 * len(source.pairs.p) == 2 * (19 if more[0] == "FILE" else 300)
    shown = rows.view(-1, 2).tolist()
    assert len(seen) > 10 and all(shown[pair] == [y, z] and pair in source.train for pair, y, z in seen)
    sums = torch.stack([show.total(logp, args) for logp in ref])
    near = {"rtol": 1e-3, "atol": 0.1} if args.dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-4}
    assert torch.allclose(sums, torch.load(f"{out}/ref.pt")["ref_logp"][rows], **near)
    policy, _ = model.load(f"{out}/ckpt.pt")
    expected = ipo.score(policy, source.pairs, rows, args, args.logp == "mean")
    sums = torch.stack([show.total(logp, args) for logp in pi])
    assert torch.allclose(sums, expected, **near) and (sums - expected.mean()).abs().max() > 0.1


def test_what_is_printed(tmp_path, capsys):
    """Tokens, their numbers' sums, h, target and loss of each pair: the mean h and loss are the report's;
    what both responses share at the start has one log pi/ref."""
    out = run(tmp_path, *FILE, "--data", pairs_file(tmp_path), "--holdout", "0")
    capsys.readouterr()
    assert show.main(["--out", out, "--pairs", "100"]) == 0
    said = capsys.readouterr().out
    said, table = said.split("\nlog pi/ref of ")
    shown = said.split("\npair ")[1:]
    assert len(shown) == 19 and shown[1].startswith("2: 'Q?\\nQ?\\n'\n") and "(held out)" not in said
    values, gains = [], {}
    for n, text in enumerate(shown, 1):
        _, chosen, rejected, last = text.strip().split("\n")
        ratios = []
        for line, name, end in (chosen, "chosen", "c"), (rejected, "rejected", "d \\t"):
            head, tokens = line.split(" = ")
            assert re.sub(r"\[.*?\]", "", tokens) == f"a b {end} <|endoftext|>" and head.split()[0] == name
            found = re.findall(rf"\[{NUMBER} {NUMBER}\]", tokens)
            numbers = torch.tensor([list(map(float, pair)) for pair in found])
            assert numbers.sum(0).tolist() == pytest.approx(list(map(float, head.split()[1:])), abs=0.04)
            ratios.append(numbers[:, 1])
            for token, gain in zip(f"a b {end} <|endoftext|>".split(), numbers[:, 1].tolist()):
                gains.setdefault(token, []).append(gain)
        assert torch.equal(ratios[0][:2], ratios[1][:2])
        form = rf"  p {NUMBER}: h {NUMBER} -> {NUMBER}, loss {NUMBER}"
        p, h, aim, loss = map(float, re.fullmatch(form, last).groups())
        assert h == pytest.approx((ratios[0].sum() - ratios[1].sum()).item(), abs=0.05)
        assert aim == pytest.approx((2 * (0.5 + n / 40) - 1) / 0.2, abs=1e-3)
        assert loss == pytest.approx((h - aim) ** 2, abs=0.01) and p == pytest.approx(0.5 + n / 40, abs=0.01)
        values.append([h, loss])
    lines = [re.fullmatch(rf"  '(\S+)' +{NUMBER} \+- {NUMBER}, (\d+) times", line).groups()
             for line in table.strip().split("\n")[1:]]
    assert {token: int(n) for token, _, _, n in lines} == {token: len(seen) for token, seen in gains.items()}
    means = [float(mean) for _, mean, _, _ in lines]
    assert means == sorted(means, reverse=True)
    for token, mean, std, _ in lines:
        seen = torch.tensor(gains[token])
        assert [float(mean), float(std)] == pytest.approx([seen.mean().item(), seen.std().item()], abs=0.011)
    after = json.loads((tmp_path / "out/report.json").read_text())["after"]
    assert torch.tensor(values).mean(0).tolist() == pytest.approx([after["h"], after["loss"]], abs=1e-3)


def test_held_out_pairs_are_named(tmp_path, capsys):
    """As many as the run held out."""
    out = run(tmp_path, *FILE, "--data", pairs_file(tmp_path), "--holdout", "0.3")
    held = re.search(r"(\d+) held out \(0", capsys.readouterr().out)
    assert show.main(["--out", out, "--pairs", "19"]) == 0
    assert capsys.readouterr().out.count("(held out)") == int(held[1]) > 0


def test_a_run_of_lab_hf_is_shown(tmp_path, capsys):
    """Its tokenizer's tokens, behind its model's <s>: sums equal to the cache."""
    pytest.importorskip("transformers")
    from lab.models import test_hf
    from lab.models import hf
    test_hf.random_model(tmp_path / "in", "gemma2")
    test_hf.byte_tokenizer(tmp_path / "in")
    test_hf.write(tmp_path / "pairs.jsonl", *test_hf.FIVE[:1] * 3)
    assert hf.main(test_hf.flags(tmp_path, "--logp", "mean")) == 0
    capsys.readouterr()
    assert show.main(["--out", str(tmp_path / "out"), "--pairs", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"chosen .* = Yes\[\S+ \S+\] \.\[\S+ \S+\] <\|im_end\|>\[\S+ \S+\]\n", said), said
    assert "user\\nHi<|im_end|>" in said
    args, source, rows, ref, pi = show.rescore(str(tmp_path / "out"), 3)
    cached = torch.load(tmp_path / "out/ref.pt")["ref_logp"][rows]
    assert torch.allclose(torch.stack([logp.mean() for logp in ref]), cached, atol=1e-4)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(ref, pi))


def test_a_run_from_another_run_has_its_tokenizer_and_context(tmp_path, capsys):
    """Those of the weights, not of the flags: prompts are cut as in the run."""
    run(tmp_path, *FILE, "--data", pairs_file(tmp_path))
    (tmp_path / "out").rename(tmp_path / "first")
    start = ["--init_from", str(tmp_path / "first/ckpt.pt"), "--data", pairs_file(tmp_path)]
    out = run(tmp_path, *start, "--steps", "3", "--batch_size", "2")
    capsys.readouterr()
    assert show.main(["--out", out, "--pairs", "1"]) == 0
    assert "8 prompts cut from the left to fit 40 tokens" in capsys.readouterr().out


def test_a_run_in_bfloat16_is_scored_in_bfloat16(tmp_path, monkeypatch):
    """Every logit that show reads has the dtype of the run's matrix products."""
    out = run(tmp_path, *FILE, "--data", pairs_file(tmp_path), "--dtype", "bfloat16")
    head, seen = model.GPT.head, set()

    def watched(self, x):
        logits = head(self, x)
        seen.add(logits.dtype)
        return logits
    monkeypatch.setattr(model.GPT, "head", watched)
    show.rescore(out, 3)
    assert seen == {torch.bfloat16}


def test_what_cannot_be_shown_is_refused_in_a_line(tmp_path, capsys):
    """No run, no number, an unfinished run, a file with another word or fewer lines, or without the file."""
    path = pairs_file(tmp_path)
    out = run(tmp_path, *FILE, "--data", path)
    capsys.readouterr()

    def refused(words, *argv):
        assert show.main(list(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith("show.py: ") and words in said and said.count("\n") == 1, said
    refused("config.json", "--out", str(tmp_path / "none"))
    refused("--pairs 0", "--out", out, "--pairs", "0")
    refused("unrecognized arguments", "--out", out, "--tau", "1")
    text = open(path).read()
    for edited in text.replace("abc", "abx"), text[text.index("\n") + 1:], text + text.replace("Q", "A"):
        open(path, "w").write(edited)
        refused(f"--data {path} has changed since the run", "--out", out)
    open(path, "w").write(text)
    (tmp_path / "out/ckpt.pt").unlink()
    refused("ckpt.pt", "--out", out)
    (tmp_path / "pairs.jsonl").unlink()
    refused("pairs.jsonl", "--out", out)
