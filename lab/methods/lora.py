"""Can LoRA reach the optimum, and what must it touch?

LoRA (Hu et al. 2021) keeps W and trains a product B A of low rank beside it; peft puts it into a GPT of ours.
B starts at 0, so the policy starts at the reference. All from one reference, on the same pairs:

  full   all weights, lr --lr
  wte    adapters of rank --rank on c_attn, c_proj, c_fc, and the word vectors, the head's, too; lr --lora_lr
  lora   the adapters alone
  best   the adapters alone, on the exact KL(pi||pi*) instead of pairs: what they can express at all

Why lora fails in a world: ln_f fixes the length of what the head reads, so two words' logits differ by no
more than `reach`, sqrt(C) times their vectors' difference, and SFT leaves these vectors short.
Trap: the word vectors are one tensor for input and head; peft's modules_to_save would copy and untie them.
Answer: with the word vectors (wte) trained, too: KL(pi||pi*) .0042, .0052, .0050 (rank 4, seeds
0 to 2), .0050 (rank 1); with adapters alone .4547, and .24 where KL(pi||pi*) itself is minimised.
"""
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch

import data
import ipo
import model
from lab.common import exact, start

LAYERS = ["c_attn", "c_proj", "c_fc"]
VARIANTS = ["full", "wte", "lora", "best"]


def flags(argv):
    """ipo.py's flags and these. Raises Refused."""
    parser = start.flags(__doc__)
    parser.add_argument("--rank", type=int, default=4, help="of an adapter [4]")
    parser.add_argument("--lora_lr", type=float, default=5e-3, help="peak learning rate of adapters [0.005]")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="of the above [all]")
    own, rest = parser.parse_known_args(argv)
    args = ipo.parse(rest)
    vars(args).update(vars(own))
    if args.data not in data.WORLDS or args.resume:
        raise ipo.Refused("--data must name a world; --resume has no place here")
    if args.rank < 1 or not 0 < args.lora_lr < 1 or set(args.variants) - set(VARIANTS):
        raise ipo.Refused(f"--rank must be 1 or more, --lora_lr in 0 .. 1, --variants some of {VARIANTS}")
    args.device = "cpu"  # tables of a world are small
    return args


def adapted(policy, rank, words):
    """The policy with adapters in place, all else frozen but, if `words`, its word vectors."""
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS)  # alpha = rank: W + B A
    policy = peft.inject_adapter_in_model(config, policy)
    policy.transformer.wte.weight.requires_grad_(words)
    return policy


@torch.no_grad()
def reach(policy):  # -> ()
    """The largest difference of two words' logits that any hidden state may give: the head reads gain * z +
    bias, z of length sqrt(C) and mean 0. (The last id that can be emitted, <|endoftext|>, is no word.)"""
    ln = policy.transformer.ln_f
    C = len(ln.weight)
    words = policy.head(torch.eye(C)).T[:-1]  # (V-1,C), the head's rows
    apart = words[:, None] - words[None, :]
    steer = apart * ln.weight
    steer = steer - steer.mean(-1, keepdim=True)
    return (C ** 0.5 * steer.norm(dim=-1) + apart @ ln.bias).max()


def needed(logp, words, longest):  # (X,Y), a table's log-probs -> ()
    """The largest difference of two words' logits in this policy, as the last word of a response."""
    last = logp[:, -words ** longest:].unflatten(1, (-1, words))  # by what stands before the last word
    return (last.amax(-1) - last.amin(-1)).max()


def approach(policy, source, args):
    """Descent on the exact KL(pi||pi*)."""
    table, optimizer = exact.Table(source), ipo.adamw(policy)
    for step in range(1, args.steps + 1):
        data.kl(table(policy), source.exact["opt"].float()).backward()
        ipo.descend(policy, optimizer, step, args.steps, args.lr)


def trained(reference, name, source, ref_logp, args):  # -> numbers by name
    """One variant, from the reference, in a folder of its own."""
    begin, args = time.process_time(), copy.copy(args)
    policy, args.out = copy.deepcopy(reference), f"{args.out}/{name}"
    os.makedirs(args.out, exist_ok=True)
    if name != "full":
        args.lr = args.lora_lr
        policy = adapted(policy, args.rank, words=name == "wte")
    if name == "best":
        approach(policy, source, args)
    else:
        pairs = torch.Generator().manual_seed(args.seed)  # the same for each variant
        ipo.train(policy, ipo.offline(source, ref_logp, args, pairs), args, source.evaluate)
    numbers = source.evaluate(policy)
    size = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return {"name": f"LoRA, {name}, rank {args.rank}", "kl": numbers["kl_opt"], **numbers, "trained": size,
            "reach": reach(policy).item(), "seconds": time.process_time() - begin}


def run(args):
    """SFT once, then each variant from there."""
    policy, source, ref_logp, _ = start.start(args)
    words, longest = data.WORLDS[args.data]
    need = needed(source.exact["opt"], len(words), longest).item()
    print(f"two words' logits differ by {need:.2f} nats in pi*; the reference reaches {reach(policy):.2f}")
    report = {name: trained(policy, name, source, ref_logp, args) for name in args.variants}
    print(f"\n{'':6}{'trained':>9}{'KL to pi*':>11}{'KL to ref':>11}{'win':>8}{'reach':>8}{'seconds':>9}")
    for name, found in report.items():
        print(f"{name:6}{found['trained']:9,}{found['kl']:11.4f}{found['kl_ref']:11.4f}{found['win']:8.4f}"
              f"{found['reach']:8.2f}{found['seconds']:9.1f}")
    chosen = report.get("wte", found)
    found = chosen | {"needed": need, "reach_ref": reach(policy).item(), "variants": report}
    Path(f"{args.out}/report.json").write_text(json.dumps(found, indent=1))


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(flags(argv))
        return 0
    except (ipo.Refused, model.Refused, ipo.Stopped, OSError, KeyboardInterrupt) as error:
        print("lora:", str(error) or "interrupted", file=sys.stderr)
        return 2 if isinstance(error, (ipo.Refused, model.Refused)) else 1


if __name__ == "__main__":
    sys.exit(main())
