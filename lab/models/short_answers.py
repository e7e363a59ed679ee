"""Does IPO do on a pretrained chat model what it does in the toy world?

  python -m lab.models.short_answers --init_from out/smollm2         IPO at tau .1
  python -m lab.models.short_answers --init_from out/smollm2 --loss dpo --kind deterministic
  python -m lab.models.short_answers --init_from out/smollm2 --all   nine runs, their table and a picture

--init_from: a folder with a chat model, such as python -m lab.models.smollm2 makes.

The model answers 60 questions, six times each, in at most --tokens tokens, at temperature .7. We made up what
is preferred, the shorter answer. Each word costs a quarter of a nat, and p*(y>y') = s(r(y) - r(y')). With
--kind deterministic the shorter one always wins. A step takes all 15 pairs of one question's answers, with a
coin flip for each. Every third question is held out. At the end the policy answers these anew.

Printed: means over held-out questions, with their standard errors in brackets. The six answers to a question
are a small world. In it h, chosen and accuracy are means over pairs and labels, win is the win rate, and
log pi*/ref is g/tau, up to a constant. DPO's pi* has infinite margins on certain labels. "new win" is of new
answers against the reference's, and always Bradley-Terry's.
--all leaves each run in a folder of its own below --out. Started again, it skips those that are finished.
Traps: with --mean u is divided by the number of tokens and multiplied by its mean, so that tau compares with
the sum's. An answer that is cut is scored without end of text.
"""
from pathlib import Path

import torch

import data
import ipo
from lab.common import exact, pictures, start
from lab.models import chat, hf

QUESTIONS = Path(__file__).with_name("questions.txt")
BEFORE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cow?"},
          {"role": "assistant", "content": "A farm animal."}]
ANSWERS, TEMPERATURE = 6, 0.7  # to a question; of policy and reference
DEFAULTS = "--tau 0.1 --steps 20 --batch_size 3 --lr 2e-5 --log_every 5 --out out/chat"
USELESS = ("data labels mu pairs batch_size tokenizer holdout block_size sft_steps sft_lr n_layer n_head "
           "n_embd dtype overwrite").split()
# of --all
RUNS = """
ipo          --loss ipo
mean         --loss ipo --mean
dpo          --loss dpo
ipo-certain  --loss ipo --kind deterministic
dpo-certain  --loss dpo --kind deterministic
ipo-.5       --loss ipo --tau 0.5
ipo-.5-slow  --loss ipo --tau 0.5 --lr 5e-6
mean-.5      --loss ipo --tau 0.5 --mean
dpo-.5       --loss dpo --tau 0.5
"""
COLUMNS = "h,h at pi*,chosen,chosen at pi*,accuracy,win,win at pi*,new win,KL,words".split(",")


def load(args, tokenizer):
    """The policy in --init_from, at TEMPERATURE."""
    policy = hf.load(args.init_from, tokenizer).to(args.device)
    policy.temperature = TEMPERATURE
    return policy


def answered(policy, tokenizer, questions, args):  # -> data.PairData
    """What the policy says to X questions, Y = ANSWERS times each. It is the reference of these answers.

    An answer that is not cut has its end of text. Also asked, texts, and reward (X,Y), where a word costs 1/4
    nat. Raises Refused if the model has no chat template.
    """
    own = tokenizer.hf
    own.pad_token = own.eos_token
    asked = []
    for question in questions:
        asked += ANSWERS * [[*BEFORE, {"role": "user", "content": question}]]
    try:
        prompts = own.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    except Exception as error:  # jinja's, and what a template raises itself
        raise chat.refused(args.init_from, error, "take one whose chat template has system turns") from None
    rows = own.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    said = policy.hf.generate(
        **rows.to(args.device), do_sample=True, temperature=TEMPERATURE, top_k=0,
        max_new_tokens=args.tokens)
    answers = []
    for ids in said[:, rows["input_ids"].shape[1]:].tolist():
        stop = [*ids, tokenizer.eot_token].index(tokenizer.eot_token) + 1
        answers.append(ids[:stop])
    pairs = data.PairData(prompts, answers)
    pairs.ref_logp = ipo.score(policy, pairs, args)
    pairs.asked = questions
    pairs.texts = own.batch_decode(answers, skip_special_tokens=True)
    words = [len(text.split()) for text in pairs.texts]
    pairs.reward = torch.tensor(words).view(-1, ANSWERS) / -4
    print(f"{len(questions)} questions are answered, in {-4 * pairs.reward.mean():.2f} words on average")
    return pairs


def prefer(pairs, args):
    """Gives pairs pstar (X,Y,Y) of --kind; g (X,Y), how often an answer wins; chance (X,Y,Y) of a pair that
    its first won; best (X,Y), log pi*/ref of the small world.
    """
    pairs.pstar = data.preference(args.kind, pairs.reward, None)
    mu = torch.full_like(pairs.reward, 1 / ANSWERS)
    pairs.g = data.mean_over_opponents(pairs.pstar, mu)
    pairs.chance = 2 * pairs.pstar * exact.weights(mu)
    worth = ipo.PSI_OF[args.loss](pairs.pstar)
    pairs.best = data.optimum(mu.log(), worth, mu, args.tau) - mu.log()


def numbers(logp, pairs):  # (R,) -> {name: (X,)}
    """Of a policy with these log-probs: means over all pairs of two answers to a question, and labels."""
    u = (logp - pairs.ref_logp).view(-1, ANSWERS)
    h = exact.margins(u, 0 * u)
    numbers = {"h": h, "chosen": u[:, :, None], "accuracy": h.sign() / 2 + 0.5}
    for name, each in numbers.items():
        numbers[name] = (pairs.chance * each).sum((1, 2))
    numbers["win"] = (u.softmax(1) * pairs.g).sum(1)
    return numbers


