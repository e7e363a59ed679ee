"""A GPT with GPT-2's names and (up to a transpose) shapes, log-probs of responses, SFT, sampling, checkpoint files.

Nothing here trains on a preference. Sizes: R rows, of which M differ, T tokens in a row, C channels, V vocabulary, U
distinct prefixes of rows, S scored tokens, L tokens of a response.
"""
import hashlib
import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


class BadCheckpoint(ValueError):
    """A file of weights that cannot be used; the message is one line: which, why, and the remedy."""


class Stopped(RuntimeError):
    """A run that must not go on; the message is one line that says why."""


@dataclass
class GPTConfig:
    """Sizes of a GPT; the defaults are GPT-2's smallest (124M parameters)."""
    block_size: int = 1024   # tokens of context
    vocab_size: int = 50257  # ids that can be read
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768        # channels C
    dropout: float = 0.0
    bias: bool = True        # in the linear layers and layer norms
    head_size: int = 0       # ids that can be emitted: 0 .. head_size-1; 0 means all of vocab_size
    tied: bool = True        # whether the head's weights are the token embedding's


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, shared=None):  # (R,T,C) -> (R,T,C); with a Shared: (U,C) -> (U,C)
        qkv = self.c_attn(x)
        qkv = shared.spread(qkv) if shared else qkv
        R, T, _ = qkv.shape
        heads = lambda z: z.view(R, T, self.n_head, -1).transpose(1, 2)  # (R,T,C) -> (R,heads,T,C/heads)
        q, k, v = map(heads, qkv.chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(R, T, -1)
        y = shared.gather(y) if shared else y
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):  # (R,T,C) -> (R,T,C), or (U,C) -> (U,C)
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised stream and adds to the raw one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, shared=None):  # (R,T,C) -> (R,T,C); with a Shared: (U,C) -> (U,C)
        x = x + self.attn(self.ln_1(x), shared)
        return x + self.mlp(self.ln_2(x))


