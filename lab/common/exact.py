"""Where do preference methods end, exactly? A policy as a table, and each fixed point by enumeration.

This is no program itself; programs import it. A world has X prompts and Y responses, so a policy is
log pi(y|x), (X,Y). `Table` reads it off any language model, differentiably. On tables:

  frontier   the highest win rate at each KL(pi||ref)
  limit      where IPO ends with endless labels of one kind
  minimise   any differentiable objective of log pi, LBFGS in float64: the answer that training approximates
  measured   how far a trained policy is from the exact minimiser of any loss
  nash       pi = ref exp(E_{y'~pi} p*(y>y') / tau) / Z, the regularised Nash policy, where online IPO ends
             (Munos et al. 2023, arXiv:2312.00886). Unique: the game is strictly concave-convex.
  mirror     IPO-MD's answer: both responses from the normalised pi^(1-b) ref^b
  rewards    Bradley-Terry's maximum-likelihood fit to endless pairs, also where no reward is true

Traps: a loss that falls without end has no minimiser. If log pi/ref passes 100 nats this is taken to be so,
and `measured` shows a dash. pi <- ref exp(P pi / tau) / Z, iterated plainly, does not converge in cyclic and
deterministic at tau .1; `nash` takes smaller steps.
"""
import torch
from torch.nn.functional import logsigmoid

import data
import ipo
from lab.common import start


class Table:
    """table(policy) -> (X,Y) log pi(y|x) of every response, differentiable; world: a data.World.

    Raises ipo.Stopped if one is not finite.
    """

    def __init__(self, world):
        self.shape = world.reward.shape
        tokens, mask = world.pairs.padded(slice(None))
        self.scored = mask[:, 1:]
        self.said = tokens[:, 1:] * self.scored  # 0 for the prompt, which the head may not know
        # A token is predicted from those before it, so the last token of a row is never read. Without it (and
        # zeros for what is not read) many rows are equal; the policy reads each of these once.
        t = torch.arange(tokens.shape[1] - 1)
        is_read = t < world.pairs.length[:, None] - 1
        read = tokens[:, :-1] * is_read
        self.inputs, self.input_of = read.unique(dim=0, return_inverse=True)

    def __call__(self, policy):  # -> (X,Y)
        device = next(policy.parameters()).device
        x = policy.hidden(self.inputs.to(device))             # (distinct,T,C)
        logp = policy.head(x).log_softmax(-1).cpu()           # (distinct,T,V)
        logp = logp[self.input_of]                            # (R,T,V)
        said = logp.gather(-1, self.said[..., None])[..., 0]  # (R,T)
        logp = (said * self.scored).sum(1)                    # (R,)
        if not logp.isfinite().all():
            raise ipo.Stopped("the policy is not finite; lower --lr or raise --tau")
        return logp.view(self.shape)


def win(logp, pstar, mu):  # (X,Y), (X,Y,Y), (X,Y) -> ()
    """The win rate: E p*(y>y') with y from the policy and y' from mu, the mean over prompts."""
    wins = logp.exp() * data.mean_over_opponents(pstar, mu)
    return wins.sum(-1).mean()


def frontier(ref, pstar, mu):  # (X,Y), (X,Y,Y), (X,Y) -> two lists
    """(KL(pi||ref), win rate) by rising KL: no policy wins more often at that KL.

    The optimum of Psi = identity maximises win rate less tau KL, so the optima of all taus are the frontier.
    """
    rate = data.mean_over_opponents(pstar, mu)                          # (X,Y)
    kls = []
    wins = []
    for tau in torch.logspace(3.5, -4.5, 600).tolist():
        best = (ref + rate / tau).log_softmax(-1)      # data.optimum, as rate need not be computed again
        won = (best.exp() * rate).sum(-1).mean()
        kls.append(data.kl(best, ref).item())
        wins.append(won.item())
    return kls, wins


def noisy(pstar, noise):
    """How often y is labelled as preferred if each label is reversed with probability `noise`."""
    return pstar * (1 - noise) + (1 - pstar) * noise


def limit(ref, q, mu, tau, labels):  # (X,Y), (X,Y,Y), (X,Y) -> (X,Y)
    """log of the policy where IPO with ipo.target ends, given endless labels. q: pstar, or noisy(pstar).

    The least-squares answer to what the labels of a pair ask for on average, in nats. A soft label asks for
    target(q); a hard one for target(1) with probability q, else for target(0).
    """
    asked = ipo.target(q, tau)
    if labels == "hard":
        asked = (2 * q - 1) * ipo.target(torch.ones_like(q), tau)
    return data.optimum(ref, asked, mu, 1)


