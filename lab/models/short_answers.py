"""Does IPO do on a pretrained chat model what it does in the toy world?

  python -m lab.models.short_answers --init_from out/smollm2         IPO at tau .1
  python -m lab.models.short_answers --init_from out/smollm2 --loss dpo --kind deterministic --out out/chat/dpo

--init_from: a folder with a chat model, such as python -m lab.models.smollm2 makes.

The model answers 60 questions, six times each, in at most 24 tokens at temperature .7. We made up what is
preferred, the shorter answer: each word more costs a quarter of a nat, and p*(y>y') = s(r(y) - r(y')). With
--kind deterministic the shorter one always wins. A step takes all 15 pairs of one question's answers, with a
coin flip for each. Every third question is held out. At the end the policy answers these anew.

Printed: means over pairs and labels of held-out questions, with standard errors over questions. "pi*" is that
of the small world of six answers, where log pi*/ref is g/tau up to a constant. DPO's on certain labels is
infinitely far, and millions stand there. The win rate is against the reference's answers, and always
Bradley-Terry's.
Traps: with --mean u is divided by the number of tokens and multiplied by its mean, so that tau compares with
the sum's. An answer that is cut is scored without end of text.
"""
import sys
from pathlib import Path

import torch

import data
import ipo
from data import Refused
from lab.common import exact, start
from lab.models import chat, hf

QUESTIONS = Path(__file__).with_name("questions.txt")
BEFORE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cow?"},
          {"role": "assistant", "content": "A farm animal."}]
ANSWERS, TOKENS, TEMPERATURE = 6, 24, 0.7  # to a question; in an answer, at most; of policy and reference
DEFAULTS = "--tau 0.1 --steps 20 --batch_size 3 --lr 2e-5 --log_every 10 --out out/chat/ipo"
USELESS = ("data labels mu pairs batch_size tokenizer holdout block_size sft_steps sft_lr n_layer n_head "
           "n_embd dtype overwrite").split()


def load(args, tokenizer):
    """The policy in --init_from, at TEMPERATURE."""
    policy = hf.load(args.init_from, tokenizer).to(args.device)
    head = policy.head
    policy.head = lambda x: head(x) / TEMPERATURE
    return policy


def answered(policy, tokenizer, questions, args):  # -> data.PairData
    """What the policy says to X questions, Y = ANSWERS times each. It is the reference of these answers.

    An answer that is not cut has its end of text. Also texts; reward (X,Y), where a word costs 1/4 nat; pstar
    (X,Y,Y); chance (X,Y,Y) of a pair that its first won; best (X,Y), log pi*/ref of this small world.
    """
    own = tokenizer.hf
    own.pad_token = own.eos_token
    end = own.eos_token_id
    asked = [[*BEFORE, {"role": "user", "content": question}]
             for question in questions for _ in range(ANSWERS)]
    prompts = own.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    rows = own.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    said = policy.hf.generate(
        **rows.to(args.device), do_sample=True, temperature=TEMPERATURE, top_k=0,
        max_new_tokens=TOKENS)
    answers = []
    for ids in said[:, rows["input_ids"].shape[1]:].tolist():
        stop = [*ids, end].index(end) + 1
        answers.append(ids[:stop])
    pairs = data.PairData(prompts, answers)
    pairs.ref_logp = ipo.score(policy, pairs, args)
    pairs.texts = own.batch_decode(answers, skip_special_tokens=True)
    words = [len(text.split()) for text in pairs.texts]
    pairs.reward = torch.tensor(words).view(-1, ANSWERS) / -4
    pairs.pstar = data.preference(args.kind, pairs.reward, None)
    mu = torch.full_like(pairs.reward, 1 / ANSWERS)
    pairs.chance = 2 * pairs.pstar * exact.weights(mu)
    worth = ipo.PSI_OF[args.loss](pairs.pstar)
    pairs.best = data.optimum(mu.log(), worth, mu, args.tau) - mu.log()
    print(f"{len(questions)} questions are answered")
    return pairs


def numbers(logp, pairs):  # (R,) -> {name: (X,)}
    """Of a policy with these log-probs: means over all pairs of two answers to a question, and labels."""
    u = (logp - pairs.ref_logp).view(-1, ANSWERS)
    h = exact.margins(u, 0 * u)
    numbers = {"h": h, "chosen": u[:, :, None], "accuracy": h.sign() / 2 + 0.5}
    for name, each in numbers.items():
        numbers[name] = (pairs.chance * each).sum((1, 2))
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
    """The mean, and its standard error over questions."""
    each = each.reshape(len(each), -1).mean(1)
    return f"{each.mean():.3f} +- {each.std() / len(each) ** 0.5:.3f}"


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--mean", action="store_true", help="average over tokens, where the paper sums")
    own.add_argument("--kind", choices=["bt", "deterministic"], default="bt", help="of preference [bt]")
    args = start.parse(own, argv, DEFAULTS, USELESS)
    if not args.init_from:
        raise Refused("give --init_from, the folder that python -m lab.models.smollm2 --make FOLDER writes")
    start.make_folder(args.out)
    tokenizer = chat.Tokenizer(args.init_from)
    policy = load(args, tokenizer)
    torch.manual_seed(args.seed)
    questions = QUESTIONS.read_text().splitlines()
    asked = questions[::3]
    held = answered(policy, tokenizer, asked, args)
    source = answered(policy, tokenizer, questions[1::3] + questions[2::3], args)
    start.fit(policy, losses(policy, source, args), args,
              lambda policy: ipo.means(numbers(ipo.score(policy, held, args), held)))
    fresh = answered(policy, tokenizer, asked, args)
    for texts in zip(asked, held.texts[::ANSWERS], fresh.texts[::ANSWERS]):
        print(*texts, sep="\n  ")
    known = {"": ipo.score(policy, held, args), " at pi*": held.ref_logp + held.best.flatten()}
    figures = {"words before": spread(-4 * held.reward), "words after": spread(-4 * fresh.reward)}
    for where, logp in known.items():
        for name, each in numbers(logp, held).items():
            figures[name + where] = spread(each)
    won = (fresh.reward[:, :, None] - held.reward[:, None]).sigmoid()
    far = fresh.ref_logp - ipo.score(load(args, tokenizer), fresh, args)  # ref here is the policy
    answer = f"New answers win {spread(won)} against the reference's, "
    answer += f"at KL(pi||ref) {spread(far.view(-1, ANSWERS))} nats."
    start.finish(args, answer, figures)


if __name__ == "__main__":
    sys.exit(start.main("short_answers", run, threads=torch.get_num_threads()))
