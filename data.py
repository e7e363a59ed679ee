"""Preference pairs: read from JSONL or drawn from a synthetic world, then encoded and batched.

    Pair (text)  --encode-->  PairData (token ids; rows; pairs of rows)  --batch-->  Batch (tensors for one step)

Nothing here touches a parameter. A *row* is a prompt with one response; a *pair* is two rows with the same prompt, and
p, the probability that an annotator prefers the first ("chosen") to the second ("rejected").
Sizes: N pairs, B pairs in a batch, R rows, T tokens, X prompts of a synthetic world, Y responses to each.
"""
import functools
import itertools
import json
import os
from array import array
from typing import Callable, Iterable, Iterator, NamedTuple

import tiktoken
import torch

EOT = "<|endoftext|>"
TOKENIZERS = ["gpt2", "bytes"]  # for JSONL files; the synthetic worlds bring words of their own


class Refused(ValueError):
    """Input or a request that cannot be used; one line: where (flag, file:line), what, and the remedy."""


class Pair(NamedTuple):
    """One comparison, as text; p = P(chosen is preferred)."""
    prompt: str | list[dict[str, str]]  # or messages {"role", "content"}, which a chat template makes text
    chosen: str
    rejected: str
    p: float = 1.0
    where: str = "--data"               # file:line, for messages of errors


class Batch(NamedTuple):
    """B pairs as tensors: rows 0..B-1 are the chosen responses, B..2B-1 the rejected ones."""
    tokens: torch.Tensor  # (2B,T) int64, padded on the right: under causal attention that changes no log-prob
    mask: torch.Tensor    # (2B,T) bool, True on response tokens, <|endoftext|> included; not on prompt or padding
    p: torch.Tensor       # (B,) float32
    rows: torch.Tensor    # (2B,) int64, where the cached log-probs of these rows lie


# ----------------------------------------------------------------------------------------------------------- tokenisers

def word_encoding(name: str, words: list[str], more: list[str]) -> tiktoken.Encoding:
    """A tiktoken encoding built in place: ids for words, <|endoftext|>, more words, then 256 bytes: any text works."""
    ids = {w.encode(): i + (i >= len(words)) for i, w in enumerate(words + more)}
    ids |= {bytes([b]): len(words + more) + 1 + b for b in range(256)}
    return tiktoken.Encoding(name, pat_str=r"review of the| ?\w+:?|[^\w\s]|\s", mergeable_ranks=ids,
                             special_tokens={EOT: len(words)})


def get_tokenizer(name: str, vocab_size: int = 0):
    """A world's encoding, one of TOKENIZERS, or that of a Hugging Face model with vocab_size ids (if it has none but
    GPT-2's number of ids: GPT-2's). Raises Refused if it can be neither read nor downloaded."""
    if name in WORDS:
        return word_encoding(name, [f" {w}" for w in WORDS[name]], ["review of the", *(f" {s}:" for s in SUBJECTS)])
    if name == "bytes":
        return word_encoding(name, [], [])
    if name not in TOKENIZERS:
        try:
            return HuggingFaceTokenizer(name)
        except NoTokenizer:
            if vocab_size != 50257:
                raise
            print(f"{name}: no tokenizer there; its 50,257 ids are GPT-2's, so GPT-2's tokenizer is used")
            name = "gpt2"
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on whatever its HTTP library or the file system raises
        if vocab_size:  # weights of the hub's; its files of the same tokenizer may lie beside them
            return HuggingFaceTokenizer(name)
        raise Refused(f"--tokenizer {name}: tiktoken can neither read nor download it ({type(error).__name__}); go "
                      "online once, set TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer bytes") from None


class NoTokenizer(Refused):
    """A model's folder without the files of a tokenizer."""


