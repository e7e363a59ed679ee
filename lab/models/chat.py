"""Which tokens does a Hugging Face model read of my texts and conversations?

`Tokenizer` wraps a model's own tokenizer with what the core calls. What the model expects before any text,
say <s>, is in `start` and in no text: lab/models/hf.py's policy puts it before every row, so no cut loses it.

`parse_line` reads a JSONL line. Lists of {"role", "content"} are conversations, written in five ways: the
prompt apart, in both others, in all three, as the text of one message, or empty. Only the last message may
differ. The model's chat template makes texts of them; a response ends before the template's end of text.

Traps: SentencePiece puts a space before any text, also between prompt and response, where nobody wrote one,
so a response is encoded behind its prompt. A written-out "</s>" is text in a text, but refused in a message,
where the template's control tokens are parsed. To see your own pairs' tokens: lab.models.hf --steps 1, lab.models.show.

Answer: prompt and response have the very ids that apply_chat_template gives the whole conversation, in all
five ways (lab/models/test_hf.py: bytes, and SentencePiece's way with a space at first or always; 0 ids differ).
"""
import json

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
    """The tokenizer in a folder or hub id, with what the core uses of a tiktoken encoding. Raises Refused."""

    def __init__(self, name):
        transformers = model.quiet_transformers()
        try:
            self.hf = transformers.AutoTokenizer.from_pretrained(name)
            if not self.ids("a"):  # transformers makes an empty one, in silence, where there is none
                raise ValueError("there is none")
            if self.hf.eos_token_id is None:
                raise ValueError("it has no end of text to train; set eos_token in tokenizer_config.json")
        except Exception as error:  # whatever its HTTP library, its parsers and the file system raise
            raise Refused(f"--init_from {name}: its tokenizer cannot be used ({first_line(error)}); put the "
                          "model's tokenizer files into that folder") from None
        self.name = f"hf:{name}"
        self.eot_token = self.hf.eos_token_id
        self.n_vocab = max(self.hf.get_vocab().values()) + 1
        letter, whole = self.ids("a"), self.hf("a").input_ids
        places = [k for k in range(len(whole)) if whole[k:k + len(letter)] == letter]
        self.start = whole[:places[0]] if places else []
        # tokenizers' marks of a space, although nobody wrote one
        self.spaced = self.hf.convert_ids_to_tokens(letter)[0].startswith(("\u2581", "\u0120"))

    def ids(self, text, control=False):
        """Ids of a text as if nothing preceded it."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=not control)

    def encode_ordinary(self, text):
        """Ids of a text as if nothing preceded it; of a Text, those that it has behind what stands before it,
        or at the start of a line where the tokenizer would join the two. Raises Refused."""
        before, control = getattr(text, "before", ""), getattr(text, "control", False)
        for lead in [before, "\n", ".", ":"] if self.spaced else [""]:  # what stands before takes the space
            first = self.ids(lead, control)
            whole = self.ids(lead + text, control)
            joined = self.hf.unk_token_id in first[-1:]  # perhaps: one token stands for any unknown letters
            if whole[:len(first)] == first and not joined:
                return whole[len(first):]
        raise Refused(f"the tokenizer joins what precedes {text[:20]!r} with it; rewrite its beginning")

    def decode(self, ids):
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)


def first_line(error):
    """What went wrong, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    prompt = mark(pair.prompt, before, control)
    responses = [mark(text, before + prompt, control) for text in (pair.chosen, pair.rejected)]
    return data.Pair(prompt, *responses, pair.p, where)


def messages(item, key, where, notes):
    """The messages under this key, with role and content alone."""
    found = []
    for message in item.get(key, []):
        kept = {part: message.get(part) for part in ("role", "content")} if isinstance(message, dict) else {}
        if not kept or not all(isinstance(text, str) for text in kept.values()):
            raise Refused(f"{where}: {key!r} holds {str(message)[:40]!r}, which is no message; write "
                          '{"role": "user", "content": "..."}')
        notes.update(f"messages with key {more!r}, not used" for more in message.keys() - kept.keys())
        found.append(kept)
    return found


def conversation(item, where, notes):  # -> messages, chosen text, rejected text
    """What stands before the last message, and the two texts of the last message."""
    prompt, whole = item.get("prompt", []), {}
    shared = messages(item, "prompt", where, notes) if isinstance(prompt, list) else []
    for key in ("chosen", "rejected"):
        if not isinstance(item.get(key), list):
            raise Refused(f"{where}: {key!r} is no list of messages, but another key is; write all alike")
        found = messages(item, key, where, notes)
        whole[key] = found if found[:len(shared)] == shared else shared + found
        if not found or found[-1]["role"] != "assistant" or not found[-1]["content"]:
            raise Refused(f"{where}: {key!r} must end in a message of role 'assistant' that is not empty")
    before = whole["chosen"][:-1]
    if before != whole["rejected"][:-1]:
        raise Refused(f"{where}: chosen and rejected differ before their last messages; make these equal")
    if not isinstance(prompt, list) and prompt not in [message["content"] for message in before]:
        raise Refused(f"{where}: 'prompt' is the text of no message of both conversations; leave it out")
    return before, whole["chosen"][-1]["content"], whole["rejected"][-1]["content"]


def render(before, chosen, rejected, where, notes, tokenizer):  # -> start, prompt, chosen, rejected: texts
    """As the model's chat template writes them."""
    hf = tokenizer.hf
    if not hf.chat_template:
        raise Refused(f"{where}: messages, but the model's tokenizer has no chat template; write texts")
    control = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    written = [chosen, rejected]
    for message in before:
        written += message.values()
    for token in sorted(control.union(hf.all_special_tokens)):
        if any(token in text for text in written):
            raise Refused(f"{where}: a message holds {token!r}, which would be a control token; remove it")
    try:
        prompt = hf.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        wholes = [hf.apply_chat_template([*before, answer], tokenize=False) for answer in answers]
    except Exception as error:  # jinja's, and what a template raises itself
        raise Refused(f"{where}: the model's chat template refuses these messages ({first_line(error)}); "
                      "mend their roles or order") from None
    if not all(whole.startswith(prompt) for whole in wholes):
        raise Refused(f"{where}: the model's chat template writes the prompt otherwise before an answer; "
                      "write texts")
    start = "".join(hf.convert_ids_to_tokens(tokenizer.start))
    if not prompt.startswith(start):
        notes[f"conversations whose chat template writes no {start!r}; it stands before them, too"] += 1
        start = ""
    responses = [whole[len(prompt):].split(hf.eos_token)[0] for whole in wholes]
    return start, prompt[len(start):], *responses


if __name__ == "__main__":
    print(__doc__)