class Shared:
    """Rows of tokens as U distinct prefixes: under causal attention a position depends on the tokens up to it alone. So
    the prompt of a pair, and whatever else its responses share at the start, is computed once, and padding never;
    attention alone sees rows. Sorted rows show which prefixes are equal: nothing is approximated (but dropout, if there
    is any, draws one mask for what is shared)."""

    def __init__(self, tokens, needed):  # (R,T), (R,T) False where nothing is predicted from it: padding
        rows, self.back = tokens.masked_fill(~needed, -1).unique(dim=0, return_inverse=True)  # (M,T) sorted; (R,) in it
        new = torch.ones_like(rows, dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]).cumsum(1) > 0       # neighbours share a prefix up to where they first differ
        new &= rows >= 0
        self.first = new.flatten().nonzero()[:, 0]            # (U,) in the flat rows
        self.tokens, self.position = rows.flatten()[self.first], self.first % tokens.shape[1]  # (U,)
        number = new.flatten().cumsum(0).view_as(new) - 1
        # (M,T) into the U: of those above in its column the last new one, whose number is largest; on padding: any
        self.where = number.masked_fill(~new, 0).cummax(0).values

    # F.embedding is x[index] with a faster backward pass
    def spread(self, x):  # (U,C) -> (M,T,C); gradients of many rows must not be summed in bfloat16
        return F.embedding(self.where, x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def gather(self, x):  # (M,T,C) -> (U,C)
        return F.embedding(self.first, x.flatten(0, 1))


class GPT(nn.Module):
    """The language model. `hidden` and `head` are separate, so that only scored positions pay for the vocabulary."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.recompute = config, False
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():  # GPT-2's: N(0, .02), less where a block adds to the stream; biases 0
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def hidden(self, tokens, needed=None):  # (R,T), (R,T) -> (R,T,C)
        """The normalised stream after the last block; with `needed`, False where its value is never used, the
        same from less work (see Shared), and anything there. Raises ValueError if T exceeds the context."""
        T, t = tokens.shape[1], self.transformer
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed block_size {self.config.block_size}")
        shared = None if needed is None else Shared(tokens, needed)
        ids, at = (shared.tokens, shared.position) if shared else (tokens, torch.arange(T, device=tokens.device))
        x = t.wte(ids) + t.wpe(at)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in t.h:
            keep = not (self.recompute and self.training)  # the block's activations, for the backward pass
            x = block(x, shared) if keep else torch.utils.checkpoint.checkpoint(block, x, shared, use_reentrant=False)
        x = t.ln_f(x)
        return shared.spread(x)[shared.back] if shared else x

    def head(self, x):  # (...,C) -> (...,V), V = head_size or vocab_size
        """Logits over the ids that can be emitted."""
        weight = self.transformer.wte.weight if self.config.tied else self.lm_head.weight
        return F.linear(x, weight[:self.config.head_size] if self.config.head_size else weight)

    def forward(self, tokens):  # (R,T) -> (R,T,V)
        return self.head(self.hidden(tokens))


class Pretrained(nn.Module):
    """Any causal language model of Hugging Face's transformers, behind the two methods of a GPT that others call."""

    def __init__(self, model):
        super().__init__()
        self.model, text = model, model.config.get_text_config()
        self.cap = getattr(text, "final_logit_softcapping", None)  # Gemma 2
        self.config = GPTConfig(min(  # only its sizes, for those who ask; blocks are transformers' own
            getattr(text, "max_position_embeddings", None) or 4096, 4096),
                                model.get_output_embeddings().weight.shape[0], text.num_hidden_layers,
                                text.num_attention_heads, text.hidden_size)
        for module in model.modules():  # log-probs must be those of one function; --dropout is GPT's own
            vars(module).update({name: 0.0 for name, value in vars(module).items()
                                 if isinstance(value, float) and (name == "p" or "dropout" in name)})

    @property
    def device(self):
        return self.model.device

    def hidden(self, tokens, needed=None):  # (R,T) -> (R,T,C); padding on the right: causal attention is blind to it
        return self.model.base_model(tokens, use_cache=False).last_hidden_state

    def head(self, x):  # (...,C) -> (...,V)
        logits = self.model.get_output_embeddings()(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def forward(self, tokens):  # (R,T) -> (R,T,V)
        return self.head(self.hidden(tokens))


def transposed(state):
    """A GPT's state in Hugging Face's shapes, and back: its GPT-2 keeps the matrices of linear layers transposed."""
    flip = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: value.T.contiguous() if name.endswith(flip) else value for name, value in state.items()}


def quiet_transformers():
    """The package, without progress bars and warnings (its errors are raised, and named by us)."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each try to reach the hub
    return transformers


def load_pretrained(name):
    """A GPT with GPT-2's weights, or a Pretrained, from a folder or a hub id. Raises BadCheckpoint, one line."""
    transformers = quiet_transformers()
    try:
        c = transformers.AutoConfig.from_pretrained(name)
        if c.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder; a causal language model is needed")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32,
                                                                        output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"weights are missing or of another shape: {sorted(map(str, info['missing_keys']))[:2]}")
    except Exception as error:  # transformers passes on what its HTTP library, safetensors and its own checks raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadCheckpoint(f"--init_from {name}: {why}; name a run's .pt file, a folder that transformers saved, or a "
                            "model of its hub (which needs a network once)") from None
    plain = c.model_type == "gpt2" and c.activation_function in ("gelu_new", "gelu_pytorch_tanh") and (
        c.n_inner in (None, 4 * c.n_embd) and c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx
        and c.layer_norm_epsilon == 1e-5)
    if plain:
        with torch.device("meta"):  # no storage: the weights come below
            ours = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd,
                                 tied=c.tie_word_embeddings))
        state = transposed(model.state_dict())  # clone: these are pages of the file, kept beside each one written to
        ours.load_state_dict({key: state[key].clone() for key in ours.state_dict()}, assign=True)
        return ours
    ours, tokens = Pretrained(model.eval()), torch.arange(8)[None] % c.get_text_config().vocab_size
    with torch.no_grad():  # what sequence_logp takes for granted: logits = head(hidden), and no token sees a later one
        logits = ours(tokens)
        off = max((logits - model(tokens).logits).abs().max(), (logits[:, :4] - ours(tokens[:, :4])).abs().max())
    if not off <= 1e-4 * (1 + logits.abs().max()):
        raise BadCheckpoint(f"--init_from {name}: its logits are not a head of causal hidden states (off by "
                            f"{off:.3g}), so log-probs would be wrong; this architecture is not supported")
    return ours


