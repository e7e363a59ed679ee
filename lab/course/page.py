"""What does Psi ask for, and which policy is the best for it? A page for a class to play with.

  marimo run lab/course/page.py                            opens the page in a browser
  marimo run lab/course/page.py --headless --port 2718     on a server

Choose a Psi (yours is what stands between the banners of ipo.py), tau, a world, labels. At once, by
enumeration: the margin that a pair asks for, the best policy pi*, and how often it wins.
Trap: nothing is trained here, all is exact. After an edit of ipo.py start the page again.
"""
import marimo

app = marimo.App(app_title="What does Psi ask for?", width="medium")

with app.setup:
    import sys
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


@app.function
def under(psi, function, *values):
    """What a function of the core or of exact.py says if this psi stands in ipo.py."""
    with mock.patch.object(ipo, "psi", psi):
        return function(*values)


@app.function
def axes(title, xlabel):
    axis = Figure(figsize=(5, 3.4), layout="constrained").subplots()
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
    axis.plot(p, under(psi, ipo.target, p, tau), label="this Psi", lw=4)
    axis.plot(p, under(torch.logit, ipo.target, p, tau), "--", label="logit (DPO)")
    axis.plot(p, under(PSI["q (IPO)"], ipo.target, p, tau), ":", label="q (IPO)")
    axis.set_ylim(-15, 15)
    most = torch.tensor([0.9, 0.999, 1.0]).double()
    at_9, at_999, at_1 = under(psi, ipo.target, most, tau).tolist()
    return shown(axis, "The more people prefer a response, the larger the margin that Psi asks for: "
                       f"{at_9:.2f} nats at p = .9, {at_999:.2f} at .999, and {at_1:.2f} if all agree.")


@app.function
def likeliest(made, best, ref):
    top = best[0].argsort(descending=True)[:8].flip(0)
    words = [made.responses[y] or "(nothing)" for y in top]
    axis = axes('The likeliest answers to "pizza review:"', "probability")
    axis.barh(words, best[0, top].exp().tolist(), label="pi*, the best policy")
    before = ref[0, top].exp()
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


@app.cell
def controls():
    kind = mo.ui.dropdown(PSI, value="q (IPO)", label="Psi")
    tau = mo.ui.slider(steps=TAUS, value=0.2, label="tau", show_value=True)
    place = mo.ui.dropdown(data.WORLDS, value="bt", label="world")
    labels = mo.ui.dropdown(["hard", "soft"], value="hard", label="labels")
    mo.vstack([
        mo.md("# What does Psi ask for?\n"
              "Psi says what it is worth to be preferred by a share q of all people."),
        mo.hstack([kind, tau, place, labels], wrap=True, justify="start"),
    ])
    return kind, labels, place, tau


@app.cell
def pictures(kind, labels, place, tau):
    psi = kind.value
    made = data.World(place.value)
    ref = exact.of_base(made)
    mu = torch.full_like(ref, 1 / ref.shape[1])
    policies = {
        "pi* of this Psi": data.optimum(ref, psi(made.pstar), mu, tau.value),
        "where endless labels lead": under(psi, exact.limit, ref, made.pstar, mu, tau.value, labels.value),
        "pi* of logit (DPO)": data.optimum(ref, torch.logit(made.pstar), mu, tau.value),
        "pi* of q (IPO)": data.optimum(ref, made.pstar, mu, tau.value),
    }
    mo.hstack([
        margins(psi, tau.value),
        likeliest(made, policies["pi* of this Psi"], ref),
        prices(made, policies, ref, mu),
    ], widths="equal")
    return (policies,)


if __name__ == "__main__":
    sys.exit("page: open it with marimo run lab/course/page.py")