class HuggingFaceTokenizer:
    """A tokenizer of transformers, from a model's folder or hub id, with what others use of a tiktoken encoding."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer
        try:
            self.hf = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers passes on whatever its HTTP library or the file system raises
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(f"{name}: its tokenizer cannot be loaded ({why}); put the model's tokenizer files into that "
                          "folder, or name the folder of an export with --init_from") from None
        if not self.encode_ordinary("text"):  # transformers makes an empty one, in silence, if there is none
            raise NoTokenizer(f"{name}: its tokenizer cannot be loaded (there is none); put the model's tokenizer "
                              "files into that folder")
        if self.hf.eos_token_id is None:
            raise Refused(f"{name}: its tokenizer has no end-of-text token to train; set eos_token in "
                          "tokenizer_config.json")
        self.name, self.eot_token, self.n_vocab = name, self.hf.eos_token_id, len(self.hf)
        first = self.hf("").input_ids  # what the model expects before any text: <s>, say
        self.start = first[:-1] if first[-1:] == [self.eot_token] and len(first) > 1 else first

        mark = "".join(self.hf.convert_ids_to_tokens(self.encode_ordinary("a")))
        self.spaces = mark.startswith(("\u2581", "\u0120"))  # tokenizers' marks of a space, although nobody wrote one

    def encode_ordinary(self, text: str, control: bool = False) -> list[int]:
        """Ids of a text as if nothing preceded it; a written-out "</s>" is text unless `control`."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=not control)

    def encode_after(self, text: str, control: bool = False) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before any text. (A character
        before it takes that space, and is dropped.)"""
        for before in ("\n", ".", ":") if self.spaces else ("",):
            first, ids = self.encode_ordinary(before), self.encode_ordinary(before + text, control)
            if ids[:len(first)] == first:
                return ids[len(first):]
        raise Refused(f"the model's tokenizer joins what precedes the response {text[:20]!r} with it, so it cannot be "
                      "encoded apart without a space before it; rewrite its start, or take another model")

    def chat(self, messages: list[dict[str, str]], answers: list[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of a conversation up to the assistant's turn, and of each answer, as the model's chat template writes
        them, up to the end-of-text token or to the end. Raises Refused, without saying where."""
        if not self.hf.chat_template:
            raise Refused("the model's tokenizer has no chat template for messages; write texts instead, or put a "
                          "chat_template.jinja into the model's folder")
        control = {t.content for t in self.hf.added_tokens_decoder.values() if t.special}
        for text in [m[key] for m in messages for key in ("role", "content")] + answers:
            for token in sorted(control | {*self.hf.all_special_tokens}):
                if token in text:
                    raise Refused(f"a message holds {token!r}, which the chat template would make a control token; "
                                  "remove it")
        try:
            write = functools.partial(self.hf.apply_chat_template, tokenize=False)
            prompt = write(messages, add_generation_prompt=True)
            whole = [write([*messages, {"role": "assistant", "content": answer}]) for answer in answers]
        except Exception as error:  # jinja's, and what a template raises itself
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(f"the model's chat template refuses these messages ({why}); mend their roles or "
                          "order") from None
        if not all(text.startswith(prompt) for text in whole):
            raise Refused("the model's chat template does not write the prompt alike with and without an answer, so it "
                          "is unknown where the answer begins; use texts instead of messages")
        ids = [self.encode_after(text[len(prompt):], control=True) for text in whole]
        return self.encode_ordinary(prompt, control=True), [
            x[:x.index(self.eot_token)] if self.eot_token in x else x for x in ids]

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)


def save_tokenizer(tokenizer, folder: str) -> None:
    """Writes files that transformers.AutoTokenizer.from_pretrained(folder) loads."""
    if isinstance(tokenizer, tiktoken.Encoding):
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
        converter = TikTokenConverter(pattern=tokenizer._pat_str, extra_special_tokens=tokenizer._special_tokens)
        ids = tokenizer._mergeable_ranks | {EOT.encode(): tokenizer.eot_token}
        converter.load_tiktoken_bpe = lambda _: ids  # it would read a file
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
        PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **special).save_pretrained(folder)
    else:
        tokenizer.hf.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- JSONL files

