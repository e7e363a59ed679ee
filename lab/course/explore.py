"""What does Psi ask for, and what does the policy give it? A page for a class to play with.

  marimo run lab/course/explore.py        opens the page in a browser; on a server: --headless --port 2718

Choose a Psi or type your own, tau, a world or a bandit, labels. At once, by enumeration: the margin that a
pair asks for, (Psi(p) - Psi(1-p)) / (2 tau); pi* (Azar et al. 2023, eq. 7) against the reference, here the
world's base distribution; where endless labels of this kind lead; pi* of DPO's and of IPO's Psi; all of them
under the frontier of win rate and KL. The button trains the GPT on so many pairs, by the core's loop, and
draws it beside its exact answer. A formula is parsed and computed node by node, from numbers, q, + - * / **
< > and the functions that the page lists; nothing else is understood, so no text of the page is executed.
Traps: some hundred steps end near the exact answer, not at it. With soft labels pairs stand as drawn, so h
averages to about 0. ipo.psi is one for the whole process, so the readers of one page train in turn.
Answer: in bt at tau .2 pi* of psi = q is .34 nats from the reference, that of logit 3.95; psi = q asks a
certain pair for 2.5 nats, logit for no end of them.
"""
import marimo

app = marimo.App(app_title="What does Psi ask for?", width="medium")

with app.setup:
    import ast
    import sys
    import tempfile
    import threading
    from unittest import mock

    import marimo as mo
    import torch
    from matplotlib.figure import Figure

    sys.path.append(".")  # marimo's command looks beside this file only
    import data
    import ipo

    PSI = {"identity": "q", "logit": "logit(q)", "tanh": "tanh(8 * (q - 0.5))", "cubic": "(2 * q - 1) ** 3",
           "majority": "(sign(q - 0.5) + 1) / 2", "yours": ""}
    FUNCTIONS = "abs cos exp log logit sigmoid sign sin sqrt tanh".split()
    OPERATORS = dict(Add="add", Sub="sub", Mult="mul", Div="div", Pow="pow", Lt="lt", Gt="gt")
    BANDITS = {"bandit D1: a > b > c": [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]],
               "bandit D3': a, b > c": [[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]]}  # the paper's section 5
    OPT = "pi* of this Psi"
    TURN = vars(ipo).setdefault("TURN", threading.Lock())  # run for each reader


@app.function
def compute(node, q):
    """The value at q, a tensor, of a formula's syntax tree. Raises ValueError for what may not be in one."""
    match node:
        case ast.Constant(value=int() | float()):
            return torch.full_like(q, node.value)
        case ast.Name(id="q"):
            return q
        case ast.UnaryOp(op=ast.USub(), operand=x):
            return -compute(x, q)
        case ast.Call(func=ast.Name(id=name), args=[x], keywords=[]) if name in FUNCTIONS:
            return getattr(torch, name)(compute(x, q))
        case ast.BinOp(left=x, op=op, right=y) | ast.Compare(left=x, ops=[op], comparators=[y]):
            if type(op).__name__ in OPERATORS:
                return getattr(torch, OPERATORS[type(op).__name__])(compute(x, q), compute(y, q)).to(q.dtype)
    raise ValueError(f"a formula may not hold {ast.unparse(node):.40}")


