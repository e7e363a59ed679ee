"""Preference pairs: read from a JSONL file or drawn from a synthetic world, then encoded and batched.

    {"prompt", "chosen", "rejected", "p"} -> Pair --encode--> PairData (token ids) --batch--> Batch (tensors)

A row is a prompt with one response. A pair is two rows of one prompt and p, the probability that an annotator
prefers the first ("chosen") to the second ("rejected"). A world is small enough to enumerate, so all of its
preferences are known, and with them the exact optimum. Nothing here touches a parameter.
Sizes: B pairs in a batch, N in all, R rows, T tokens, X prompts of a world, Y responses to each.
"""
import itertools
import json
import os
from array import array
from collections import Counter
from typing import NamedTuple

import tiktoken
import torch

EOT = "<|endoftext|>"


class Refused(ValueError):
    """Bad input, in one line: where (file:line, key or flag), what, and the remedy."""


class Pair(NamedTuple):
    """One comparison, as text."""
    prompt: str
    chosen: str
    rejected: str
    p: float = 1.0         # probability that chosen is preferred
    where: str = "a pair"  # file:line, for error messages


class Batch(NamedTuple):
    """B pairs as tensors: rows 0..B-1 hold the chosen responses, rows B..2B-1 the rejected ones."""
    tokens: torch.Tensor  # (2B,T) int64, padded on the right: under causal attention that changes no log-prob
    mask: torch.Tensor    # (2B,T) bool, True on response tokens, <|endoftext|> included
    p: torch.Tensor       # (B,) float32


def finite(numbers):
    """Tensors () -> floats; None for what is infinite or unknown: JSON has neither."""
    return {name: value.item() if value.isfinite() else None for name, value in numbers.items()}


def tell(where, notes):
    """Prints a line for each thing that happened."""
    for what, n in (+notes).items():  # +: without those that never happened
        print(f"{where}: {n:,} {what}")


def get_tokenizer(name):
    """A tiktoken encoding: "gpt2", "bytes", or "words W W ...", of a world whose responses are these words.

    Its ids: the words, then <|endoftext|>, what prompts are made of, and 256 single bytes, so any text works.
    """
    kind, *words = name.split()
    if kind not in ("words", "bytes"):
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # tiktoken passes on whatever its HTTP library or the file system raises
            raise Refused(f"--tokenizer {name}: neither on disk nor downloaded ({type(error).__name__}); set "
                          "TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes") from None
    texts = [f" {word}" for word in words] + [EOT]
    if kind == "words":
        texts += ["review of the"] + [f" {subject}:" for subject in SUBJECTS]
    ids = {text.encode(): i for i, text in enumerate(texts) if text != EOT}
    ids |= {bytes([byte]): len(texts) + byte for byte in range(256)}
    pattern = r"review of the| ?\w+:?|[^\w\s]|\s"
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ids, special_tokens={EOT: len(words)})


# ------------------------------------------------------------------------------------------------ JSONL files

def read_jsonl(path):
    """Yields a Pair per line; prints how many blank lines were skipped and which keys are not used."""
    notes = Counter()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                notes["blank lines skipped"] += not line.strip()
                if line.strip():
                    yield parse_line(line, f"{path}:{number}", notes)
    except OSError as error:
        raise Refused(f"--data {path}: {error.strerror}; name a JSONL file or one of {[*WORLDS]}") from None
    tell(path, notes)


def parse_line(line, where, notes):
    """The Pair on one line (bytes); counts keys that are not used. Raises Refused."""
    try:
        item = json.loads(line.decode("utf-8-sig"))
        json.dumps(item, ensure_ascii=False).encode()  # "\ud83d", half a surrogate pair, is JSON, not text
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise Refused(f"{where}: no JSON in UTF-8 ({str(error)[:60]}); write an object per line") from None
    if not isinstance(item, dict):
        raise Refused(f'{where}: not an object; write {{"prompt": ..., "chosen": ..., "rejected": ...}}')
    for key in ("chosen", "rejected", "prompt"):
        if key not in item and key != "prompt":
            raise Refused(f"{where}: key {key!r} is missing; add it (found: {', '.join(item) or 'none'})")
        if not isinstance(item.get(key, ""), str):
            raise Refused(f"{where}: {key!r} is not a text; write a string (messages: use lab/hf.py)")
    p = item.get("p", 1.0)
    if type(p) not in (int, float) or not 0 <= p <= 1:
        raise Refused(f"{where}: 'p' is {str(p)[:20]}; it is P(chosen is preferred), from 0 to 1")
    notes.update(f"lines with key {key!r}, not used" for key in item.keys() - set(Pair._fields[:4]))
    if "prompt" not in item:
        item |= split_dialogues(item["chosen"], item["rejected"], where)
    for key in ("chosen", "rejected"):
        if not item[key]:
            raise Refused(f"{where}: {key!r} is empty: no token to score; fill it or remove the line")
    return Pair(item["prompt"], item["chosen"], item["rejected"], float(p), where)


