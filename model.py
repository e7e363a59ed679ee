"""A GPT with GPT-2's names and shapes, sampling, files of weights, and GPT-2's own weights.

What follows "for speed" gives the same numbers faster, but for rounding; skip it.
Sizes: R rows, T tokens in a row, C channels, V the ids that the model can emit (head_size).
"""
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Refused, short


@dataclass
class GPTConfig:
    """Sizes of a GPT. The comments give those of the smallest GPT-2, which has 124M parameters."""
    block_size: int  # 1024, the context: the most tokens that the model can see at once
    vocab_size: int  # 50257 ids that it can read
    head_size: int   # 50257 ids that it can emit, the first ones of the vocabulary (the toy world's model
                     # never says the words of its prompts)
    n_layer: int     # 12
    n_head: int      # 12
    n_embd: int      # 768 channels (C), a multiple of n_head


class Attention(nn.Module):
    """Causal self-attention: each position takes from itself and from the positions before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):  # (R,T,C) -> (R,T,C)
        q, k, v = self.split(self.c_attn(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(self.merge(y))

    def split(self, qkv):  # (R,T,3C) -> 3 of (R, heads, T, C / heads)
        return [part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                for part in qkv.chunk(3, -1)]

    def merge(self, x):  # (R, heads, T, C / heads) -> (R,T,C)
        return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (...,C) -> (...,C)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalised copy of the stream x and adds its output to x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):  # (R,T,C) -> (R,T,C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `hidden` and `head` are two methods, so that logits are made only where scored."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise Refused(f"--n_embd {config.n_embd} is no multiple of --n_head {config.n_head}; change one")
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # word vectors; the head's weights, too
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position vectors
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        for name, p in self.named_parameters():
            if p.dim() == 2:  # linear layers and both embeddings; LayerNorms stay as they are
                nn.init.normal_(p, std=0.02)
            if name.endswith("bias"):
                nn.init.zeros_(p)
            if name.endswith("c_proj.weight"):
                # as in GPT-2: 2 n_layer of these outputs add up in x, and their variances add up, too
                p.data /= (2 * config.n_layer) ** 0.5

    def embed(self, tokens, position):  # (R,T), (T,) -> (R,T,C)
        return self.transformer.wte(tokens) + self.transformer.wpe(position)

    def hidden(self, tokens):  # (R,T) -> (R,T,C)
        """What the head reads. At t it depends on tokens 0..t alone."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the context of {self.config.block_size}")
        x = self.embed(tokens, torch.arange(T, device=tokens.device))
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def head(self, x):  # (...,C) -> (...,V)
        """Logits: a dot product with the word vector of each id that can be emitted ("tied" to wte)."""
        weight = self.transformer.wte.weight
        # sliced only if it must be: the gradient of a slice is one more matrix of the full size
        if self.config.head_size < self.config.vocab_size:
            weight = weight[:self.config.head_size]
        return F.linear(x, weight)

    def forward(self, tokens):  # (R,T) -> (R,T,V)
        return self.head(self.hidden(tokens))


@torch.no_grad()
def generate(policy, tokenizer, text, temperature=1.0, seed=0, max_new_tokens=64):
    """What the policy says after `text`, up to end of text, max_new_tokens or a full context.

    Temperature 0 takes the likeliest token. Raises Refused if the prompt leaves no room for an answer.
    """
    # GPT-2 was trained with end of text before each text
    prompt = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]
    room = policy.config.block_size - len(prompt)
    if room < 1:
        raise Refused(f"a prompt of {len(prompt)} tokens fills the context of {policy.config.block_size}; "
                      "write a shorter one")
    random = torch.Generator().manual_seed(seed)
    device = next(policy.parameters()).device
    ids = prompt[:]
    for _ in range(min(max_new_tokens, room)):
        x = policy.hidden(torch.tensor([ids], device=device))[0, -1]  # (C,)
        # (V,), without ids that the tokenizer lacks, as some models emit more than it has
        logits = policy.head(x).cpu().double()[:tokenizer.n_vocab]
        if not logits.isfinite().all():
            raise Refused("the policy's weights are not finite: its run diverged; train again, --lr lower")
        # temperature 0: at 1e-9 only the likeliest token is left
        probs = (logits / max(temperature, 1e-9)).softmax(0)
        token = int(torch.multinomial(probs, 1, generator=random))
        if token == tokenizer.eot_token:
            break
        ids.append(token)
    # the text behind the prompt; all is decoded at once, as a letter may be made of several tokens
    return tokenizer.decode(ids)[len(tokenizer.decode(prompt)):]