@app.function
def formula(text):
    """The Psi that a text describes. Raises ValueError, in a line for the page."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    try:
        tree = ast.parse(text[:200].strip(), mode="eval").body
        rises = compute(tree, q).diff() > -1e-9
    except (SyntaxError, MemoryError, RecursionError, RuntimeError, OverflowError) as error:
        raise ValueError(f"this is no formula: {getattr(error, 'msg', error)}") from None
    if not rises.all():
        raise ValueError("from q = 0 to q = 1 it must be a number everywhere and never fall")
    return lambda q: compute(tree, q)


@app.function
def world(name):
    """A data.World, or a bandit in its form: one prompt, responses of one token."""
    if name in data.WORLDS:
        return data.World(name)
    made = data.World.__new__(data.World)
    made.tokenizer, made.responses = data.get_tokenizer("words a b c"), ["a", "b", "c"]
    made.sizes, made.prompts = (2, 4, 3), [[3]]  # block, vocabulary, head; <|endoftext|> is what they read
    made.pstar = torch.tensor([BANDITS[name]], dtype=torch.float64)
    made.reward, made.base = made.pstar.mean(-1), torch.full((3,), 1 / 3, dtype=torch.float64)
    made.pairs = data.PairData([(made.prompts[0], [y]) for y in range(3)])
    return made


@app.function
def target(psi, p, tau):
    """ipo.target with this psi."""
    return (psi(p) - psi(1 - p)) / (2 * tau)


@app.function
def picture(psi, tau, made, ref, mu, policies):
    """Targets; the likeliest responses to the first prompt; win rates, with the best possible at each KL."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    p = torch.linspace(0, 1, 401, dtype=torch.float64)
    left.plot(p, target(psi, p, tau), label="this Psi", lw=4, alpha=0.5)
    left.plot(p, target(torch.logit, p, tau), "--", label="logit (DPO)")
    left.plot(p, p / tau - 0.5 / tau, ":", label="q (IPO)")
    left.set(title="margin asked for, nats", xlabel="p, that the first is preferred", ylim=(-15, 15))
    top = (policies[OPT][0].exp() + ref[0].exp() / 1e6).argsort(descending=True)[:10].flip(0)
    words = [made.responses[y] or "(nothing)" for y in top]
    middle.barh(words, policies[OPT][0, top].exp().tolist(), label="probability, pi*")
    middle.barh(words, ref[0, top].exp().tolist(), 0.3, color="0.7", label="ref")
    wins = (made.pstar * mu[:, None, :]).sum(-1)
    edge = [(ref + wins / t).log_softmax(-1) for t in torch.logspace(-4, 1, 60)]
    for name, pis, mark in [("best", edge, "0.6"), *zip(policies, ([p] for p in policies.values()), "os+x")]:
        height = [(pi.exp() * wins).sum(-1).mean() for pi in pis]
        right.plot([data.kl(pi, ref) for pi in pis], height, mark, ms=9, alpha=0.7, label=name)
    right.set(title="win rate against mu", xlabel="KL to ref, nats")
    for ax in (left, middle, right):
        ax.legend(fontsize=9)
    return figure


@app.class_definition
class Live(ipo.WorldSource):
    """A source that shows each evaluation."""

    def __init__(self, args, made):
        vars(self).update(vars(made), args=args, lines=[])

    def evaluate(self, policy):
        self.lines.append(super().evaluate(policy))
        mo.output.replace(self.progress())
        return self.lines[-1]

    def progress(self):
        """The run as far as it is, its exact answer dashed: a figure, and a line of numbers."""
        steps = [min(i * self.args.log_every, self.args.steps) for i in range(len(self.lines))]
        end = self.numbers(self.exact.get("labels", self.exact["opt"]))
        figure, text = Figure(figsize=(11, 3), layout="constrained"), f"step {steps[-1]}"
        names = {"h": "margin h, nats", "kl_ref": "KL(pi||ref)", "kl_opt": f"KL(pi||pi*), {self.args.loss}'s"}
        for ax, name in zip(figure.subplots(1, 3), names):
            ax.plot(steps, [line[name] for line in self.lines], ".-")
            ax.axhline(torch.nan if end[name] is None else end[name], color="k", ls="--")
            ax.set(title=names[name], xlabel="step", xlim=(0, self.args.steps))
            text += f"; {name} {ipo.show(self.lines[-1][name])} (exact: {ipo.show(end[name])})"
        return mo.vstack([figure, mo.md(text)])


