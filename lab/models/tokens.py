"""What does the model see of my pairs, token by token?

  python -m lab.models.tokens --data FILE.jsonl                             as python ipo.py reads it
  python -m lab.models.tokens --data FILE.jsonl --tokenizer bytes --block_size 64
  python -m lab.models.tokens --data FILE.jsonl --init_from MODEL           as lab.models.hf reads it

Look before you train. Every token of the first three pairs stands between bars. A token that is no whole
letter is shown by its bytes or its name, so that different tokens look different. The tokens of both
responses are scored, end of text included. The prompt's are not. If the prompt was cut, what is left of it is
shown.
Trap: the border between prompt and response is where your file puts it. " yes" and "yes" are other tokens.
"""
import data
from lab.common import start
from lab.models import chat


def prepare(args):
    """(tokenizer, block_size, pairs) of these flags, as the program has them that trains. Raises Refused."""
    if not args.init_from:
        tokenizer = data.get_tokenizer(args.tokenizer or "gpt2")
        return tokenizer, args.block_size or 256, data.read_jsonl(args.data)
    if args.tokenizer or args.block_size:
        raise data.Refused("--tokenizer and --block_size do nothing with --init_from, which has its own")
    tokenizer = chat.Tokenizer(args.init_from)
    pairs = data.read_jsonl(args.data, lambda item, notes: chat.parse_pair(item, notes, tokenizer))
    return tokenizer, tokenizer.context(), pairs


def piece(tokenizer, token):
    """What a token stands for, on one line; bytes that are no whole letter as \\xe4."""
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def show(pair, tokenizer, size):
    """Prints a pair as the program has it that trains."""
    try:
        rows = data.encode([pair], tokenizer, size)  # which says why it drops a pair
    except data.Refused:
        return
    n = int(rows.prompt_len[0])
    cut = max(0, len(tokenizer.encode_ordinary(pair.prompt)) - n)
    parts = [("prompt", rows.tokens[0, :n], f"{cut} more are cut" if cut else "not scored")]
    for row, name in enumerate(["chosen", "rejected"]):
        parts.append((name, rows.tokens[row, n:rows.length[row]], "scored"))
    for name, ids, note in parts:
        shown = "|".join(piece(tokenizer, token) for token in ids.tolist())
        print(f"  {name:8} {len(ids):4} tokens, {note}: |{shown}|")


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--data", required=True, help="JSONL file of pairs")
    own.add_argument("--tokenizer", help="gpt2, or bytes (needs no network) [gpt2]")
    own.add_argument("--init_from", help="a folder or hub id of transformers")
    own.add_argument("--block_size", type=int, help="context in tokens [256]")
    args = own.parse_args(argv)
    tokenizer, size, pairs = prepare(args)
    for number, pair in enumerate(pairs[:3], 1):
        print(f"\npair {number}, p {pair.p:.2f}")
        show(pair, tokenizer, size)
    print()
    rows = data.encode(pairs, tokenizer, size)
    scored = rows.length - rows.prompt_len
    print(f"\nOf {rows.length.sum():,} tokens in {len(rows.p):,} pairs {scored.sum():,} are scored, end of "
          f"text included. The longest row has {rows.length.max():,} of at most {size:,} tokens.")


if __name__ == "__main__":
    raise SystemExit(start.main("tokens", run))