# ------------------------------------------------------------------------------------------ files of weights

def save(path, policy, flags, **more):
    """Writes the policy, the flags of its run (a Namespace) and `more` as one file, which `read` reads.

    Whenever this is killed, `path` is the old file or the new one, whole. Raises Refused if it cannot write.
    """
    more["sizes"], more["flags"] = vars(policy.config), vars(flags)
    more["model"] = policy.state_dict()
    try:
        torch.save(more, f"{path}.tmp")
        with open(f"{path}.tmp", "r+b") as file:
            # file_digest reads to the end, so this appends 32 bytes behind torch's, which torch.load ignores
            file.write(hashlib.file_digest(file, "sha256").digest())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise Refused(f"{path}: cannot be written ({short(error)}); what was saved before is still there; "
                      "make room, then --resume (or, if there is no ref.pt yet, begin again)") from None


def read(path):
    """What save wrote to this file, on the CPU: a dict. No code in the file is run. Raises Refused."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        # the last 32 bytes are the digest of all before
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError("damaged, or not written by this program")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        raise Refused(f"{path}: not what a run saved ({short(error)}); name the ckpt.pt or ref.pt of a run; "
                      "to begin anew in its folder, leave --resume out and give --overwrite") from None


def load(path):
    """(policy, tokenizer's name) of a run's .pt file, or of GPT-2's folder or hub id. Raises Refused."""
    if not path.endswith(".pt"):
        return from_gpt2(path), "gpt2"
    saved = read(path)
    policy = GPT(GPTConfig(**saved["sizes"]))
    restore(policy, saved)
    return policy, saved["flags"]["tokenizer"]


def restore(policy, saved):
    """Gives the policy the weights that `read` has found. Raises Refused if they are of another model."""
    try:
        policy.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise Refused(f"the saved weights are those of another model ({short(error)}); if lab.models.hf made "
                      "them, go on with lab.models.hf; transformers loads its OUT/export") from None


# ---------------------------------------------------------------------------------------- GPT-2's own weights

def from_gpt2(name):
    """GPT-2's weights from a folder that transformers saved, or a hub id such as gpt2. Raises Refused."""
    import transformers  # here, since it takes seconds
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
        c, weights = theirs.config, theirs.state_dict()
        sizes = c.n_positions, c.vocab_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd
        policy = GPT(GPTConfig(*sizes))
        for key, p in policy.state_dict().items():  # the same names; theirs lists the tied head, too
            # GPT-2 keeps the matrices of its linear layers transposed
            flip = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            p.copy_(weights[key].T if flip else weights[key])  # p is the policy's weight, without gradient
        # a variant of GPT-2 has the same names, and gives other logits (dropout is off)
        tokens = torch.arange(8)[None]
        same = torch.allclose(policy(tokens), theirs(tokens).logits,
                              rtol=1e-4, atol=1e-3)
        # transformers makes up weights that a file lacks
        if info["missing_keys"] or c.vocab_size != 50257 or not same:
            raise ValueError(f"not GPT-2's weights: a {c.model_type} of {c.vocab_size} ids")
    except Exception as error:  # transformers passes on what its HTTP library and safetensors raise
        raise Refused(f"--init_from {name}: {short(error)}; name a run's .pt file, a folder that "
                      "transformers saved, or a GPT-2 of its hub, which needs a network once (other models: "
                      "python -m lab.models.hf)") from None
    return policy


# --------------------------------------------------------------------------------- for speed; skip at first
# The two responses of a pair share a prompt, and under causal attention they share all that is computed on
# it. So compute each distinct prefix (a token with all before it) once. The rows [a b c], [a b d], [e f] have
# U = 6 of them: a, ab, abc, abd, e, ef, numbered as they come. The rows then are [0 1 2], [0 1 3], [4 5]. The
# linear layers, which are nearly all of the work, see 6 positions and not 8. Attention goes row by row.

def sharing_pays(policy, tokens):
    """In longer rows than the toy world's, and in our GPT alone, as shared_hidden reaches into its blocks."""
    return type(policy) is GPT and tokens.shape[1] > 16


def shared_hidden(policy, tokens, wanted):  # (R,T), (R,T) -> (S,C)
    """policy.hidden(tokens)[wanted], where wanted is True at S positions, but for rounding.

    The loop is that of GPT.hidden with Block.forward written out.
    """
    prefixes = Prefixes(tokens, wanted)
    x = policy.embed(prefixes.tokens, prefixes.position)  # (U,C)
    for block in policy.transformer.h:
        x = x + prefixes.attend(block.attn, block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    return take(policy.transformer.ln_f(x), prefixes.where[wanted])


class Prefixes:
    """The distinct prefixes of these rows. What stands after a row's last wanted position is left out.

    In the example:
        tokens    (U,)   [a b c d e f]                  the last token of each prefix
        position  (U,)   [0 1 2 2 0 1]                  where it stands
        where     (R,T)  [[0 1 2] [0 1 3] [4 5 0]]      each row's prefixes, then zeros that nobody looks up
        rows             ([0 1 2], 3), ([0 1 3], 1), ([4 5], 2)
    rows: a row's prefixes, and how many of them no earlier row had. These come last, as what follows a new
    prefix is new. A row without new ones is left out here, but not in where.
    """

    def __init__(self, tokens, wanted):  # (R,T), (R,T)
        # number[parent, token], where parent is the number of the prefix before it, -1 if there is none:
        # {(-1,a): 0, (0,b): 1, (1,c): 2, (1,d): 3, ...}
        number = {}
        position, self.rows = [], []
        self.where = torch.zeros_like(tokens)
        # (R,) up to the last wanted position: wanted 0 1 1 0 is 0 1 1 0 from the right, argmax 1, length 3
        length = tokens.shape[1] - wanted.flip(1).int().argmax(1)
        for row, n in enumerate(length.tolist()):
            before, parent, ids = len(number), -1, []
            for t, token in enumerate(tokens[row, :n].tolist()):
                if (parent, token) not in number:
                    number[parent, token] = len(number)
                    position.append(t)
                parent = number[parent, token]
                ids.append(parent)
            self.where[row, :n] = torch.tensor(ids)
            new = len(number) - before
            if new:
                self.rows.append((self.where[row, :n], new))
        # in the order of their numbers, on the device of `tokens`
        self.tokens = tokens.new_tensor([token for _, token in number])
        self.position = tokens.new_tensor(position)

    def attend(self, attention, x):  # (U,C) -> (U,C)
        """Attention, a row at a time: queries are its new prefixes, keys and values all its prefixes.

        In the example: 0 1 2 among themselves, then 3 asks 0 1 3, then 4 5. That is the order of x again.
        """
        from torch.nn.attention.bias import causal_lower_right  # here, since it takes a second
        # a shared prefix is a key in several rows, so `take` copies it
        numbers = [row for row, _ in self.rows]
        qkv = take(attention.c_attn(x), torch.cat(numbers))  # (U,3C) -> (all rows' lengths, 3C)
        y = []
        parts = qkv.split([len(row) for row in numbers])
        for part, (row, new) in zip(parts, self.rows):
            q, k, v = attention.split(part[None])     # (1, heads, t, C / heads)
            # 2 queries and 4 keys: [1 1 1 0] and [1 1 1 1], so the last query sees all
            mask = causal_lower_right(new, len(row))
            # the old ones asked in an earlier row
            z = F.scaled_dot_product_attention(q[:, :, -new:], k, v, mask)
            y.append(attention.merge(z)[0])
        return attention.c_proj(torch.cat(y))


def take(x, where):  # (U,C), (S,) -> (S,C)
    """x[where]. What stands in many rows gets the sum of their gradients, here in float32.

    In bfloat16 256 + 1 is 256, so a long sum stops growing. F.embedding(where, x) is x[where].
    """
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return F.embedding(where, wide).to(x.dtype)
