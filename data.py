"""Preference pairs as tensors, the toy world with its exact answers, and pairs from your own file.

A row is a prompt with one response. A pair is two rows with the same prompt, and the label p, the probability
that the first response ("chosen") wins against the second ("rejected"). There is no model in this file.
Sizes: N pairs in all, B in a batch, R rows, T tokens in a row, X prompts of the world, Y responses to each.
"""
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from typing import NamedTuple

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

EOT = "<|endoftext|>"


class Refused(ValueError):
    """Bad input, in one line: what was found, where, and the remedy."""

    def __init__(self, message):
        super().__init__(one_line(message))


# ----------------------------------------------------------------------------------------- pairs as tensors

class Batch(NamedTuple):
    """B pairs as tensors. Rows 0..B-1 hold the chosen responses, rows B..2B-1 the rejected ones."""
    tokens: torch.Tensor    # (2B,T) int64
    mask: torch.Tensor      # (2B,T) bool, True on the tokens of the response (and end of text, if any)
    p: torch.Tensor         # (B,) float32, probability that the chosen response is preferred
    ref_logp: torch.Tensor  # (2B,) log-prob of each response under the reference, nats


class PairData:
    """All rows in one table, and the pairs that they form.

    tokens      (R,T) int32, padded on the right with 0
    length      (R,) tokens without the padding; prompt_len (R,) tokens of the prompt
    chosen      (N,) the row of each pair's chosen response; rejected (N,) likewise
    p           (N,) probability that it is preferred
    prompt      (N,) the number of its prompt, for hold_out
    ref_logp    (R,) the reference's log-prob of each response, once it has been computed
    """

    def __init__(self, prompts, responses):  # R lists of ids each
        rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
        self.tokens = pad_sequence(rows, batch_first=True).int()
        self.length = torch.tensor([len(row) for row in rows])
        self.prompt_len = torch.tensor([len(prompt) for prompt in prompts])

    def set_pairs(self, chosen, rejected, p, prompt):  # (N,) each
        self.chosen, self.rejected = chosen, rejected
        self.p, self.prompt = p.float(), prompt

    def padded(self, rows):  # (K,) -> (K,T), (K,T), T the longest of these rows
        """The tokens of these K rows, and their mask, True on response tokens.

        A token never looks to its right, so the padding there changes no log-prob. A prompt of 2 tokens and a
        response of 2, in T = 5, have the mask 0 0 1 1 0.
        """
        length = self.length[rows].unsqueeze(1)          # (K,1)
        prompt_len = self.prompt_len[rows].unsqueeze(1)  # (K,1)
        t = torch.arange(length.max())                   # (T,)
        mask = (t >= prompt_len) & (t < length)          # (K,T)
        return self.tokens[rows, :len(t)].long(), mask

    def pair_rows(self, pairs):  # (B,) -> (2B,)
        """The rows of these pairs, the chosen ones first."""
        return torch.cat([self.chosen[pairs], self.rejected[pairs]])

    def batch(self, pairs):  # (B,) -> Batch
        rows = self.pair_rows(pairs)
        return Batch(*self.padded(rows), self.p[pairs], self.ref_logp[rows])

    def digest(self):
        """A fingerprint of rows and labels."""
        sha = hashlib.sha256()
        for part in (self.tokens, self.prompt_len, self.chosen, self.rejected, self.p):
            sha.update(part.numpy())  # its bytes
        return sha.hexdigest()


def shuffled(n, size, steps, generator):
    """Yields `size` indices for each step: all of 0..n-1 in random order, then in another, and so on.

    A step may take the end of one order and the beginning of the next.
    """
    left = torch.arange(0)  # none yet
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:size]
        left = left[size:]


# -------------------------------------------------------------------------------------------- the toy world
# Four prompts, "pizza review:" and so on. A response has up to three words. The table holds what a word adds
# to the reward of a response, for each subject.