def read_jsonl(path: str) -> Iterator[Pair]:
    """A Pair per line: {"prompt", "chosen", "rejected"} with optional "p", as texts or as lists of messages; without a
    prompt both are whole dialogues (texts: Anthropic-HH's). Raises Refused that names file, line, key and remedy."""
    try:
        return parse_lines(open(path, "rb"), path)
    except OSError as error:
        raise Refused(f"--data {path}: {error.strerror}; --data takes a JSONL file, a world ({', '.join(WORLDS)}) or a "
                      f"bandit ({', '.join(BANDITS)})") from None


def parse_lines(file, path: str) -> Iterator[Pair]:
    """Yields the pairs of an open file; prints how many blank lines were skipped and which keys nothing reads."""
    unused, line, blank = {}, 0, 0
    with file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield parse_pair(raw, f"{path}:{line}", unused)
            else:
                blank += 1
        if line == blank:
            raise Refused(f"{path}: holds no pair; write one JSON object per line")
    if blank:
        print(f"{path}: {blank} blank lines skipped")
    if unused:
        print(f"{path}: keys not used: " + ", ".join(f"{key!r} ({n} lines)" for key, n in unused.items()))


def no_key_twice(items: list[tuple[str, object]]) -> dict:
    """The object with these keys and values; json would silently keep the last of two that share a key."""
    if len(dict(items)) < len(items):
        raise ValueError("a key stands twice")
    return dict(items)


def parse_pair(raw: bytes, where: str, unused: dict[str, int]) -> Pair:
    """The pair on one line; counts in `unused` the keys that nothing reads. Raises Refused that starts with `where`."""
    try:
        item = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=no_key_twice)
    except UnicodeDecodeError as error:
        raise Refused(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # bad JSON; whole numbers of over 4,300 digits; nesting too deep
        raise Refused(f"{where}: not JSON ({getattr(error, 'msg', error)}); write one JSON object per line") from None
    if not isinstance(item, dict):
        raise Refused(f"{where}: a JSON {type(item).__name__}, not an object; write "
                      '{"prompt": ..., "chosen": ..., "rejected": ...}')
    for key in ("chosen", "rejected", "prompt"):
        if key not in item and key != "prompt":
            raise Refused(f"{where}: key {key!r} is missing; add it (found: {', '.join(map(repr, item)) or 'none'})")
        value = item.get(key, "")
        if not isinstance(value, (str, list)):
            raise Refused(f"{where}: {key!r} is a JSON {type(value).__name__}; write a text, or a list of messages")
        for message in value if isinstance(value, list) else [{"role": "", "content": value}]:
            text, role = (message.get(k) if isinstance(message, dict) else None for k in ("content", "role"))
            if not isinstance(text, str) or not isinstance(role, str):
                raise Refused(f"{where}: {key!r} holds {str(message)[:40]!r}, which is no message; write "
                              '{"role": "user", "content": "..."}')
            try:
                role.encode()
                text.encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise Refused(f"{where}: {key!r} holds {half!a}, half a surrogate pair; remove it") from None
            for more in message.keys() - {"role", "content"}:
                unused[f"{key}[].{more}"] = unused.get(f"{key}[].{more}", 0) + 1
    p = item.get("p", 1.0)
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise Refused(f"{where}: 'p' is {str(p)[:40]!r}; it is the probability that chosen is preferred, from 0 to 1")
    prompt, chosen, rejected = item.get("prompt"), item["chosen"], item["rejected"]
    if isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list):
        prompt, chosen, rejected = split_messages(prompt, chosen, rejected, where)
    elif prompt is None:  # Anthropic-HH: both texts are the dialogue; what they share, up to the last turn, is prompt
        turn = "\n\nAssistant:"
        cut = os.path.commonprefix([chosen, rejected]).rfind(turn) + len(turn)
        if cut < len(turn):
            raise Refused(f"{where}: key 'prompt' is missing, and chosen and rejected share no {turn!r}; add a prompt")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise Refused(f"{where}: {key!r} is empty, so there is no token to score; fill it or remove the line")
    for key in item.keys() - {"prompt", "chosen", "rejected", "p"}:
        unused[key] = unused.get(key, 0) + 1
    return Pair(prompt, chosen, rejected, float(p), where)