def losses(policy, source, args):
    """The loss of each step: all pairs of one question's answers, with a coin flip for each pair."""
    random = ipo.generator(args, 2)
    n = source.length - source.prompt_len  # (R,) tokens in an answer
    scale = (n.float().mean() / n) ** args.mean  # all 1 without --mean
    y, z = torch.triu_indices(ANSWERS, ANSWERS, 1)
    for x in data.shuffled(len(source.pstar), 1, args.steps, random):
        rows = x * ANSWERS + torch.arange(ANSWERS)
        logp = ipo.sequence_logp(policy, *source.padded(rows))
        u = scale[rows] * (logp - source.ref_logp[rows])
        wins = torch.rand(len(y), generator=random) < source.pstar[x, y, z]
        h = u[y] - u[z]
        loss = ipo.LOSSES[args.loss](h, wins.float(), args.tau)  # p = 0 means that z won
        yield loss.mean()


def spread(each):  # (X,...) -> text
    """The mean, and in brackets its standard error over questions; "infinite" if it is over 10,000."""
    each = each.reshape(len(each), -1).mean(1)
    if each.mean().abs() > 1e4:
        return "infinite"
    return f"{each.mean():.2f} ({each.std() / len(each) ** 0.5:.2f})"


def experiment(tokenizer, source, held, args):
    """One run, to report.json -> its figures. source, held: answers to train on, and held-out ones."""
    start.make_folder(args.out)
    for pairs in source, held:
        prefer(pairs, args)
    policy = load(args, tokenizer)

    def evaluate(policy):
        logp = ipo.score(policy, held, args)
        return ipo.means(numbers(logp, held))

    start.fit(policy, losses(policy, source, args), args, evaluate)
    known = {"": ipo.score(policy, held, args), " at pi*": held.ref_logp + held.best.flatten()}
    figures = {}
    for where, logp in known.items():
        for name, each in numbers(logp, held).items():
            figures[name + where] = spread(each)
    torch.manual_seed(args.seed + 1)  # not that of the reference's answers
    fresh = answered(policy, tokenizer, held.asked, args)
    for texts in zip(held.asked, held.texts[::ANSWERS], fresh.texts[::ANSWERS]):
        print(*texts, sep="\n  ")
    won = (fresh.reward[:, :, None] - held.reward[:, None]).sigmoid()
    far = fresh.ref_logp - ipo.score(load(args, tokenizer), fresh, args)  # ref_logp is the policy's own here
    figures["new win"] = spread(won)
    figures["KL"] = spread(far.view(-1, ANSWERS))
    figures["words"] = spread(-4 * fresh.reward)
    answer = f"New answers win {figures['new win']}, at KL(pi||ref) {figures['KL']} nats."
    start.finish(args, answer, figures)
    return figures


def planned(own, argv, out):
    """The flags of each of RUNS, by name. Raises Refused if its folder holds a run with others."""
    start.refuse_given(argv, {"loss", "tau", "lr", "mean", "kind"}, "is set by --all")
    runs = {}
    for line in RUNS.strip().splitlines():
        name, *flags = line.split()
        args = start.parse(own, [*argv, *flags, "--out", f"{out}/{name}"], DEFAULTS, USELESS)
        found = pictures.report_of(args.out).get("flags")
        if found not in (None, vars(args)):
            raise data.Refused(f"{args.out} holds a run with other flags; name another --out, or remove it")
        runs[name] = args
    return runs


def compare(tokenizer, source, held, runs, out):
    """Makes all these runs, but for those whose report is there; their table and picture."""
    rows = {}
    for name, args in runs.items():
        done = pictures.report_of(args.out)
        print(f"{args.out} {'is finished' if done else 'begins'}")
        report = done or experiment(tokenizer, source, held, args)
        rows[name] = start.Row((column, report[column]) for column in COLUMNS)
    drawn = []
    for name in "ipo", "mean", "dpo":
        one = pictures.read(runs[name].out)
        one.flags["loss"] = name  # its label
        for number in "h", "win":
            one.opt[number] = float(rows[name][f"{number} at pi*"].split()[0])
        drawn.append(one)
    pictures.draw_runs(drawn, f"{out}/runs.png")
    return rows


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--mean", action="store_true", help="average over tokens, where the paper sums")
    own.add_argument("--kind", choices=["bt", "deterministic"], default="bt", help="of preference [bt]")
    own.add_argument("--tokens", type=int, choices=[8, 24, 72], default=24, help="in an answer, at most [24]")
    own.add_argument("--all", action="store_true", help="nine runs with their table and picture")
    args = start.parse(own, argv, DEFAULTS, USELESS)
    if not args.init_from:
        raise data.Refused("give --init_from, the folder that lab.models.smollm2 --make FOLDER writes")
    runs = planned(own, argv, args.out) if args.all else {}
    start.make_folder(args.out)
    tokenizer = chat.Tokenizer(args.init_from)
    policy = load(args, tokenizer)
    torch.manual_seed(args.seed)
    questions = QUESTIONS.read_text().splitlines()
    held = answered(policy, tokenizer, questions[::3], args)
    source = answered(policy, tokenizer, questions[1::3] + questions[2::3], args)
    if not runs:
        return experiment(tokenizer, source, held, args)
    rows = compare(tokenizer, source, held, runs, args.out)
    answer = f"At tau .1 IPO ends {rows['ipo']['KL']} nats from the reference, and DPO {rows['dpo']['KL']}."
    start.finish(args, answer, start.table("run", rows))


if __name__ == "__main__":
    raise SystemExit(start.main("short_answers", run, threads=torch.get_num_threads()))