def minimise(objective, start, steps=3000):  # start (X,Y) -> log pi (X,Y), float64
    """The table that minimises objective(log pi), from the log-probs `start`; a plateau may stop it."""
    theta = start.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=steps, max_eval=2 * steps, history_size=30,
        tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(theta.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach().log_softmax(-1)


def lowest(mean, logp, ref):  # -> log pi (X,Y)
    """The minimiser, by LBFGS from logp; or a policy 100 nats from ref, where the search is given up."""
    for _ in range(5):
        logp = minimise(mean, logp, 100)
        if (logp - ref).abs().max() > 100:
            break
    return logp


def measured(mean, trained, source, true):  # -> Row, log pi (X,Y)
    """Of one run: where its policy lies, and its distance from the minimiser of mean(log pi).

    LBFGS starts from the reference and from the trained policy, and the lower of the two ends counts.
    true (X,Y,Y): the preferences that the win rate is of.
    """
    ref = source.exact["ref"]
    found = [lowest(mean, begin, ref) for begin in (ref, trained)]
    values = torch.stack([mean(logp) for logp in found])
    best = found[values.argmin()]
    numbers = {"KL to ref": data.kl(trained, ref), "win rate": win(trained, true, source.mu)}
    numbers["KL to its minimiser"] = data.kl(trained, best)
    numbers["loss above it"] = mean(trained) - values.min()
    numbers["two starts apart"] = values.max() - values.min()
    row = start.Row(ipo.means(numbers))
    if (best - ref).abs().max() > 100:
        row["KL to its minimiser"] = row["loss above it"] = None
    return row, best


def mean_over_pairs(cost, mu):  # (X,Y,Y), (X,Y) -> ()
    """The mean of cost[x,y,z] over pairs of independent draws y, z from mu, equal ones among them."""
    return torch.einsum("xy,xz,xyz->x", mu, mu, cost).mean()


def weights(mu):  # (X,Y) -> (X,Y,Y)
    """The probability of each ordered pair of independent draws from mu that are not equal."""
    different = 1 - torch.eye(mu.shape[1], dtype=mu.dtype)
    pairs = mu[:, :, None] * mu[:, None, :] * different
    return pairs / pairs.sum((1, 2), keepdim=True)


def margins(logp, ref_logp):  # (X,Y), (X,Y) -> (X,Y,Y)
    """h of every pair of responses."""
    ratio = logp - ref_logp
    return ratio[:, :, None] - ratio[:, None, :]


def nash(ref_logp, pstar, tau, steps=20_000):  # -> log pi (X,Y), largest residual
    """The regularised Nash policy. Damped steps tau / (tau + 1/2) in log space converge for every tau."""
    logp = ref_logp.clone()
    step = tau / (tau + 0.5)
    for _ in range(steps):
        answer = data.optimum(ref_logp, pstar, logp.exp(), tau)
        residual = (answer - logp).abs().max().item()
        if residual < 1e-13:
            break
        logp = ((1 - step) * logp + step * answer).log_softmax(-1)
    return logp, residual


def mirror(ref_logp, pstar, tau, b):  # -> log pi (X,Y), log mu (X,Y)
    """IPO-MD's answer: its mixture mu is Nash at tau / (1 - b), and pi is IPO's optimum against that mu."""
    mu = nash(ref_logp, pstar, tau / (1 - b))[0]
    return data.optimum(ref_logp, pstar, mu.exp(), tau), mu


def rewards(pstar, mu):  # -> (X,Y), mean 0
    """The Bradley-Terry fit to endless pairs: it exists also where preferences are intransitive."""
    def loss(logits):  # minimise hands log-probs over: rewards up to a constant
        gap = margins(logits, 0 * logits)
        return -mean_over_pairs(pstar * logsigmoid(gap), mu)

    r = minimise(loss, torch.zeros_like(mu))
    return r - r.mean(-1, keepdim=True)


def of_base(world):  # -> (X,Y)
    """log of the base distribution as a reference; "" gets a little, or its log would be infinite."""
    logp = (world.base + 1e-4).log().log_softmax(-1)
    return logp.expand_as(world.reward)