REWARDS = """
          pizza  coffee  beer  gelato
superb      0.9     0.9   0.9     0.9
good        0.5     0.5   0.5     0.5
fine        0.1     0.1   0.1     0.1
dull       -0.5    -0.5  -0.5    -0.5
awful      -0.9    -0.9  -0.9    -0.9
hot         0.5     0.7  -0.6    -0.9
cold       -0.5    -0.7   0.6     0.4
"""
SUBJECTS, *LINES = [line.split() for line in REWARDS.strip().splitlines()]
VALUES = {word: list(map(float, values)) for word, *values in LINES}  # a word's four numbers
WORDS = list(VALUES)
WORLDS = "bt", "deterministic", "cyclic"  # see `preference`
# shares of SFT's texts with 0, 1, 2 and 3 words. SFT shows no empty text (a softmax gives it some probability
# all the same), 1/4 end after the first word, 3/4 * 1/4 after the second, and the rest have three.
LENGTHS = 0, 1/4, 3/16, 9/16


class Words:
    """The world's tokenizer. 13 tokens: words, end of text, subjects, "review:". An id is an index."""
    name = "words"

    def __init__(self, words):
        self.words = [*words, EOT, *SUBJECTS, "review:"]
        self.n_vocab = len(self.words)
        self.eot_token = len(words)

    def encode_ordinary(self, text):  # tiktoken's name for it
        for word in set(text.split()) - set(self.words):
            raise Refused(f"the world has no word {short(word)!r}; it has {', '.join(self.words)}")
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def reward(response):  # -> (X,)
    """What the words of a response add up to, for each prompt."""
    values = [VALUES[word] for word in response.split()]
    nothing = [0.0] * len(SUBJECTS)  # so that the empty response has 0
    return torch.tensor([nothing, *values], dtype=torch.float64).sum(0)


class World:
    """X prompts, Y responses to each, and every probability known, in float64.

    reward (X,Y). pstar (X,Y,Y): pstar[x,y,z] is the probability that y is preferred to z, written p*(y>z).
    base (Y,): the distribution of SFT's texts. pairs: a PairData whose row x * Y + y is prompt x with
    response y; `draw` gives it pairs.

    Its model reads 13 ids and emits the first 8, words and end of text. It has a context of 5 tokens, 2 of
    them the prompt, so nothing follows a third word. After fewer words it says one of 7 words or ends. That
    makes 400 ways to end, which are the responses. So their probabilities sum to 1, and the sums below, such
    as KL, are exact.
    """

    def __init__(self, name, words=WORDS, lengths=LENGTHS):
        self.responses, base = [], []
        for length, share in enumerate(lengths):
            # every string of so many words; of 0 words there is one, the empty
            for response in itertools.product(words, repeat=length):
                self.responses.append(" ".join(response))
                base.append(share / len(words) ** length)
        self.base = torch.tensor(base, dtype=torch.float64)
        self.reward = torch.stack([reward(response) for response in self.responses], dim=1)
        self.tokenizer = Words(words)
        encode = self.tokenizer.encode_ordinary
        # as ids, with end of text (7) unless three words fill the context: [7], [w, 7], [w, w, 7], [w, w, w]
        longest = len(lengths) - 1
        rows = [encode(f"{response} {EOT}")[:longest] for response in self.responses]
        first = torch.tensor([row[0] for row in rows])  # (Y,) end of text, if there is no word
        self.pstar = preference(name, self.reward, first)
        prompts = []
        for subject in SUBJECTS:  # all responses to the first prompt, then to the second, ...
            prompts += [encode(f"{subject} review:")] * len(rows)
        self.pairs = PairData(prompts, rows * len(SUBJECTS))
        # of its model: the context, how many ids it reads, how many it emits
        self.sizes = 2 + longest, self.tokenizer.n_vocab, len(words) + 1

    def draw(self, n, mu, labels, generator):
        """Gives self.pairs n pairs: two independent responses from mu (X,Y), and a label.

        "hard": a coin flip with p*; the winner becomes "chosen", and p = 1. "soft": the pair stays as it was
        drawn, p is p*, and "chosen" may be the worse one. Both responses may be the same. Then h is 0 for any
        policy.
        """
        X, Y = self.reward.shape
        each = math.ceil(n / X)  # pairs for each prompt; [:n] leaves the last ones fewer
        x = torch.arange(X).repeat_interleave(each)[:n]  # (n,)
        # n = 7, X = 4: each is 2, x is 0 0 1 1 2 2 3, a row of draws has two first responses, then two second
        draws = torch.multinomial(mu, 2 * each, True, generator=generator)  # True: with replacement
        first = draws[:, :each].flatten()[:n]            # (n,)
        second = draws[:, each:].flatten()[:n]
        p = self.pstar[x, first, second]
        if labels == "hard":
            wins = torch.rand(n, generator=generator) < p
            first, second = torch.where(wins, first, second), torch.where(wins, second, first)
            p = torch.ones(n)
        self.pairs.set_pairs(x * Y + first, x * Y + second, p, x)


