"""Which tokens does a Hugging Face model read of my texts and conversations?

`Tokenizer` wraps a model's own tokenizer with what the core calls. What the model expects before any text,
say <s>, is in `start` and in no text. The policy of lab/models/hf.py puts it before every row, so that no cut
loses it.

`parse_pair` reads the object of one line. A list of {"role", "content"} is a conversation. It is written with
the prompt apart, with the prompt in both others, or with both. Only the last message may differ. The model's
chat template makes texts of it, and a response ends before the template's end of text.

Traps: SentencePiece puts a space before any text, and also between prompt and response, where nobody wrote
one. So a response is encoded behind its prompt. A written-out "</s>" is text in a text. In a message it is
refused, since the template's control tokens are parsed there. `python -m lab.models.tokens` shows your pairs.
"""
import json
import os

import data
from data import Refused, short
from lab.common import start

KEYS = ("prompt", "chosen", "rejected")
CONVERT = f"; of ShareGPT's messages, of a single one or a text {data.CONVERT} (with --prompt KEY)"


def quiet():
    """transformers, imported when it is needed, without progress bars and warnings."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def refused(name, error, remedy):
    """The Refused that says why a model or its tokenizer cannot be used; remedy: for a folder."""
    if not os.path.isdir(name):
        remedy = "there is no such folder, and an id of the hub needs a network once"
    return Refused(f"model {name}: {start.reason(error)}; {remedy}")


class Text(str):
    """A text with what stands before it, and whether control tokens in both are parsed."""

    def __new__(cls, text, before="", control=False):
        self = super().__new__(cls, text)
        self.before, self.control = before, control
        return self


class Tokenizer:
    """The tokenizer in a folder or hub id, with what the core uses of a tiktoken encoding. Raises Refused."""

    def __init__(self, name):
        try:
            self.hf = quiet().AutoTokenizer.from_pretrained(name)
            if not self.ids("a"):  # transformers makes an empty one, in silence, where there is none
                raise ValueError("it holds no tokenizer")
            if self.hf.eos_token_id is None:
                raise ValueError("no end of text to train; set eos_token in tokenizer_config.json")
        except Exception as error:  # whatever its HTTP library, its parsers and the file system raise
            raise refused(name, error, "put the model's tokenizer files there") from None
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
        """Ids of a text as if nothing preceded it. Of a Text, those that it has behind what stands before it,
        or at the start of a line where the tokenizer would join the two. Raises Refused."""
        if not isinstance(text, Text):
            text = Text(text)
        # what stands before takes the space
        leads = [text.before, "\n", ".", ":"] if self.spaced else [""]
        for lead in leads:
            first = self.ids(lead, text.control)
            whole = self.ids(lead + text, text.control)
            joined = self.hf.unk_token_id in first[-1:]  # perhaps: one token stands for any unknown letters
            if whole[:len(first)] == first and not joined:
                return whole[len(first):]
        raise Refused(f"the tokenizer joins what precedes {text[:20]!r} with it; rewrite its beginning")

    def context(self, asked=4096):
        """How many tokens a row may have: at most `asked`, and what the model has behind self.start."""
        config = quiet().AutoConfig.from_pretrained(self.hf.name_or_path).get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 10**9  # Bloom has none
        return min(asked, limit - len(self.start))

    def decode_single_token_bytes(self, token):
        """What a token stands for: its bytes if it is no whole letter, or SentencePiece's name for it."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        name, text = self.hf.convert_ids_to_tokens(token), self.decode([token])
        # of each letter by which byte-level BPE writes a byte
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        if "\ufffd" in text and byte_of.keys() >= set(name):
            return bytes(byte_of[letter] for letter in name)
        return (name if "\ufffd" in text or "\u2581" in name else text).encode()

    def decode(self, ids):
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)


def parse_pair(item, notes, tokenizer):
    """The Pair of one line's object, of texts or of conversations. Raises Refused."""
    if all(isinstance(item.get(key, ""), str) for key in KEYS):
        pair = data.parse_pair(item, notes)
        responses = [Text(text, pair.prompt, False) for text in (pair.chosen, pair.rejected)]
        return data.Pair(pair.prompt, *responses, pair.p)
    before, prompt, *texts = render(*conversation(item, notes), tokenizer)
    pair = data.parse_pair(item | dict.fromkeys(KEYS, ""), notes)  # for p
    responses = [Text(text, before + prompt, True) for text in texts]
    return data.Pair(Text(prompt, before, True), *responses, pair.p)


def is_message(value):
    texts = [value.get("role"), value.get("content")] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) for text in texts)


def messages(item, key, notes):
    """The messages under this key, with role and content alone; counts those with more. Raises Refused."""
    value = item.get(key, "no such key")
    if not isinstance(value, list) or not all(map(is_message, value)):
        it = short(json.dumps(value, default=str))
        raise Refused(f'{key!r} is {it}, not messages; write [{{"role": "user", "content": "..."}}]{CONVERT}')
    notes["messages with more than role and content, unused"] += sum(len(message) > 2 for message in value)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def conversation(item, notes):  # -> messages, chosen text, rejected text
    """What stands before the last message, and the two texts of the last message. Raises Refused."""
    for key in KEYS:
        if not isinstance(item.get(key, []), (list, str)):
            messages(item, key, notes)  # refuses it: a text beside it is no fault
    shared = messages(item, "prompt", notes) if "prompt" in item else []
    chosen, rejected = (joined(shared, messages(item, key, notes), key) for key in KEYS[1:])
    if chosen[:-1] != rejected[:-1] or len(chosen) == 1:
        raise Refused("chosen and rejected need messages, the same in both, before their last ones; write "
                      "them under 'prompt', or name their key: python -m lab.models.jsonl FILE --prompt KEY")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def joined(shared, found, key):
    """The whole conversation: the prompt's messages, then those under this key, which may repeat them."""
    if not found or found[-1]["role"] != "assistant":
        raise Refused(f"{key!r} does not end in a message of role 'assistant'; add the answer")
    if found[:len(shared)] == shared:
        return found
    if found[0]["role"] == "assistant":
        return shared + found
    raise Refused(f"'prompt' begins with {short(json.dumps(shared[0]))}, {key!r} with "
                  f"{short(json.dumps(found[0]))}; begin both alike, or leave the former out of the latter")


def render(before, chosen, rejected, tokenizer):  # -> start, prompt, chosen, rejected: texts
    """As the model's chat template writes them. Raises Refused."""
    hf = tokenizer.hf
    control = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    texts = [message["role"] + " " + message["content"] for message in before]
    written = " ".join([*texts, chosen, rejected])
    for token in sorted(control.union(hf.all_special_tokens)):
        if token in written:
            raise Refused(f"a message holds {token!r}, which would be a control token; remove it")
    try:
        prompt = hf.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        answers = [{"role": "assistant", "content": text} for text in (chosen, rejected)]
        wholes = [hf.apply_chat_template([*before, answer], tokenize=False) for answer in answers]
    except Exception as error:  # jinja's, and what a template raises itself
        raise Refused(f"the model's chat template refuses these messages ({short(error)}); mend their roles "
                      "or order, or write texts") from None
    if not all(whole.startswith(prompt) for whole in wholes):
        raise Refused("the model's chat template writes the prompt otherwise before an answer; write texts")
    start = "".join(hf.convert_ids_to_tokens(tokenizer.start))
    if not prompt.startswith(start):  # then it stands before these conversations, too
        start = ""
    responses = [whole[len(prompt):].split(hf.eos_token)[0] for whole in wholes]
    return start, prompt[len(start):], *responses