def load_model(name):
    """(model, extra) of a checkpoint file, or of a Hugging Face folder or hub id, whose tokenizer has the same name."""
    if name.endswith(".pt") or os.path.isfile(name):
        return load_checkpoint(name)
    return load_pretrained(name), {"tokenizer": os.path.abspath(name) if os.path.isdir(name) else name}


def export(model, folder, eot):
    """Writes config and weights that AutoModelForCausalLM.from_pretrained(folder) loads; a GPT becomes a GPT-2, whose
    texts end with the id eot."""
    transformers = quiet_transformers()
    hf = model.model if isinstance(model, Pretrained) else None
    if hf is None:
        c = model.config
        hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=c.tied,
            bos_token_id=eot, eos_token_id=eot))
        hf.load_state_dict(transposed(model.state_dict()), strict=False)
    ends = hf.generation_config.eos_token_id
    if eot not in (ends if isinstance(ends, list) else [ends]):
        print(f"exported: texts end with token {eot}, the tokenizer's, not with {ends}, the model's")
        hf.config.eos_token_id = hf.generation_config.eos_token_id = eot
    try:
        hf.save_pretrained(folder)
    except Exception as error:  # safetensors has its own
        raise Stopped(f"{folder}: cannot be written ({str(error).splitlines()[0]}); the policy is in ckpt.pt") from None


class Table(nn.Module):
    """A tabular policy: one logit for each of Y actions after each of X prompts (of one token), all 0 at first.

    It has the two methods of a GPT that `sequence_logp` calls. float64, because exact limits are read off it."""

    def __init__(self, X: int, Y: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(X, Y, dtype=torch.float64))

    @property
    def device(self):
        return self.theta.device

    def hidden(self, tokens, needed=None):  # (R,T) -> (R,T): what follows depends on the last token alone
        return tokens

    def head(self, x):  # (...) -> (...,Y)
        return self.theta[x]


CHUNK = 512  # hidden states that meet the vocabulary at once: 512 x 50,257 logits are 98 MiB


def token_logp(model, x, ids):  # (S,C), (S,) -> (S,)
    """log-softmax of head(x) at these ids, in CHUNKs whose logits are computed again in the backward pass, so that
    (S,V) logits never exist; float32 under autocast, too."""
    def picked(x, ids):
        logits = model.head(x)                                # (CHUNK,V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    if len(ids) <= CHUNK:
        return picked(x, ids)
    return torch.cat([torch.utils.checkpoint.checkpoint(picked, *part, use_reentrant=False)
                      for part in zip(x.split(CHUNK), ids.split(CHUNK))])


def sequence_logp(model, tokens, mask, mean=False):  # (R,T), (R,T) -> (R,)
    """log pi(y|x) of each row in nats: the sum of the log-probs of the tokens where mask is 1 (the response y).

    A probability of a whole response is a product, so its log is a SUM; mean=True divides by the number of response
    tokens, which other tools do and the paper does not. Differentiable; float32 under autocast, too.
    """
    assert mask.shape == tokens.shape, f"mask {tuple(mask.shape)} and tokens {tuple(tokens.shape)} differ in shape"
    assert not mask[:, 0].any(), "mask[:,0] must be 0: nothing precedes the first token, so nothing predicts it"
    assert mask[:, 1:].any(1).all(), "a row has no response token to score"
    row, t = mask[:, 1:].nonzero(as_tuple=True)               # (S,) S scored tokens, at t + 1 in `tokens` ...
    needed = mask[:, 1:].flip(1).cumsum(1).flip(1) > 0        # (R,T-1) where a later token is scored
    x = model.hidden(tokens[:, :-1], needed)[row, t]          # (S,C) ... each predicted at t: the shift by one
    logp = token_logp(model, x, tokens[row, t + 1])           # (S,)
    total = logp.new_zeros(len(tokens)).index_add(0, row, logp)  # (R,)
    return total / mask.sum(1) if mean else total