def split_messages(prompt, chosen, rejected, where: str):
    """(messages before the last, the last's text in chosen, in rejected) of two conversations. A prompt may stand apart
    or before both, as messages, or be the text of one of them."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise Refused(f"{where}: one of chosen and rejected is a list of messages, or prompt is, and another is a "
                      "text; write all of them alike")
    plain = lambda messages: [{k: m[k] for k in ("role", "content")} for m in messages]
    before, ends = plain(prompt) if isinstance(prompt, list) else [], [plain(chosen), plain(rejected)]
    whole = [messages if messages[:len(before)] == before else before + messages for messages in ends]
    if not all(m and m[-1]["role"] == "assistant" for m in whole):
        raise Refused(f"{where}: chosen and rejected must end in a message of role 'assistant', the response; mend it")
    if whole[0][:-1] != whole[1][:-1]:
        raise Refused(f"{where}: chosen and rejected differ before their last messages, and only these are compared; "
                      "make the messages before them equal")
    if isinstance(prompt, str) and all(prompt != m["content"] for m in whole[0][:-1]):
        raise Refused(f"{where}: 'prompt' is a text that no message of both conversations has; leave it out")
    return whole[0][:-1], whole[0][-1]["content"], whole[1][-1]["content"]


# ----------------------------------------------------------------------------------------- text -> token ids -> tensors

class PairData(NamedTuple):
    """N pairs over R rows, as flat tensors: 4 bytes a token, whatever the lengths."""
    tokens: torch.Tensor      # (all tokens,) int32; row r is tokens[start[r]:start[r+1]]
    start: torch.Tensor       # (R+1,) int64
    prompt_len: torch.Tensor  # (R,) int32, how many tokens of the row are its prompt
    chosen: torch.Tensor      # (N,) int64, row of the chosen response
    rejected: torch.Tensor    # (N,) int64
    p: torch.Tensor           # (N,) float32
    prompt: torch.Tensor      # (N,) int64, equal for pairs with the same prompt
    line: torch.Tensor        # (N,) int32, where in the file the pair stands; drawn pairs: their number

    def select(self, pairs: torch.Tensor) -> "PairData":
        """The same rows with only these pairs (indices)."""
        return PairData(*self[:3], *(field[pairs] for field in self[3:]))

    def rows(self, rows: torch.Tensor):  # (n,) -> (n,T), (n,T)
        """Tokens, padded on the right with id 0, and response mask of these rows."""
        start, end = self.start[rows, None], self.start[rows + 1, None]
        t = torch.arange(int((end - start).max()))
        real = start + t < end
        tokens = self.tokens[(start + t).clamp(max=len(self.tokens) - 1)].long() * real  # what lies behind a row: 0
        return tokens, real & (t >= self.prompt_len[rows, None])

    def pair_rows(self) -> torch.Tensor:  # -> (2N,)
        """The rows of all pairs, chosen first."""
        return torch.cat([self.chosen, self.rejected])

    def batch(self, pairs: torch.Tensor) -> Batch:  # (B,) -> Batch
        """The tensors of these pairs, chosen rows first."""
        rows = torch.cat([self.chosen[pairs], self.rejected[pairs]])
        return Batch(*self.rows(rows), self.p[pairs], rows)

    def prompt_ids(self, row: int) -> list[int]:
        """The prompt's tokens in this row."""
        return self.tokens[self.start[row]:self.start[row] + self.prompt_len[row]].tolist()