@app.cell
def controls():
    kind = mo.ui.dropdown(PSI, value="identity", label="Psi")
    own = mo.ui.text("q ** 2", label="yours, if Psi is yours:", max_length=200)
    tau = mo.ui.slider(steps=[0.05, 0.1, 0.2, 0.5, 1, 2], value=0.2, label="tau", show_value=True)
    place = mo.ui.dropdown([*data.WORLDS, *BANDITS], value="bt", label="world")
    labels = mo.ui.dropdown(["hard", "soft"], value="hard", label="labels")
    pairs = mo.ui.slider(steps=[300, 1000, 3000, 10_000, 10**5], value=10_000, label="pairs", show_value=True)
    loss = mo.ui.dropdown(["ipo", "dpo"], value="ipo", label="loss")
    steps = mo.ui.slider(100, 1000, 100, value=400, label="steps", show_value=True)
    button = mo.ui.run_button(label="train the GPT")
    mo.vstack([
        mo.md(f"# What does Psi ask for?\nYours: q, numbers, + - * / ** < >, {', '.join(FUNCTIONS)}."),
        mo.hstack([kind, own, tau, place, labels, loss, pairs, steps, button], wrap=True, justify="start"),
    ])
    return button, kind, labels, loss, own, pairs, place, steps, tau


@app.cell
def exact(kind, labels, own, place, tau):
    try:
        psi = formula(kind.value or own.value)
    except ValueError as error:
        mo.stop(True, mo.callout(f"Psi: {error}", "danger"))
    made = world(place.value)
    ref = (made.base + 1e-4).log().expand_as(made.reward).log_softmax(-1)  # "" has probability 0 in base
    mu = torch.full_like(ref, 1 / ref.shape[1])
    asked = target(psi, made.pstar, tau.value)
    if labels.value == "hard":  # a coin flip asks for what a certain pair does
        asked = (2 * made.pstar - 1) * target(psi, torch.ones_like(made.pstar), tau.value)
    policies = {
        OPT: data.optimum(ref, psi(made.pstar), mu, tau.value),
        "IPO, endless labels": data.optimum(ref, asked.nan_to_num(0.0, torch.inf, -torch.inf), mu, 1.0),
        "DPO's pi*: logit": data.optimum(ref, made.pstar.logit(), mu, tau.value),
        "IPO's pi*: q": data.optimum(ref, made.pstar, mu, tau.value),
    }
    rows = []
    for name, logp in policies.items():
        numbers = data.exact(logp, ref, {"opt": policies[OPT]}, made.pstar, mu, psi, tau.value)
        rows.append({"policy": name} | {key: ipo.show(numbers[key]) for key in numbers})
    sure = target(psi, torch.tensor([0.9, 0.99, 0.999, 1.0]).double(), tau.value)
    mo.vstack([
        picture(psi, tau.value, made, ref, mu, policies),
        mo.md(f"With p = .9, .99, .999, 1 (hard) one asks for {', '.join(f'{h:.2f}' for h in sure)} nats."),
        mo.ui.table(rows, selection=None, label="objective: J; ratio: max |log pi/ref|; -: infinite"),
    ])
    return policies, psi, rows


@app.cell
def training(button, labels, loss, pairs, place, psi, steps, tau):
    mo.stop(not button.value)
    flags = ["--tau", tau.value, "--labels", labels.value, "--pairs", pairs.value, "--loss", loss.value]
    flags += ["--steps", steps.value, "--log_every", 20, "--device", "cpu"]
    with TURN, tempfile.TemporaryDirectory() as out, mock.patch.object(ipo, "psi", psi), mo.capture_stdout():
        run = Live(ipo.parse([*map(str, flags), "--out", out]), world(place.value))
        try:
            ipo.run(run.args, source=run)
        except (ipo.Refused, ipo.Stopped) as error:
            mo.output.replace(mo.callout(f"{error}".replace("--", ""), "danger"))
    return (run,)