def preference(name, reward, first):  # (X,Y), (Y,) -> (X,Y,Y)
    """p*(y>z) of each kind of world. first: the ids of the responses' first words, or of end of text.

    bt: s(r(y) - r(z)), s the sigmoid.
    deterministic: 1 if r(y) > r(z), 1/2 on a tie.
    cyclic: s(r(y) - r(z) + 2 c). The first words play rock, paper, scissors. By id % 3 a word is of class 0
    (superb, dull, cold), 1 (good, awful) or 2 (fine, hot). 1 beats 0, 2 beats 1, and 0 beats 2: i beats j if
    (i - j) % 3 is 1. c is 1 if y wins, -1 if z does, and 0 within a class or if a response is empty.
    """
    gap = reward.unsqueeze(2) - reward.unsqueeze(1)  # (X,Y,1) - (X,1,Y): r(y) - r(z)
    # so that equal sums tie, though added in another order
    gap = gap.round(decimals=4)
    if name == "deterministic":
        return (gap.sign() + 1) / 2
    if name == "cyclic":
        ahead = (first[:, None] - first) % 3  # (Y,Y)
        beats = (ahead == 1).double() - (ahead == 2).double()
        # response 0 is empty, and has no first word
        beats[0] = beats[:, 0] = 0
        gap = gap + 2 * beats
    return gap.sigmoid()


# ------------------------------------------------------------------ exact quantities: sums over all responses

def mean_over_opponents(worth, mu):  # (X,Y,Y), (X,Y) -> (X,Y)
    """For each response y the mean of worth[x,y,z] over opponents z from mu."""
    return (worth * mu[:, None]).sum(-1)  # (X,Y,Y) * (X,1,Y)


def optimum(ref_logp, worth, mu, tau):  # (X,Y), (X,Y,Y), (X,Y) -> (X,Y)
    """The log of pi*(y) = ref(y) exp(g(y) / tau) / Z, with g(y) the mean of worth = Psi(p*) over mu  (eq. 7).

    In the deterministic world DPO's Psi, the logit, is inf or -inf, and a mean of both would be NaN. So a
    million stands for inf. g is then a million times (chance to win - chance to lose), and the best response
    gets nearly everything. Training goes the same way there: DPO's margins grow without end.
    """
    g = mean_over_opponents(worth.clamp(-1e6, 1e6), mu)
    return (ref_logp + g / tau).log_softmax(-1)  # log_softmax divides by Z


def kl(logp, other):  # (X,Y), (X,Y) -> ()
    """KL(pi||other) in nats, of policies given as log-probs: the mean over prompts."""
    return (logp.exp() * (logp - other)).sum(-1).mean()


# -------------------------------------------------------------------------- your own pairs; skip at first
# one JSON object a line -> Pair -> PairData

class Pair(NamedTuple):
    """One comparison, as text."""
    prompt: str
    chosen: str
    rejected: str
    p: float = 1.0  # probability that chosen is preferred


NEEDED = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}, and "p" if you like'
CONVERT = "python -m lab.models.jsonl makes JSONL of it"
FIRST_BYTES = {  # files that are no JSONL begin with them
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"[": "a JSON array",
    b"{\n": "JSON over several lines",
}
# what marks that somebody else speaks; see count_oddities
TURNS = ("\n\nHuman:", "\n\nAssistant:", "<|im_start|>", "<|user|>", "<|start_header_id|>", "[INST]")