def pack(rows: Iterable[tuple[list[int], list[int]]]):
    """(prompt ids, response ids) per row -> the first three fields of PairData. There must be at least one row."""
    tokens, start, prompt_len = array("i"), array("q", [0]), array("i")
    for prompt, response in rows:
        tokens.extend(prompt)
        tokens.extend(response)
        start.append(len(tokens))
        prompt_len.append(len(prompt))
    return (torch.frombuffer(tokens, dtype=torch.int32), torch.frombuffer(start, dtype=torch.int64),
            torch.frombuffer(prompt_len, dtype=torch.int32))


def pair_ids(pair: Pair, tokenizer) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids of a pair: what must stand before any text, prompt, chosen and rejected response, without end-of-text.
    Prompt and response are encoded apart, so no token spans the border."""
    ordinary = tokenizer.encode_ordinary  # to which a written-out "<|endoftext|>" is text
    try:
        if isinstance(pair.prompt, str):
            after = getattr(tokenizer, "encode_after", ordinary) if pair.prompt else ordinary
            start, prompt = getattr(tokenizer, "start", []), ordinary(pair.prompt)
            return start, prompt, after(pair.chosen), after(pair.rejected)
        if not hasattr(tokenizer, "chat"):
            raise Refused("it holds messages, which need the chat template of a Hugging Face model; name one with "
                          "--init_from, or write prompt, chosen and rejected as texts")
        prompt, responses = tokenizer.chat(pair.prompt, [pair.chosen, pair.rejected])
        begins = prompt[:1] == [tokenizer.hf.bos_token_id]  # the template has written it; it stays if prompts are cut
        return prompt[:begins], prompt[begins:], *responses
    except Refused as error:
        raise Refused(f"{pair.where}: {error}") from None


def encode(pairs: Iterable[Pair], tokenizer, block_size: int) -> PairData:
    """Token ids of pairs, the tokenizer's end of text appended to each response; prints what is dropped or cut, and how
    many.

    Only prompts are cut, from the left: a response that lost its <|endoftext|> would teach the model not to stop there.
    Raises Refused if no pair is left.
    """
    eot, numbers, prompts, p, lines, read = tokenizer.eot_token, {}, array("q"), array("f"), array("i"), 0
    notes = {  # what may happen to a pair -> how often it did
        (same := "pairs dropped: chosen and rejected are the same tokens"): 0,
        (mute := "pairs dropped: a response has no token, for this tokenizer"): 0,
        (long := f"pairs dropped: response and <|endoftext|> leave no room for a prompt in {block_size} tokens"): 0,
        (cut := f"prompts cut from the left to fit {block_size} tokens"): 0,
        (bare := "empty prompts: the response starts from <|endoftext|>"): 0,
        (against := "pairs have p < 1/2: kept as they are, their target favours the rejected response"): 0}

    def usable_rows():  # a generator, so that a long file is never held as Python objects
        nonlocal read
        for pair in pairs:
            read += 1
            start, prompt, chosen, rejected = pair_ids(pair, tokenizer)
            room = block_size - 1 - len(start) - max(len(chosen), len(rejected))
            if chosen == rejected or not chosen or not rejected or room < 1:
                notes[same if chosen == rejected else long if room < 1 else mute] += 1
                continue
            notes[bare] += not prompt
            notes[cut] += len(prompt) > room
            notes[against] += pair.p < 0.5
            prompt = start + prompt[-room:] or [eot]  # what GPT-2 reads at the start of a text
            key = array("i", prompt).tobytes()  # as cut: no other prompt is seen
            prompts.append(numbers.setdefault(key, len(numbers)))  # distinct prompts are numbered as they come
            p.append(pair.p)
            lines.append(int(pair.where.rpartition(":")[2]) if ":" in pair.where else read)
            yield prompt, chosen + [eot]
            yield prompt, rejected + [eot]
        for note, n in notes.items():
            if n:
                print(f"data: {n:,} of {read:,} {note}")
        if not p:
            raise Refused(f"--data: no usable pair among {read}; mend what is counted above, or raise --block_size")

    rows = pack(usable_rows())
    n = torch.arange(len(p))
    return PairData(*rows, 2 * n, 2 * n + 1, torch.frombuffer(p, dtype=torch.float32),
                    torch.frombuffer(prompts, dtype=torch.int64), torch.frombuffer(lines, dtype=torch.int32))


def split(data: PairData, holdout: float, generator: torch.Generator) -> tuple[PairData, PairData]:
    """(training, held-out) pairs, no prompt in both; `holdout` is the share of prompts held out, rounded, never all."""
    n = int(data.prompt.max()) + 1
    held = torch.zeros(n, dtype=torch.bool)
    held[torch.randperm(n, generator=generator)[:min(round(holdout * n), n - 1)]] = True
    held = held[data.prompt]
    return data.select(~held), data.select(held)


def draws(data: PairData, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields `steps` index tensors: `size` pairs of every prompt (all have as many), with replacement; 0: all pairs."""
    X = int(data.prompt.max()) + 1
    n = len(data.p) // X
    for _ in range(steps):
        picked = torch.randint(n, (X, size), generator=generator) if size else torch.arange(n)
        yield (picked + n * torch.arange(X)[:, None]).flatten()


def batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields `steps` index tensors (size,): all of 0..n-1 in random order, then all in another order, and so on."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:size]
        order = order[size:]


# ----------------------------------------------------------------------------------------------------- synthetic worlds
# A response is any string of at most three of the seven words below, "" included: 1 + 7 + 49 + 343 = 400 per prompt
# ("lengths": at most seven of two words, 255). The model has outputs for these words and <|endoftext|> only, and after
# the last word its context is full: it can emit nothing outside the list, so the probabilities of the list sum to one.
# In an open vocabulary pairs fix only the ratios between responses that occur, and training may move probability to
# strings that never occur ("leak"): on real data that is one reason why the log-prob of chosen responses may fall.

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
WORDS = {"world": list(VALENCE), "long": ["superb", "dull"]}  # tokenizer -> what its model can say, and how much of it:
MAX_WORDS = {"world": 3, "long": 7}
STOP = 0.25  # the base distribution: one word or more, every word as likely as any other, and after each it may end
WORLDS = {"bt": "world", "deterministic": "world", "cyclic": "world", "lengths": "long"}  # world -> its tokenizer
BANDITS = {"bandit2": "ab", "d1": "ab bc ac", "d2": "ab bc ca", "d3": "ab ba", "d3prime": "ac bc"}  # winner first


