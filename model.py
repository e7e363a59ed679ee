"""A GPT with GPT-2's names and shapes, sampling, GPT-2's weights in and out, checkpoint files.

Nothing here knows what a preference is.
Sizes: R rows, T tokens in a row, C channels, V vocabulary, S scored tokens; a prefix is a position with
all tokens before it, U counts the distinct ones of a batch.
"""
import os
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# for bfloat16 on CPUs (ipo.autocast): attention as plain products makes no detour by float32
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


class Refused(ValueError):
    """Sizes, weights or prompts that cannot be used, in one line: which, why, and the remedy."""


@dataclass
class GPTConfig:
    """Sizes of a GPT; the defaults are GPT-2's smallest (124M parameters)."""
    block_size: int = 1024   # tokens of context
    vocab_size: int = 50257  # ids that can be read
    head_size: int = 0       # ids that can be emitted: 0 .. head_size-1; 0 means all of vocab_size
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768        # channels C, a multiple of n_head


def attend(qkv, n_head, begin=0):  # (R,T,3C) -> (R,T-begin,C)
    """Causal attention: what each position from `begin` on (0: all) takes from itself and those before it."""
    q, k, v = qkv.unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4)  # each (R, heads, T, C / heads)
    T = qkv.shape[1]
    # is_causal alone would set the first query beside the first key, not the last beside the last
    mask = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()[begin:] if begin else None
    y = F.scaled_dot_product_attention(q[:, :, begin:], k, v, mask, is_causal=not begin)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, shared=None):  # (R,T,C) -> (R,T,C), or if shared (U,C) -> (U,C)
        qkv = self.c_attn(x)
        y = shared.attend(qkv, self.n_head) if shared else attend(qkv, self.n_head)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (...,C) -> (...,C)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised stream and adds to the raw one."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, shared=None):  # (R,T,C) -> (R,T,C), or if shared (U,C) -> (U,C)
        x = x + self.attn(self.ln_1(x), shared)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `hidden` and `head` are separate: only scored positions pay for the vocabulary."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise Refused(f"--n_embd {config.n_embd} is no multiple of --n_head {config.n_head}; change one")
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # the head's weights, too
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        for name, p in self.named_parameters():
            if p.dim() == 2:
                added = name.endswith("c_proj.weight")  # to the stream, 2 n_layer times: GPT-2's scale
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, wanted=None):  # (R,T) -> (R,T,C)
        """The normalised stream after the last block. wanted (R,T), for speed: where it is False,
        the result is not read and may be anything."""
        if tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the context of {self.config.block_size}")
        position = torch.arange(tokens.shape[1], device=tokens.device)
        shared = None if wanted is None else Shared(tokens, wanted)
        if shared:  # for speed; skip at first: see the end of this file
            tokens, position = shared.tokens, shared.position
        x = self.transformer.wte(tokens) + self.transformer.wpe(position)
        for block in self.transformer.h:
            x = block(x, shared)
        x = self.transformer.ln_f(x)
        return spread(x, shared.back) if shared else x

    def head(self, x):  # (...,C) -> (...,V)
        """Logits over the ids that can be emitted."""
        weight = self.transformer.wte.weight
        return F.linear(x, weight[:self.config.head_size] if self.config.head_size else weight)

    def forward(self, tokens):  # (R,T) -> (R,T,V)
        return self.head(self.hidden(tokens))

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2's weights from a folder that transformers saved, or a hub id such as gpt2. Raises Refused."""
        transformers = quiet_transformers()
        try:
            c = transformers.AutoConfig.from_pretrained(name)
            if c.model_type != "gpt2":
                raise ValueError(f"a {c.model_type} model, not GPT-2; train it with python -m lab.hf")
            hf, info = transformers.GPT2LMHeadModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"]:
                raise ValueError(f"weights are missing: {sorted(map(str, info['missing_keys']))[:2]}")
            with torch.device("meta"):  # no storage: the weights come below
                policy = cls(GPTConfig(c.n_positions, c.vocab_size, 0, c.n_layer, c.n_head, c.n_embd))
            state = transposed(hf.state_dict())  # clone: these are pages of the file, which would stay
            policy.load_state_dict({key: state[key].clone() for key in policy.state_dict()}, assign=True)
            tokens = torch.arange(min(8, c.n_positions))[None] % c.vocab_size
            with torch.no_grad():  # a variant (activation, scale, untied head) must not pass for GPT-2
                if not torch.allclose(policy(tokens), hf.eval()(tokens).logits, rtol=1e-4, atol=1e-3):
                    raise ValueError("a variant of GPT-2, whose logits differ; use python -m lab.hf")
        except Exception as error:  # transformers passes on what its HTTP library and safetensors raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(f"--init_from {name}: {why}; name a run's .pt file, a folder that transformers "
                                "saved, or a GPT-2 of its hub (which needs a network once)") from None
        return policy

    def save_pretrained(self, folder, eot_token=50256):
        """Writes a folder that transformers loads as GPT2LMHeadModel. Raises Refused for a world's model."""
        c = self.config
        if c.head_size:
            raise Refused(f"{folder}: GPT-2 has no head of {c.head_size} ids; only models of texts are saved")
        transformers = quiet_transformers()
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, bos_token_id=eot_token, eos_token_id=eot_token))
        hf.load_state_dict(transposed(self.state_dict()), strict=False)  # the tied head is not in ours
        hf.save_pretrained(folder)