def one_line(text):
    """The text without line breaks and a terminal's escape codes; a long path in it loses its middle."""
    words = [word if len(word) < 200 else f"{word[:90]}...{word[-90:]}" for word in text.split(" ")]
    # ascii("\n")[1:-1] is a backslash and an n
    return "".join(c if c.isprintable()
                   else ascii(c)[1:-1] for c in " ".join(words))


def short(text):
    """The first line of something that came from outside, 80 characters at most."""
    return str(text).strip().partition("\n")[0][:80]


def get_tokenizer(name):
    """tiktoken's encoding of this name, "gpt2" say, or "bytes", or the world's "words". Raises Refused."""
    if name == "words":
        return Words(WORDS)
    if name == "bytes":
        ids = {bytes([byte]): byte for byte in range(256)}
        # one token a byte, and end of text; (?s). splits a text into characters, and these into bytes
        return tiktoken.Encoding(name, pat_str="(?s).", mergeable_ranks=ids, special_tokens={EOT: 256})
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on whatever its HTTP library or the file system raises
        raise Refused(f"--tokenizer {name}: unknown, or neither on disk nor downloaded ({short(error)}); "
                      "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer bytes") from None


def refuse_other_formats(path, line):
    """Raises Refused if the first line (bytes) of a file shows that it is no JSONL."""
    found = [name for start, name in FIRST_BYTES.items() if line.startswith(start)]
    if line.strip() and b"{" not in line:
        found.append("a first line without an object (of a CSV or TSV table, perhaps)")
    if found:
        raise Refused(f"--data {path}: {found[0]}, not JSONL; {CONVERT}")


def tell(where, notes):
    """Prints a line for each thing that happened."""
    for what, count in (+notes).items():  # +: without those that never happened
        print(one_line(f"{where}: {count:,} {what}"))


def parse_json(line):
    """The object that one line (bytes) holds, a dict. Raises Refused."""
    try:
        item = json.loads(line, object_pairs_hook=no_key_twice)
        # half of a surrogate pair, "\ud83d", is JSON and no text: encode raises UnicodeError, a ValueError
        json.dumps(item, ensure_ascii=False).encode()
    except Refused:  # which is a ValueError, too
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"no JSON in UTF-8 ({short(error)}); {NEEDED}, an object a line") from None
    if not isinstance(item, dict):
        raise Refused(f"{short(json.dumps(item))} is no object; {NEEDED}")
    return item


def no_key_twice(items):
    """The dict of these (key, value) pairs. Raises Refused if a key comes twice."""
    if len(dict(items)) < len(items):
        raise Refused(f"a key stands there twice among {short(', '.join(key for key, _ in items))!r}; "
                      "keep one of them")
    return dict(items)


def parse_pair(item, notes):
    """The Pair of one line's object; counts keys that are not used. Raises Refused."""
    texts = []
    for key in ("prompt", "chosen", "rejected"):
        if key not in item:
            raise Refused(f"{key!r} is not among its keys ({short(', '.join(item))}); {NEEDED}; or "
                          f"{CONVERT}, with --{key} KEY if another key holds it")
        if not isinstance(item[key], str):
            raise Refused(f"{key!r} is {short(json.dumps(item[key]))}, not a text; write a text; lists of "
                          f"messages run with python -m lab.models.hf; of anything else {CONVERT}")
        texts.append(item[key])
    p = item.get("p", 1.0)
    # type, since isinstance takes True for an int
    if type(p) not in (int, float) or not 0 <= p <= 1:
        raise Refused(f"'p' is {short(json.dumps(p))}; write the probability that chosen is preferred, "
                      "from 0 to 1")
    unused = item.keys() - Pair._fields
    if unused:
        notes[f"lines with keys that are not used: {short(', '.join(sorted(unused)))!r}"] += 1
    return Pair(*texts, float(p))


