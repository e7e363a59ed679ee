"""What does Psi ask for, and what does the policy give it? A page for a class to play with.

  marimo run lab/course/page.py                            opens the page in a browser
  marimo run lab/course/page.py --headless --port 2718     on a server

Choose a Psi (yours is what stands between the banners of ipo.py), tau, a world, labels. At once, by
enumeration: the margin that a pair asks for, the best policy pi*, and how often it wins. The button trains
the GPT for some hundred steps by the core's loop, and draws it beside the exact answer.
Trap: after an edit of ipo.py start the page again. Readers of one server train in turn.
"""
import marimo

app = marimo.App(app_title="What does Psi ask for?", width="medium")

with app.setup:
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
    from lab.common import exact

    PSI = {
        "q (IPO)": lambda q: q,
        "logit (DPO)": torch.logit,
        "tanh": lambda q: torch.tanh(8 * (q - 0.5)),
        "majority": lambda q: (torch.sign(q - 0.5) + 1) / 2,
        "yours, from ipo.py": ipo.psi,
    }
    TAUS = [0.05, 0.1, 0.2, 0.5, 1, 2]
    PAIRS = [300, 3000, 10_000, 100_000]
    TURN = vars(ipo).setdefault("TURN", threading.Lock())  # one lock for all readers


@app.function
def asked(psi, p, tau):
    """ipo.target with this psi."""
    return (psi(p) - psi(1 - p)) / (2 * tau)


@app.function
def axes(title, xlabel):
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=xlabel)
    return axis


@app.function
def shown(axis, sentence):
    """A picture, and below it what it says."""
    axis.legend(fontsize=9)
    return mo.vstack([axis.figure, mo.md(sentence)])


@app.function
def margins(psi, tau):
    p = torch.linspace(0, 1, 401, dtype=torch.float64)
    axis = axes("What a pair asks for: margin, nats", "p, the share of people who prefer the first response")
    axis.plot(p, asked(psi, p, tau), label="this Psi", lw=4, alpha=0.5)
    axis.plot(p, asked(torch.logit, p, tau), "--", label="logit (DPO)")
    axis.plot(p, asked(PSI["q (IPO)"], p, tau), ":", label="q (IPO)")
    axis.set_ylim(-15, 15)
    most = torch.tensor([0.9, 0.999, 1.0]).double()
    at_9, at_999, at_1 = asked(psi, most, tau).tolist()
    return shown(axis, "The more people prefer a response, the larger the margin that Psi asks for: "
                       f"{at_9:.2f} nats at p = .9, {at_999:.2f} at .999, and {at_1:.2f} if all agree.")


@app.function
def likeliest(made, best, ref):
    top = best[0].argsort(descending=True)[:8].flip(0)
    words = [made.responses[y] or "(nothing)" for y in top]
    axis = axes('The likeliest answers to "pizza review:"', "probability")
    after = best[0, top].exp()
    before = ref[0, top].exp()
    axis.barh(words, after.tolist(), label="pi*, the best policy")
    axis.barh(words, before.tolist(), 0.3, color="0.7", label="reference")
    return shown(axis, "The best policy takes the reference and moves it to what is preferred.")


@app.function
def prices(made, policies, ref, mu):
    axis = axes("Win rate, and its price", "distance to the reference, KL in nats")
    axis.plot(*exact.frontier(ref, made.pstar, mu), color="0.6", label="best possible")
    for (name, logp), mark in zip(policies.items(), "os+x"):
        far = data.kl(logp, ref)
        axis.plot(far, exact.win(logp, made.pstar, mu), mark, ms=9, label=name)
    return shown(axis, "No policy lies above the grey curve. A Psi chooses a place on it or below it.")


@app.class_definition
class Live(ipo.WorldSource):
    """A source that shows each evaluation."""

    def __init__(self, args):
        super().__init__(args)
        self.seen = []

    def evaluate(self, policy):
        self.seen.append(super().evaluate(policy))
        mo.output.replace(self.progress())
        return self.seen[-1]

    def progress(self):
        lines = range(1, len(self.seen) + 1)
        steps = [line * self.args.log_every for line in lines]
        last, due = self.seen[-1], self.numbers(self.exact["opt"])
        axis = axes("The run: how far it went, KL in nats", "step")
        for name, colour in (("kl_ref", "C0"), ("kl_opt", "C1")):
            values = [numbers[name] for numbers in self.seen]
            axis.plot(steps, values, ".-", color=colour, label=name)
            axis.axhline(due[name] or 0, color=colour, ls="--")
        return shown(axis, f"By now the policy is {last['kl_ref']:.4f} nats from the reference (kl_ref), "
                           f"and {last['kl_opt']:.4f} from pi* (kl_opt). Dashed: where pi* itself is.")


@app.cell
def controls():
    kind = mo.ui.dropdown(PSI, value="q (IPO)", label="Psi")
    tau = mo.ui.slider(steps=TAUS, value=0.2, label="tau", show_value=True)
    place = mo.ui.dropdown(data.WORLDS, value="bt", label="world")
    labels = mo.ui.dropdown(["hard", "soft"], value="hard", label="labels")
    loss = mo.ui.dropdown(["ipo", "dpo"], value="ipo", label="loss")
    pairs = mo.ui.slider(steps=PAIRS, value=10_000, label="pairs", show_value=True)
    steps = mo.ui.slider(100, 1000, 100, value=400, label="steps", show_value=True)
    button = mo.ui.run_button(label="train the GPT")
    mo.vstack([
        mo.md("# What does Psi ask for?\n"
              "Psi says what it is worth to be preferred by a share q of all people."),
        mo.hstack([kind, tau, place, labels], wrap=True, justify="start"),
        mo.hstack([loss, pairs, steps, button], wrap=True, justify="start"),
    ])
    return button, kind, labels, loss, pairs, place, steps, tau


@app.cell
def pictures(kind, labels, place, tau):
    psi = kind.value
    made = data.World(place.value)
    ref = exact.of_base(made)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    with TURN, mock.patch.object(ipo, "psi", psi):
        policies = {
            "pi* of this Psi": data.optimum(ref, psi(made.pstar), mu, tau.value),
            "where endless labels lead": exact.limit(ref, made.pstar, mu, tau.value, labels.value),
            "pi* of logit (DPO)": data.optimum(ref, torch.logit(made.pstar), mu, tau.value),
            "pi* of q (IPO)": data.optimum(ref, made.pstar, mu, tau.value),
        }
    mo.hstack([
        margins(psi, tau.value),
        likeliest(made, policies["pi* of this Psi"], ref),
        prices(made, policies, ref, mu),
    ], widths="equal")
    return policies, psi


@app.cell
def training(button, labels, loss, pairs, place, psi, steps, tau):
    mo.stop(not button.value)
    chosen = {"data": place, "tau": tau, "labels": labels, "loss": loss, "pairs": pairs, "steps": steps}
    flags = [f"--{name}={control.value}" for name, control in chosen.items()]
    with TURN, tempfile.TemporaryDirectory() as out, mock.patch.object(ipo, "psi", psi), mo.capture_stdout():
        try:
            run = Live(ipo.parse([*flags, "--log_every=20", "--device=cpu", f"--out={out}"]))
            ipo.run(run.args, source=run)
        except data.Refused as error:
            mo.output.replace(mo.callout(str(error), "danger"))
    return (run,)


if __name__ == "__main__":
    sys.exit("page: open it with marimo run lab/course/page.py")