def split_dialogues(chosen, rejected, where):
    """Anthropic-HH's form, two whole dialogues: what both share, up to the last turn in it, is the prompt."""
    turn = "\n\nAssistant:"
    shared = os.path.commonprefix([chosen, rejected])
    if turn not in shared:
        raise Refused(f"{where}: key 'prompt' is missing, and the dialogues share no {turn!r}; add a prompt")
    cut = shared.rfind(turn) + len(turn)
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


# ------------------------------------------------------------------------------- text -> token ids -> tensors

class PairData:
    """Rows packed as flat tensors, 4 bytes a token whatever the lengths, and the pairs that they form.

    Row r is tokens[start[r]:start[r+1]], of which prompt_len[r] are its prompt. Of N pairs:
    chosen and rejected (N,), their rows; p (N,); prompt (N,), equal for pairs with the same prompt.
    """

    def __init__(self, rows, chosen=None, rejected=None, p=None, prompt=None):  # rows: (prompt, response) ids
        self.chosen, self.rejected, self.p, self.prompt = chosen, rejected, p, prompt
        tokens, start, prompt_len = array("i"), array("q", [0]), array("i")
        for prompt, response in rows:
            tokens.extend(prompt)
            tokens.extend(response)
            start.append(len(tokens))
            prompt_len.append(len(prompt))
        self.tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self.start = torch.frombuffer(start, dtype=torch.int64)
        self.prompt_len = torch.frombuffer(prompt_len, dtype=torch.int32)

    def padded(self, rows, device="cpu"):  # (R,) -> (R,T), (R,T)
        """Tokens of these rows, padded on the right with id 0, and their response mask."""
        start, end = self.start[rows, None], self.start[rows + 1, None]
        t = torch.arange(int((end - start).max()))
        real = start + t < end  # (R,T) not padding
        tokens = self.tokens[(start + t).clamp(max=len(self.tokens) - 1)].long() * real
        return tokens.to(device), (real & (t >= self.prompt_len[rows, None])).to(device)

    def pair_rows(self, pairs):  # (B,) -> (2B,)
        """The rows of these pairs, chosen first."""
        return torch.cat([self.chosen[pairs], self.rejected[pairs]])

    def batch(self, pairs, device="cpu"):  # (B,) -> Batch
        return Batch(*self.padded(self.pair_rows(pairs), device), self.p[pairs].to(device))

    def prompt_ids(self, row):
        """The prompt's tokens in this row, a list."""
        return self.tokens[self.start[row]:self.start[row] + self.prompt_len[row]].tolist()


def encode(pairs, tokenizer, block_size):
    """PairData of an iterable of Pair; prints what is dropped or cut, and how many. Raises Refused if none is
    left. Prompt and response are encoded apart, so that no token spans the border, and <|endoftext|> ends the
    response. Only prompts are cut, from the left: a response without its end would teach not to stop there.
    """
    rows, p, prompts, numbers, notes, read = [], [], [], {}, Counter(), 0
    eot = [tokenizer.eot_token]
    for read, pair in enumerate(pairs, 1):
        prompt, chosen, rejected = map(tokenizer.encode_ordinary, pair[:3])  # "<|endoftext|>": text
        room = block_size - 1 - max(len(chosen), len(rejected))
        if chosen == rejected:
            notes["pairs dropped: chosen and rejected are the same tokens"] += 1
        elif room < 1:
            notes[f"pairs dropped: a response leaves no room for a prompt in {block_size} tokens"] += 1
        else:
            notes[f"prompts cut from the left to fit {block_size} tokens"] += len(prompt) > room
            notes[f"empty prompts: the response starts from {EOT}"] += not prompt
            notes["pairs with a blank response, kept"] += not (pair.chosen.strip() and pair.rejected.strip())
            notes["pairs with p < 1/2, kept: they ask for the rejected response"] += pair.p < 0.5
            prompt = array("i", prompt[-room:] or eot)  # <|endoftext|> is what GPT-2 reads before a text
            rows += [(prompt, array("i", chosen + eot)), (prompt, array("i", rejected + eot))]
            p.append(pair.p)
            prompts.append(numbers.setdefault(prompt.tobytes(), len(numbers)))
    tell(f"data, of {read:,} pairs", notes)
    if not rows:
        raise Refused(f"data: no usable pair among {read}; mend what is counted above or raise --block_size")
    n = 2 * torch.arange(len(p))
    return PairData(rows, n, n + 1, torch.tensor(p), torch.tensor(prompts))