class World(NamedTuple):
    """A preference world that can be enumerated: X prompts, Y responses to each, all probabilities known, float64."""
    name: str
    prompts: list[str]     # X
    responses: list[str]   # Y
    length: torch.Tensor   # (X,Y) response tokens, <|endoftext|> included
    pstar: torch.Tensor    # (X,Y,Y) p*(y>y'|x)
    base: torch.Tensor     # (Y,) what the reference is trained on
    data: PairData         # row x * Y + y is prompt x with response y; pairs: none until drawn, or a bandit's
    tokenizer: str         # name of its encoding; "": none
    block_size: int        # tokens of the longest row
    vocab_size: int        # ids that the model can read: all but the bytes
    head_size: int         # ids that it can emit: response words and <|endoftext|>, which come first

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:  # -> (n,)
        """Rows with responses from the base distribution; the prompts take turns."""
        X, Y = self.length.shape
        return torch.arange(n) % X * Y + torch.multinomial(self.base, n, replacement=True, generator=generator)

    def draw(self, n: int, mu: torch.Tensor, labels: str, noise: float, generator: torch.Generator) -> PairData:
        """n pairs, y and y' i.i.d. from mu (X,Y) given y != y' (equals have margin 0 and target 0: no optimum moves).

        labels "hard": winner first, drawn from p*, flipped with probability `noise`; p = 1. "soft": as drawn; p = p*.
        """
        X, Y = self.length.shape
        if mu.square().sum(-1).max() > 0.999:  # of two draws, the chance that they are equal
            raise Refused("--mu ref: this reference nearly always says the same, so there are no pairs to draw from "
                          "it; use --mu uniform or another --init_from")
        per = -(-n // X)
        two = lambda: torch.multinomial(mu, 2 * per, replacement=True, generator=generator).view(X, per, 2)
        y = two()
        while (equal := y[..., :1] == y[..., 1:]).any():
            y = torch.where(equal, two(), y)
        x = torch.arange(X).repeat(per)[:n]  # the prompts take turns
        a, b = y.transpose(0, 1).reshape(-1, 2)[:n].T
        p = self.pstar[x, a, b]
        if labels == "hard":
            a_wins = (torch.rand(n, generator=generator) < p) ^ (torch.rand(n, generator=generator) < noise)
            a, b, p = torch.where(a_wins, a, b), torch.where(a_wins, b, a), torch.ones(n)
        return self.data._replace(chosen=x * Y + a, rejected=x * Y + b, p=p.float(), prompt=x,
                                  line=torch.arange(1, n + 1, dtype=torch.int32))


def build_world(name: str) -> World:
    """One of WORLDS. p*(y>y') is sigmoid(r - r') in "bt" and "lengths"; 1[r > r'], 1/2 on ties, in "deterministic";
    in "cyclic" sigmoid(r - r' + 2 c), c = 1, 0 or -1 by rock-paper-scissors on the first words: no reward explains it.
    """
    words, most = WORDS[WORLDS[name]], MAX_WORDS[WORLDS[name]]
    responses = [r for k in range(most + 1) for r in itertools.product(words, repeat=k)]
    reward = torch.tensor([[sum(VALENCE[w][x] for w in r) for r in responses] for x in range(len(SUBJECTS))],
                          dtype=torch.float64)
    gap = (reward[:, :, None] - reward[:, None, :]).round(decimals=4)  # (X,Y,Y); else .9+.5+.1 and .1+.5+.9 differ
    hand = torch.tensor([words.index(r[0]) % 3 if r else 3 for r in responses])  # 3: no first word, no game
    game = torch.tensor([[0, -1, 1, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]])[hand[:, None], hand[None, :]]
    pstar = ((gap.sign() + 1) / 2 if name == "deterministic" else (gap + 2 * game * (name == "cyclic")).sigmoid())
    base = [0.0 if not r else (1 - STOP) ** (len(r) - 1) / len(words) ** len(r) * (STOP if len(r) < most else 1)
            for r in responses]
    tokenizer, prompts = get_tokenizer(WORLDS[name]), [f"review of the {s}:" for s in SUBJECTS]
    texts = ["".join(f" {w}" for w in r) for r in responses]
    stops = [[tokenizer.eot_token] if len(r) < most else [] for r in responses]  # the last word is the end
    x_ids, y_ids = tokenizer.encode_ordinary_batch(prompts), tokenizer.encode_ordinary_batch(texts)
    rows = pack((x, y + stop) for x in x_ids for y, stop in zip(y_ids, stops))
    none = torch.empty(0, dtype=torch.int64)
    data = PairData(*rows, none, none, none, none, none)
    length = torch.tensor([len(r) + (len(r) < most) for r in responses]).expand(len(prompts), -1)
    return World(name, prompts, texts, length, pstar, torch.tensor(base, dtype=torch.float64), data, tokenizer.name,
                 block_size=len(x_ids[0]) + most, vocab_size=1 + max(map(max, x_ids)), head_size=len(words) + 1)


def build_bandit(name: str, copies: int) -> World:
    """One of BANDITS (section 5 of the paper): responses are one action, prompts are `copies` of the same problem, each
    with the same pairs. p* is what the pairs say, 1/2 for two actions that never meet. Prompt x is the token x, too."""
    pairs = [("abc".index(winner), "abc".index(loser)) for winner, loser in BANDITS[name].split()]
    X, Y, N = copies, 2 if name == "bandit2" else 3, len(pairs)
    wins = torch.zeros(Y, Y, dtype=torch.float64).index_put(tuple(torch.tensor(pairs).T), torch.ones(()).double())
    pstar = torch.where(wins + wins.T > 0, wins / (wins + wins.T), 0.5).expand(X, Y, Y)
    x, (winner, loser) = torch.arange(X).repeat_interleave(N), torch.tensor(pairs).repeat(X, 1).T
    data = PairData(*pack(([i], [y]) for i in range(X) for y in range(Y)), x * Y + winner, x * Y + loser,
                    torch.ones(X * N), x, torch.arange(N, dtype=torch.int32).repeat(X) + 1)
    return World(name, [""] * X, list("abc"[:Y]), torch.ones(X, Y, dtype=torch.int64), pstar,
                 torch.full((Y,), 1 / Y).double(), data, "", block_size=2, vocab_size=X, head_size=Y)


# ----------------------------------------------------------------------------------------------------- exact quantities

def optimum(ref_logp: torch.Tensor, pstar: torch.Tensor, mu: torch.Tensor, psi: Callable, tau: float) -> torch.Tensor:
    """log pi*, (X,Y): ref(y|x) exp(g(y)/tau), normalised; g(y) = E_{y'~mu} psi(p*(y>y'|x))  (Azar et al. eq. 7).

    Where psi is infinite (logit on certain pairs) it is a limit that no margin attains: all probability goes to the
    responses with most sure wins net of sure losses, between which the finite rest of psi decides."""
    value = psi(pstar)
    endless = value.isinf()
    sure = (value.sign() * endless * mu[:, None, :]).sum(-1)
    g = (value.masked_fill(endless, 0.0) * mu[:, None, :]).sum(-1)
    return (ref_logp + g / tau).masked_fill(sure < sure.amax(-1, keepdim=True) - 1e-9, -torch.inf).log_softmax(-1)


def mean_optimum(ref_logp: torch.Tensor, asked: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """log of ref(y) exp(|y| (asked(y) + c)), (X,Y): where the squared target leads if log-ratios are divided by lengths
    |y|; asked, (X,Y), is E_mu[target]. c makes it sum to one: here it does not divide out, so it is bisected."""
    low, high = -asked.amax(-1, keepdim=True), -asked.amin(-1, keepdim=True)
    for _ in range(100):
        c = (low + high) / 2
        below = (ref_logp + length * (asked + c)).logsumexp(-1, keepdim=True) < 0
        low, high = torch.where(below, c, low), torch.where(below, high, c)
    return ref_logp + length * (asked + c)


def kl(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # (Y,) or (X,Y), (X,Y) -> ()
    """KL(logp||other) in nats of policies given as log-probs, mean over prompts. What has probability 0 counts 0."""
    return (logp.exp() * (logp - other)).masked_fill(logp == -torch.inf, 0.0).sum(-1).mean()


def exact(logp, ref_logp, best_logp, fit_logp, pstar, mu, psi, tau) -> dict[str, float | None]:
    """What enumeration knows of a policy, mean over prompts; None where infinite. Log-probs, mu (X,Y); pstar (X,Y,Y).

    In nats: kl_ref KL(pi||ref); kl_opt KL(pi||pi*); kl_fit KL(pi||fit), if there is a fit; ratio, largest |log pi/ref|.
    win E_{y~pi,y'~mu} p*(y>y'); objective J = E psi(p*) - tau KL(pi||ref) (eq. 6), so J(pi*) - J(pi) = tau KL(pi||pi*).
    """
    pi = logp.exp()
    expect = lambda value: torch.einsum("xy,xyz,xz->x", pi, value, mu).mean()
    numbers = {"kl_ref": kl(logp, ref_logp), "kl_opt": kl(logp, best_logp), "win": expect(pstar),
               "objective": expect(psi(pstar).double()) - tau * kl(logp, ref_logp),
               "ratio": (logp - ref_logp).abs().max()}
    if fit_logp is not None:
        numbers["kl_fit"] = kl(logp, fit_logp)
    return {name: value.item() if value.isfinite() else None for name, value in numbers.items()}