def read_jsonl(path, parse=parse_pair):
    """The pairs of a JSONL file, a list; prints what was skipped. Raises Refused, naming the first bad line.

    parse(item, notes) -> Pair reads the object of one line. notes: a Counter of what will be told.
    """
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise Refused(f"--data {path}: {found}; give a JSONL file (python ipo.py takes {', '.join(WORLDS)}, "
                      f"too); if it is a URL, a dataset on a hub or one saved in a folder, {CONVERT}")
    pairs, notes, refusals = [], Counter(), []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                refuse_other_formats(path, line)
            if not line.strip():
                notes["blank lines skipped"] += 1
                continue
            try:
                pairs.append(parse(parse_json(line), notes))
            except Refused as error:
                refusals.append(f"{path}:{number}: {error}")
    if refusals:
        raise Refused(f"{refusals[0]} (lines with faults: {len(refusals):,})")
    if not pairs:
        raise Refused(f"--data {path}: the file is empty; {NEEDED}, an object a line")
    tell(path, notes)
    return pairs


def encode(pairs, tokenizer, block_size):
    """PairData of a list of Pair; prints what is dropped, cut or odd. Raises Refused if none is left.

    Prompt and response are encoded apart, so that no token spans the border; end of text follows the response
    and is scored. Only prompts are cut, from the left: a response without its end would teach not to stop.
    """
    end = [tokenizer.eot_token]
    prompts, responses, p, numbers, notes = [], [], [], [], Counter()
    # prompts are numbered by their texts, for hold_out: two pairs may cut one prompt in two ways
    number_of = {}
    for pair in pairs:
        prompt, chosen, rejected = (tokenizer.encode_ordinary(text) for text in pair[:3])
        # tokens left for the prompt, beside the longer response and its end of text
        room = block_size - 1 - max(len(chosen), len(rejected))
        if chosen == rejected:
            notes["pairs dropped: chosen and rejected are the same tokens"] += 1
        elif room < 1:
            notes[f"pairs dropped: a response leaves no room for a prompt in {block_size} tokens"] += 1
        else:
            # True counts as 1; tell leaves zeros out
            notes[f"prompts cut from the left to fit {block_size} tokens"] += len(prompt) > room
            prompt = prompt[-room:] or end  # an empty one is end of text, as GPT-2 has it before each text
            prompts += [prompt, prompt]
            responses += [chosen + end, rejected + end]
            p.append(pair.p)
            numbers.append(number_of.setdefault(pair.prompt, len(number_of)))  # a new number if it is new
    count_oddities(pairs, notes)
    tell(f"data, of {len(pairs):,} pairs", notes)
    if not p:
        raise Refused("data: every pair was dropped, as counted above; mend them, or take a larger context")
    data = PairData(prompts, responses)
    chosen = 2 * torch.arange(len(p))  # rows 0, 2, 4, ...; pair_rows makes halves of them
    data.set_pairs(chosen, chosen + 1, torch.tensor(p), torch.tensor(numbers))
    return data


def count_oddities(pairs, notes):
    """Counts, over all pairs, what is scored as it stands and perhaps should not be."""
    seen = set()
    for prompt, chosen, rejected, _ in pairs:
        pair = prompt, chosen, rejected
        texts = f"{chosen} {rejected}"
        notes[f"empty prompts: the response follows {EOT}"] += not prompt
        notes["pairs with an empty or blank response"] += not (chosen.strip() and rejected.strip())
        notes["pairs with another turn or a role in a response"] += any(turn in texts for turn in TURNS)
        repeats = chosen.startswith(prompt) or rejected.startswith(prompt)
        notes["pairs with a response that repeats its prompt"] += repeats and prompt != ""
        notes["pairs that stand there twice"] += pair in seen
        notes["pairs that stand there with the opposite label"] += (prompt, rejected, chosen) in seen
        seen.add(pair)


def hold_out(data, share, seed):
    """The indices of the pairs to train on, and of those to evaluate: the held-out ones, or all if none is.

    share: of the prompts.
    """
    n = data.prompt.max() + 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = torch.isin(data.prompt, order[:int(share * n)])
    print(f"data: {(~held).sum():,} pairs to train on, {held.sum():,} held out (if 0, all are evaluated)")
    evaluated = held if held.any() else ~held
    return torch.where(~held)[0], torch.where(evaluated)[0]