def split(data, holdout, generator):
    """(training, held-out) indices of pairs, no prompt in both; holdout: the share of prompts, never all."""
    n = int(data.prompt.max()) + 1
    held = torch.zeros(n, dtype=torch.bool)
    held[torch.randperm(n, generator=generator)[:min(round(holdout * n), n - 1)]] = True
    held = held[data.prompt]
    return torch.where(~held)[0], torch.where(held)[0]


def batches(n, size, steps, generator):
    """Yields `steps` index tensors (size,): all of 0..n-1 in random order, then in another, and so on."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:size]
        order = order[size:]


# ------------------------------------------------------------------------------------------- synthetic worlds
# A response is any string of at most three of the seven words below, "" included: 1 + 7 + 49 + 343 = 400 per
# prompt. The model has outputs for these words and <|endoftext|> only, and after the last word its context is
# full: it can emit nothing outside the list, so the list's probabilities sum to one. In an open vocabulary
# pairs fix only the ratios between responses that occur, and training may move probability to strings that
# never occur ("leak"): on real data that is one reason why the log-prob of chosen responses may fall.

SUBJECTS = ("pizza", "coffee", "beer", "gelato")
VALENCE = {  # pizza coffee  beer  gelato: what the word adds to the reward of a review
    "superb": (+0.9, +0.9, +0.9, +0.9),
    "good":   (+0.5, +0.5, +0.5, +0.5),
    "fine":   (+0.1, +0.1, +0.1, +0.1),
    "dull":   (-0.5, -0.5, -0.5, -0.5),
    "awful":  (-0.9, -0.9, -0.9, -0.9),
    "hot":    (+0.5, +0.7, -0.6, -0.9),
    "cold":   (-0.5, -0.7, +0.6, +0.4),
}
WORLDS = {name: (list(VALENCE), 3) for name in ("bt", "deterministic", "cyclic")}  # words, how many
STOP = 0.25  # base distribution: one word or more, each as likely as any other; after each it may end


class World:
    """A world that can be enumerated: X prompts, Y responses to each, every probability known, float64.

    reward (X,Y); pstar (X,Y,Y) p*(y>y'|x); base (Y,) what the reference is trained on; pairs: its row x * Y +
    y is prompt x with response y. sizes: block_size, vocab_size, head_size.
    """

    def __init__(self, name):
        words, longest = WORLDS[name]
        strings = [s for k in range(longest + 1) for s in itertools.product(range(len(words)), repeat=k)]
        self.tokenizer = get_tokenizer(" ".join(["words", *words]))
        texts = [f"review of the {subject}:" for subject in SUBJECTS]
        self.prompts = self.tokenizer.encode_ordinary_batch(texts)
        self.responses = [self.tokenizer.decode(list(s)) for s in strings]
        valence = torch.tensor([VALENCE[word] for word in words], dtype=torch.float64)  # (words,X)
        self.reward = torch.stack([valence[list(s)].sum(0) for s in strings], dim=1)
        self.pstar = preference(name, self.reward, torch.tensor([s[0] if s else -1 for s in strings]))
        length = torch.tensor([len(s) for s in strings]).double()
        self.base = (1 - STOP) ** (length - 1) / len(words) ** length * (length > 0)
        self.base[length < longest] *= STOP
        end = [self.tokenizer.eot_token]  # not after the last word: there the context is full
        responses = [list(s) + end * (len(s) < longest) for s in strings]
        self.pairs = PairData(itertools.product(self.prompts, responses))
        self.sizes = len(self.prompts[0]) + longest, int(self.pairs.tokens.max()) + 1, len(words) + 1

    def sft_rows(self, n, generator):  # -> (n,)
        """Rows with responses from the base distribution; the prompts take turns."""
        y = torch.multinomial(self.base, max(n, 1), replacement=True, generator=generator)[:n]
        return torch.arange(n) % len(self.prompts) * len(self.responses) + y

    def draw(self, n, mu, labels, noise, generator):
        """Gives self.pairs n pairs: y, y' independent draws from mu (X,Y), drawn again while they are equal.

        labels "hard": the winner is drawn from p*, flipped with probability noise, and stands first, p = 1;
        "soft": as drawn, p = that probability. (Equals have margin and target 0, whatever pi is.)
        """
        X, Y = self.reward.shape
        if mu.max() > 0.999:  # two draws that differ would take too long
            raise Refused("--mu ref: this reference always says the same: no pairs; use --mu uniform")
        each = -(-n // X)  # rounded up
        y = torch.zeros(X, each, 2, dtype=torch.int64)
        while (y[..., 0] == y[..., 1]).any():  # both responses of such pairs are drawn again
            fresh = torch.multinomial(mu, 2 * each, replacement=True, generator=generator).view(X, each, 2)
            y = torch.where(y[..., :1] == y[..., 1:], fresh, y)
        x = torch.arange(X).repeat(each)[:n]  # the prompts take turns
        first, second = y.transpose(0, 1).reshape(-1, 2)[:n].T
        p = self.pstar[x, first, second]
        if labels == "hard":
            wins = torch.rand(n, generator=generator) < p
            wins ^= torch.rand(n, generator=generator) < noise
            first, second = torch.where(wins, first, second), torch.where(wins, second, first)
        p = torch.ones(n) if labels == "hard" else p + noise * (1 - 2 * p)
        self.pairs.chosen = x * Y + first
        self.pairs.rejected = x * Y + second
        self.pairs.p, self.pairs.prompt = p.float(), x


def preference(name, reward, first):  # (X,Y), (Y,) number of the first word, or -1 -> (X,Y,Y)
    """p*(y>y'): sigmoid(r - r'), Bradley-Terry; "deterministic": 1 if r > r', 1/2 on ties; "cyclic":
    sigmoid(r - r' + 2 c), c = 1, 0, -1 by rock-paper-scissors on the first words: no reward explains it."""
    gap = (reward[:, :, None] - reward[:, None, :]).round(decimals=4)  # or .9+.5+.1 and .1+.5+.9 would differ
    if name == "deterministic":
        return (gap.sign() + 1) / 2
    if name == "cyclic":
        beats = torch.tensor([0, 1, -1])[(first[:, None] - first) % 3]
        gap = gap + 2 * beats * ((first[:, None] >= 0) & (first >= 0))
    return gap.sigmoid()


# ------------------------------------------------------------------------------------------- exact quantities

def optimum(ref_logp, worth, mu, tau):  # (X,Y), (X,Y,Y), (X,Y) -> (X,Y)
    """log pi*: ref(y|x) exp(g(y)/tau), normalised; g(y) = E_{y'~mu} worth(y,y'), worth = Psi(p*)  (eq. 7).

    Where worth is infinite (logit on certain pairs) it is a limit that no margin attains: all probability is
    on the responses with most sure wins minus sure losses; among these the finite part of worth decides.
    """
    sure = worth.isinf()
    net_wins = (worth.sign() * sure * mu[:, None, :]).sum(-1)
    g = (worth.masked_fill(sure, 0.0) * mu[:, None, :]).sum(-1)
    beaten = net_wins < net_wins.amax(-1, keepdim=True) - 1e-9
    return (ref_logp + g / tau).masked_fill(beaten, -torch.inf).log_softmax(-1)


def kl(logp, other):  # (X,Y), (X,Y) -> ()
    """KL(logp||other) in nats of policies given as log-probs, mean over prompts; probability 0 counts 0."""
    return (logp.exp() * (logp - other)).masked_fill(logp == -torch.inf, 0.0).sum(-1).mean()


def exact(logp, ref_logp, others, pstar, mu, psi, tau):
    """What enumeration knows of a policy, mean over prompts. (X,Y), but pstar (X,Y,Y); others {name: (X,Y)}.

    In nats: kl_ref KL(pi||ref), kl_NAME KL(pi||other), ratio the largest |log pi/ref|. win E_{y~pi,y'~mu} p*.
    objective: J = E psi(p*) - tau KL(pi||ref) (eq. 6), so that J(pi*) - J(pi) = tau KL(pi||pi*).
    """
    joint = logp.exp()[:, :, None] * mu[:, None, :]  # (X,Y,Y) y from pi, y' from mu
    numbers = {
        "kl_ref": kl(logp, ref_logp),
        "win": (joint * pstar).sum((1, 2)).mean(),
        "objective": (joint * psi(pstar)).sum((1, 2)).mean() - tau * kl(logp, ref_logp),
        "ratio": (logp - ref_logp).abs().max(),
    }
    return finite(numbers | {f"kl_{name}": kl(logp, other) for name, other in others.items()})
