"""Which tokens does a Hugging Face model read of my texts and conversations?

`Tokenizer` wraps a model's own tokenizer with what the core calls. What the model expects before any text, <s> say,
is in its `start` and in no text: lab/hf.py's policy puts it before every row, so that no cut from the left loses it.

`read` yields data.Pair from JSONL lines. Lists of {"role", "content"} are conversations; prompt, chosen, rejected may be
written in five ways: prompt apart, in both others, in all three, as the text of one message, or empty. Only the last
message may differ. The model's chat template writes them as text; the response ends before the template's end of text.

Traps: SentencePiece puts a space before any text, also between prompt and response, where nobody wrote one, so a
response is encoded behind its prompt. A written-out "</s>" is text in a text and refused in a message, where the
template's control tokens are parsed.
`python -m lab.chat --init_from FOLDER --data FILE.jsonl` prints the tokens of the first pairs, before any training.
Answer: prompt and response apart have the very ids that apply_chat_template gives the whole conversation, and the
five ways give the same ids (lab/test_hf.py: byte-level BPE, and SentencePiece-like with a space first or always).
"""
import argparse
import itertools
import json
import sys
from collections import Counter

import data
import model
from data import Refused

KEYS = ("prompt", "chosen", "rejected")


class Text(str):
    """A text with what stands before it, and whether control tokens in both are parsed."""
    before = ""
    control = False


def mark(text, before, control):
    """The same text, as a Text."""
    text = Text(text)
    text.before, text.control = before, control
    return text


class Tokenizer:
    """A model's tokenizer, from its folder or hub id, with the members of a tiktoken encoding that the core uses."""

    def __init__(self, name):
        transformers = model.quiet_transformers()
        try:
            self.hf = transformers.AutoTokenizer.from_pretrained(name)
            if not self.ids("a"):  # transformers makes an empty one, in silence, where there is none
                raise ValueError("there is none")
            if self.hf.eos_token_id is None:
                raise ValueError("it has no end of text to train; set eos_token in tokenizer_config.json")
        except Exception as error:  # whatever its HTTP library, its parsers and the file system raise
            raise Refused(f"--init_from {name}: its tokenizer cannot be used ({first_line(error)}); put the model's "
                          "tokenizer files into that folder") from None
        self.name = f"hf:{name}"
        self.eot_token = self.hf.eos_token_id
        self.n_vocab = max(self.hf.get_vocab().values()) + 1
        letter, whole = self.ids("a"), self.hf("a").input_ids
        places = [k for k in range(len(whole)) if whole[k:k + len(letter)] == letter]
        self.start = whole[:places[0]] if places else []
        mark_of_space = self.hf.convert_ids_to_tokens(letter)[0].startswith(("\u2581", "\u0120"))
        self.leads = ["\n", ".", ":"] if mark_of_space else [""]  # a letter before a text takes that space

    def ids(self, text, control=False):
        """Ids of a text as if nothing preceded it."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=not control)

    def encode_ordinary(self, text):
        """Ids of a text, as if nothing preceded it; of a Text, those that it has behind what stands before it. Where
        the tokenizer would join the two, those that it has at the start of a line. Raises Refused."""
        before, control = getattr(text, "before", ""), getattr(text, "control", False)
        for lead in [before, *self.leads]:
            first, whole = self.ids(lead, control), self.ids(lead + text, control)
            if whole[:len(first)] == first:
                return whole[len(first):]
        raise Refused(f"the tokenizer joins whatever precedes the response {text[:20]!r} with it; rewrite its start")

    def decode(self, ids):
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)


def first_line(error):
    """What went wrong, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read(path, tokenizer):
    """Yields a Pair per line of a JSONL file; prints what was skipped. Raises Refused."""
    notes = Counter()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                notes["blank lines skipped"] += not line.strip()
                if line.strip():
                    yield parse_line(line, f"{path}:{number}", notes, tokenizer)
    except OSError as error:
        raise Refused(f"--data {path}: {error.strerror}; name a JSONL file") from None
    data.tell(path, notes)