@torch.no_grad()
def token_scores(model, data, row, dtype):  # -> (L,) ids of the response, (L,) their log-probs, both on the CPU
    """What `sequence_logp` sums, for one row of data (a data.PairData)."""
    model.eval()
    tokens, mask = (z.to(model.device) for z in data.rows(torch.tensor([row])))
    ids = tokens[mask]
    with autocast(model, dtype):
        return ids.cpu(), token_logp(model, model.hidden(tokens[:, :-1])[mask[:, 1:]], ids).cpu()


def memory(model, data, pairs, dtype):
    """About how many bytes a training step takes with the `pairs` longest pairs of data, as {what for: bytes}.

    Weights, gradients and Adam's two moments, float32, are 16 bytes a parameter, 18 with a bfloat16 copy. For its
    backward pass a block keeps 13 C numbers for each distinct token and 4 C for each place in the padded rows (or,
    recomputed, its input alone); what the last hands on has C, too. CHUNK rows of logits stand as themselves, their
    log-softmax and its gradient."""
    length = data.start.diff()
    prompt, chosen, rejected = data.prompt_len[data.chosen], length[data.chosen], length[data.rejected]
    longest = (chosen + rejected).argsort(descending=True)
    longest = longest.repeat(-(-pairs // len(longest)))[:pairs]
    prompt, chosen, rejected = prompt[longest], chosen[longest], rejected[longest]
    places = 2 * len(longest) * max(chosen.max(), rejected.max())
    distinct = (chosen + rejected - prompt).sum() if isinstance(model, GPT) else places
    c, scored, width = model.config, (chosen + rejected - 2 * prompt).sum(), 4 if dtype == "float32" else 2
    block = c.n_embd * (13 * distinct + 4 * places) * width
    blocks = c.n_layer * c.n_embd * distinct * 4 + block if model.recompute else c.n_layer * block
    blocks += 8 * c.n_embd * places  # what the last block hands on, and its gradient
    parameters = sum(p.numel() for p in model.parameters())
    sizes = {"weights, gradients, Adam": (16 if width == 4 else 18) * parameters, "activations": blocks,
             "logits": min(scored, CHUNK) * (c.head_size or c.vocab_size) * 12}
    return {name: int(size) for name, size in sizes.items()}


def flops(model, data, pairs):
    """Floating-point operations that a step on these pairs (indices) needs, forward and backward: 6 per matrix
    parameter and token, causal attention, and the head on response tokens; each pair's prompt counted once."""
    length = data.start.diff()
    prompt, chosen, rejected = (z[pairs].double() for z in (
        data.prompt_len[data.chosen], length[data.chosen], length[data.rejected]))
    head = model.model.get_output_embeddings() if isinstance(model, Pretrained) else getattr(model, "lm_head", None)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} | ({head.weight} if head else set())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p not in tables)
    c = model.config
    linear = 6 * matrices * (chosen + rejected - prompt).sum()
    attention = 6 * c.n_layer * c.n_embd * (chosen ** 2 + rejected ** 2 - prompt ** 2).sum()
    logits = 6 * c.n_embd * (c.head_size or c.vocab_size) * (chosen + rejected - 2 * prompt).sum()
    return (linear + attention + logits).item()


def matmul_rate(device, dtype, n=2048):
    """Operations a second of square matrix products on this machine, now: the best of five."""
    a, best = torch.randn(n, n, device=device, dtype=getattr(torch, dtype)), math.inf
    for _ in range(6):  # the first warms up
        synchronize(device)
        begin = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def synchronize(device):
    """Waits for the GPU, so that clocks tell the truth."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device):
    """The most bytes that this process has held so far: of the GPU, else as the operating system counts them; 0 where
    none counts."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource  # Unix only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def place(model, device, recompute=False):
    """The model, moved to `device`; sets the number of CPU threads by its size and prints both. recompute: the backward
    pass computes the blocks' activations again instead of keeping them (gradient checkpointing)."""
    if isinstance(model, Pretrained) and recompute:
        model.model.activation_checkpointing_enable({"use_reentrant": False})
    model.recompute = recompute
    size = sum(p.numel() for p in model.parameters())
    if small := size < 1e6 and device == "cpu":
        torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain
    print(f"model: {size:,} parameters, context {model.config.block_size} tokens; {device}, "
          f"{torch.get_num_threads()} CPU threads" + " (1 because the model is small)" * small)
    return model.to(device)