def transposed(state):
    """A GPT's state in transformers' shapes, and back: it keeps the matrices of linear layers transposed."""
    flip = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: value.T.contiguous() if name.endswith(flip) else value for name, value in state.items()}


def quiet_transformers():
    """The package, imported when it is needed, without progress bars and warnings."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ------------------------------------------------------------------------------ sampling, checkpoint files

@torch.no_grad()
def generate(policy, tokenizer, prompt, temperature=1.0, seed=0, max_new_tokens=64):
    """A text sampled after `prompt` (ids), up to <|endoftext|>, max_new_tokens or a full context. temperature
    0 takes the likeliest token. Same seed and prompt, same draws: only policies differ. Raises Refused."""
    prompt = list(prompt) or [tokenizer.eot_token]
    ids, V, T = [*prompt], policy.config.vocab_size, policy.config.block_size
    if len(ids) >= T or max(ids) >= V:
        raise Refused(f"a prompt of {len(ids)} tokens fills the context of {T}, or holds words that the "
                      'model never saw; in a world write, say, "review of the pizza:"')
    device, generator = next(policy.parameters()).device, torch.Generator().manual_seed(seed + sum(ids))
    for _ in range(min(max_new_tokens, T - len(ids))):
        x = policy.hidden(torch.tensor([ids], device=device))[0, -1]
        logits = policy.head(x).cpu().double()  # (V,)
        new = int(logits.argmax())
        if temperature:
            probs = ((logits - logits.max()) / temperature).softmax(0)  # or a tiny temperature would overflow
            new = int(torch.multinomial(probs, 1, generator=generator))
        if new == tokenizer.eot_token:
            break
        ids.append(new)
    return tokenizer.decode(ids)[len(tokenizer.decode(prompt)):]


def save(path, policy, **extra):
    """Writes sizes, weights and extra (plain values, tensors) in one step: whenever it is killed, path is the
    old file or the new one, whole. Raises Refused if the disk is full, say."""
    try:
        torch.save({"config": vars(policy.config), "model": policy.state_dict(), **extra}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise Refused(f"{path}: cannot be written ({why}); the old file stays; mend that, --resume") from None


def load(path, policy=None, optimizer=None):
    """(policy, what save got as extra). path: save's file, of which nothing is executed, or what
    from_pretrained takes. Weights go into a new GPT on the CPU, or the `policy` given; the optimizer's state
    into `optimizer`, if given. Raises Refused."""
    if not str(path).endswith(".pt"):
        return GPT.from_pretrained(path), {}
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError(f"{damaged} is damaged")
        extra = torch.load(path, map_location="cpu", weights_only=True)
        policy = policy or GPT(GPTConfig(**extra.pop("config")))
        policy.load_state_dict(extra.pop("model"))
        if optimizer:
            optimizer.load_state_dict(extra.pop("optimizer"))
            extra["step"] = int(extra["step"])
    except Exception as error:  # a file that is cut, foreign or edited raises a dozen kinds
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise Refused(f"{path}: no whole checkpoint ({why}); name the ckpt.pt that a run left") from None
    return policy, extra


# --------------------------------------------------------------------------------- for speed; skip at first

def in_chunks(f, x, ids, size=512):  # f: (S,C), (S,) -> (S,)
    """f(x, ids). Above 512 tokens, 512 at a time, whose logits are computed again in the backward pass: never
    (S,V)."""
    if len(ids) <= size:
        return f(x, ids)
    parts = zip(x.split(size), ids.split(size))
    return torch.cat([checkpoint(f, *part, use_reentrant=False) for part in parts])


def spread(x, where):  # (U,C), (...) -> (...,C)
    """x[where]. Gradients of a row that is taken often are summed: fast here, and not in bfloat16, where long
    sums stall."""
    return F.embedding(where, x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


class Shared:
    """Rows of tokens as U distinct prefixes. Under causal attention a position depends on the tokens up to it
    alone, so what rows share at the start, above all a pair's prompt, is computed once, and what follows a
    row's last wanted position never. Sorted rows show which prefixes are equal: nothing is approximated.
    Rows [a b c], [a b d], [e f -]: U = 6 (a, ab, abc, abd, e, ef), own [0 1 2], [-1 -1 3], [4 5 -1],
    where [0 1 2], [0 1 3], [4 5 3]. Attention alone sees rows, each asking for little more than its own."""

    def __init__(self, tokens, wanted):  # (R,T), (R,T)
        needed = wanted.flip(1).cumsum(1).flip(1) > 0     # what is wanted, and all that stands before it
        # N <= R distinct rows, sorted, -1 after their end; which of them each row is
        rows, row = tokens.masked_fill(~needed, -1).unique(dim=0, return_inverse=True)  # (N,T), (R,)
        above = torch.cat([rows[:1] - 1, rows[:-1]])      # the row before; before the first, nothing like it
        new = ((rows != above).cumsum(1) > 0) & (rows >= 0)  # from the first difference to the row above on
        self.tokens, self.position = rows[new], new.nonzero()[:, 1]             # (U,), (U,)
        own = (new.flatten().cumsum(0).view_as(new) - 1).masked_fill(~new, -1)  # place in U, -1: not new
        where = own.cummax(0).values.clamp(min=0)         # not new: as above, the largest so far there
        self.back = where[row]                            # (R,T)
        # rows whose own positions begin and end alike, rounded outwards to steps, attend together
        step = max(16, tokens.shape[1] // 16)
        length = (rows >= 0).sum(1).clamp(min=1)          # a row of which nothing is wanted counts as 1
        bounds = torch.stack([length - new.sum(1), length + step - 1], 1) // step * step
        bounds, group = bounds.unique(dim=0, return_inverse=True)
        self.groups = [(where[group == g, :end], own[group == g, begin:end])  # seen; asked for, or -1
                       for g, (begin, end) in enumerate(bounds.tolist())]
        asked = torch.cat([own.flatten() for _, own in self.groups])
        self.answer = asked.argsort()[-len(self.tokens):]  # (U,) places in asked of 0 .. U-1, behind all -1

    def attend(self, qkv, n_head):  # (U,3C) -> (U,C)
        flat = spread(qkv, torch.cat([where.flatten() for where, _ in self.groups]))
        parts = flat.split([where.numel() for where, _ in self.groups])
        y = [attend(part.view(*where.shape, -1), n_head, where.shape[1] - own.shape[1]).flatten(0, 1)
             for part, (where, own) in zip(parts, self.groups)]
        return F.embedding(self.answer, torch.cat(y))