def parse_line(line, where, notes, tokenizer):
    """The Pair on one line, of texts or of conversations; the core checks what both have in common."""
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        item = None  # the core says why
    before, control = "", isinstance(item, dict) and any(isinstance(item.get(key), list) for key in KEYS)
    if control:
        before, *texts = render(*conversation(item, where, notes), where, notes, tokenizer)
        line = json.dumps(item | dict(zip(KEYS, texts))).encode()
    pair = data.parse_line(line, where, notes)
    responses = [mark(text, before + pair.prompt, control) for text in (pair.chosen, pair.rejected)]
    return data.Pair(mark(pair.prompt, before, control), *responses, pair.p, where)


def messages(item, key, where, notes):
    """The messages under this key, with role and content alone."""
    for message in item[key]:
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise Refused(f"{where}: {key!r} holds {str(message)[:40]!r}, which is no message; write "
                          '{"role": "user", "content": "..."}')
        notes.update(f"messages with key {more!r}, not used" for more in message.keys() - {"role", "content"})
    return [{"role": message["role"], "content": message["content"]} for message in item[key]]


def conversation(item, where, notes):  # -> messages, chosen text, rejected text
    """What stands before the last message, and the two texts of the last message."""
    prompt, whole = item.get("prompt", []), {}
    shared = messages(item, "prompt", where, notes) if isinstance(prompt, list) else []
    for key in ("chosen", "rejected"):
        if not isinstance(item.get(key), list):
            raise Refused(f"{where}: {key!r} is no list of messages, but another key holds one; write all alike")
        found = messages(item, key, where, notes)
        whole[key] = found if found[:len(shared)] == shared else shared + found
        last = whole[key][-1] if found else {"role": "none"}
        if last["role"] != "assistant" or not last["content"]:
            raise Refused(f"{where}: {key!r} must end in a message of role 'assistant', the response, not empty")
    before = whole["chosen"][:-1]
    if before != whole["rejected"][:-1]:
        raise Refused(f"{where}: chosen and rejected differ before their last messages; only the last may differ")
    if not isinstance(prompt, list) and prompt not in [message["content"] for message in before]:
        raise Refused(f"{where}: 'prompt' is the text of no message of both conversations; leave it out")
    return before, whole["chosen"][-1]["content"], whole["rejected"][-1]["content"]


def render(before, chosen, rejected, where, notes, tokenizer):  # -> start, prompt, chosen, rejected as texts
    """As the model's chat template writes them."""
    hf = tokenizer.hf
    if not hf.chat_template:
        raise Refused(f"{where}: messages, and the model's tokenizer has no chat template; write texts instead")
    control = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    written = [chosen, rejected, *(part for message in before for part in message.values())]
    for token in sorted(control | {*hf.all_special_tokens}):
        if any(token in text for text in written):
            raise Refused(f"{where}: a message holds {token!r}, which would become a control token; remove it")
    try:
        prompt = hf.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        wholes = [hf.apply_chat_template([*before, answer], tokenize=False) for answer in answers]
    except Exception as error:  # jinja's, and what a template raises itself
        raise Refused(f"{where}: the model's chat template refuses these messages ({first_line(error)}); mend their "
                      "roles or order") from None
    if not all(whole.startswith(prompt) for whole in wholes):
        raise Refused(f"{where}: the model's chat template writes the prompt differently with an answer behind it, so "
                      "it is unknown where the answer begins; write texts instead")
    start = "".join(hf.convert_ids_to_tokens(tokenizer.start))
    if not prompt.startswith(start):
        notes[f"conversations without {start!r}, which the tokenizer puts before any text: put there, too"] += 1
        start = ""
    responses = [whole[len(prompt):].split(hf.eos_token)[0] for whole in wholes]
    return start, prompt[len(start):], *responses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", required=True, help="folder or hub id of the model")
    parser.add_argument("--data", required=True, help="JSONL file of pairs: texts, or lists of messages")
    parser.add_argument("--pairs", type=int, default=3, help="how many to print [3]")
    args = parser.parse_args(argv)
    try:
        tokenizer = Tokenizer(args.init_from)
        for pair in itertools.islice(read(args.data, tokenizer), args.pairs):
            print(f"\n{pair.where}, after {tokenizer.decode(tokenizer.start)!r}")
            for key, text, end in zip(KEYS, pair, ([], [tokenizer.eot_token], [tokenizer.eot_token])):
                ids = tokenizer.encode_ordinary(text) + end
                print(f"{key:8} {len(ids):5} tokens: {'|'.join(map(repr, map(tokenizer.decode, ids)))}")
        return 0
    except Refused as error:
        print("chat.py:", error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