def process():
    """(number of this process, how many there are): (0, 1) unless torchrun started several."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def join(device):
    """Meets the other processes, if torchrun started several (its variables are all that is read from outside)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def total(x, device="cpu"):
    """The sum of x over all processes, on the CPU; x itself if there is one."""
    if process()[1] > 1:
        torch.distributed.all_reduce(x := x.to(device))
    return x.cpu()


class Scored(nn.Module):
    """`sequence_logp` as the forward pass of a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask, mean=False):  # (R,T), (R,T) -> (R,)
        return sequence_logp(self.model, tokens, mask, mean)


def parallel(model):
    """`sequence_logp` of this model; with several processes its gradients become their mean over them."""
    scored = Scored(model)
    return nn.parallel.DistributedDataParallel(scored) if process()[1] > 1 else scored


def autocast(model, dtype):
    """Context: matrix products in `dtype` (float32, bfloat16, float16); weights, log-probs and losses stay float32."""
    return torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32")


@torch.no_grad()
def score(model, data, rows, batch, dtype="float32", mean=False):  # (R,) -> (R,), on the CPU
    """`sequence_logp` of rows of data (a data.PairData), without gradient or dropout, `batch` rows at a time: like
    lengths, and within them the rows of a pair, stay together, to share prompts. Several processes take turns."""
    model.eval()
    rank, processes = process()
    logp = torch.zeros(len(rows), dtype=next(model.parameters()).dtype)
    order = rows.argsort(stable=True)  # neighbours have the same prompt
    for part in order[data.prompt_len[rows[order]].argsort(stable=True)].split(batch)[rank::processes]:
        tokens, mask = (z.to(model.device) for z in data.rows(rows[part]))
        with autocast(model, dtype):
            logp[part] = sequence_logp(model, tokens, mask, mean).cpu()
    return total(logp, model.device)


def descent(model, steps, lr, constant=False, clip=1.0, dtype="float32"):
    """(update, parts). update() takes a step on the gradients that are there and clears them: AdamW, gradient norm at
    most `clip`, lr up for 50 steps or half of all, then linearly down to 0 (constant: that lr throughout, and Adam's
    usual beta_2). It returns whether it did: False if they are not finite, None if only their scale is at fault. parts:
    what has a state to save. Gradients must be those of parts["scaler"].scale(loss): float16 would round small ones to
    0; for other dtypes that is the loss itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.999 if constant else 0.99), fused=True,
                                  weight_decay=0.0)  # decay would pull to 0, not to the reference
    warmup = min(50, steps // 2)
    factor = lambda s: 1.0 if constant else max(0.0, min((s + 1) / (warmup + 1), (steps - s) / (steps - warmup)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(model.device.type, init_scale=2.0 ** 10, enabled=dtype == "float16")

    def update():
        scaler.unscale_(optimizer)
        done = nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite().item()
        if not done and scaler.is_enabled() and scaler.get_scale() > 1:
            done = None  # the scaler skips the step, and scales less from then on
        if done is not False:
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        optimizer.zero_grad()
        return done
    return update, {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def restore(parts, state):
    """Gives `descent`'s parts the states that a checkpoint holds; the rate is that of the schedule as it is now."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    schedule = parts["schedule"]
    for group, base, factor in zip(parts["optimizer"].param_groups, schedule.base_lrs, schedule.lr_lambdas):
        group["lr"] = base * factor(schedule.last_epoch)


def check_finite(model, flag, *values):
    """Raises Stopped, naming the `flag` that may be too high, unless weights and values (None: infinite) are finite."""
    bad = any(v is None or not math.isfinite(v) for v in values)
    if bad or not all(p.isfinite().all() for p in model.parameters()):
        raise Stopped(f"training diverged: weights or what they compute are not finite, and not saved; lower {flag}")


def finetune(model, data, rows, batches, steps, lr, dtype, accum=1):
    """SFT: maximum likelihood on batches (indices) of rows, in `accum` parts each; the first and last loss, in nats per
    response token."""
    (update, parts), losses, (rank, processes) = descent(model, steps, lr, dtype=dtype), [], process()
    sequence_logp = parallel(model)
    for index in batches:
        model.train()
        batch, loss_here = rows[index], torch.zeros(())
        scored = (data.start[batch + 1] - data.start[batch] - data.prompt_len[batch]).sum().item()
        for part in batch[rank::processes].tensor_split(accum):
            tokens, mask = (z.to(model.device) for z in data.rows(part))
            with autocast(model, dtype):
                loss = -sequence_logp(tokens, mask).sum() / scored
            parts["scaler"].scale(loss * processes).backward()  # processes average their gradients
            loss_here = loss_here + loss.detach().cpu()
        losses.append(total(loss_here).item())
        if update() is False:
            raise Stopped(f"sft step {len(losses)}: loss {losses[-1]:.4g} or its gradient is not finite; nothing is "
                          "saved; lower --sft_lr")
    check_finite(model, "--sft_lr", losses[-1])
    return losses[0], losses[-1]


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eot=None, generator=None):
    """Ids sampled after `prompt` (a list of ids), up to `eot` (left out), max_new_tokens, or a full context.

    temperature 0 takes the likeliest token; top_k 0 samples from all; top_p: from the fewest likeliest tokens that have
    this probability together, after temperature and top_k. Drawn on the CPU: one seed, one text."""
    model.eval()
    ids = list(prompt)
    for _ in range(min(max_new_tokens, model.config.block_size - len(prompt))):
        logits = model.head(model.hidden(torch.tensor([ids], device=model.device))[0, -1]).cpu().double()  # (V,)
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
        logits -= logits.max()  # or a tiny temperature would overflow
        probs, likeliest = (logits / (temperature or 1)).softmax(0).sort(descending=True)
        probs[probs.cumsum(0) - probs >= top_p] = 0  # what stands before a token has the share already
        new = likeliest[torch.multinomial(probs, 1, generator=generator)]
        new = int(logits.argmax() if temperature == 0 else new)
        if new == eot:
            break
        ids.append(new)
    return ids[len(prompt):]


def continuation(model, prompt, tokenizer, args):
    """A text sampled after `prompt` (ids), as args.temperature, top_k, top_p and max_new_tokens say. args.seed and the
    prompt fix the draws, so two models' texts differ by the models."""
    generator = torch.Generator().manual_seed(args.seed + sum(prompt))
    ids = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.eot_token,
                   generator)
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)):]  # alone, some would lose a space at the start


def save_checkpoint(path, model, **extra):
    """Writes config, weights and `extra` (plain values, tensors) in one step: whatever interrupts it, `path` is the old
    file or the new one, whole. Only the first process writes. Raises Stopped if the disk is full, say."""
    if process()[0]:
        return
    if isinstance(model, Pretrained):
        extra["transformers"] = model.model.config.to_json_string(use_diff=False)
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save({"config": asdict(model.config), "model": model.state_dict(), **extra}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "what it held before is still there" if os.path.exists(path) else "there is none from before"
        raise Stopped(f"{path}: cannot be written ({why}); {kept}; make room, then --resume") from None


def digest(*groups):
    """A short name of groups of tensors (None: none), equal if all are equal bit for bit."""
    hashed = hashlib.sha256()
    for tensor in (t for group in groups if group is not None for t in group):
        hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def load_checkpoint(path):
    """(GPT or Pretrained on the CPU, extra) from `save_checkpoint`'s file: tensors and plain values; nothing in it is
    executed."""
    try:
        extra = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(extra["tokenizer"], str)
        config, theirs = extra.pop("config"), extra.pop("transformers", None)
        if theirs:
            import transformers
            theirs = transformers.AutoConfig.for_model(**json.loads(theirs))
            theirs = transformers.AutoModelForCausalLM.from_config(theirs)
        model = Pretrained(theirs) if theirs else GPT(GPTConfig(**config))
        model.load_state_dict(extra.pop("model"))
        return model, extra
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}; a finished run leaves a ckpt.pt in --out, a grid one "
                            "in each run's folder there, a bandit none") from None
    except Exception as error:  # torch.load and load_state_dict raise a dozen kinds on a file that is cut or foreign
        raise BadCheckpoint(f"{path}: not a nanoIPO checkpoint, or a damaged one ({type(error).__name__}); name the "
                            "ckpt.pt of a finished run") from None
