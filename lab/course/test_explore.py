"""The page of lab/course/explore.py: all its cells without a browser, and in a real one where there is one.
"""
import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("marimo", reason="lab/requirements.txt: the page needs marimo")
pytest.importorskip("matplotlib", reason="lab/requirements.txt: the page needs matplotlib")

import data
import ipo
from lab.course import explore

HERE = Path(ipo.__file__).parent
CONTROLS = {"kind": "q", "own": "q ** 2", "tau": 0.2, "place": "bt", "labels": "hard", "pairs": 1000, "loss": "ipo",
            "steps": 100, "button": False}


def page(**values):
    """(outputs, definitions) of the app's cells with the controls at these values."""
    controls = {name: SimpleNamespace(value=value) for name, value in (CONTROLS | values).items()}
    return explore.app.run(defs=controls)


def said(outputs):
    return " ".join(output.text for output in outputs if output is not None)


def test_readers_of_one_server_train_in_turn():
    """marimo runs the setup once for each reader; ipo.psi is one for all, so their lock must be one, too."""
    other = {"__name__": "another reader"}
    source = (HERE / "lab/course/explore.py").read_text()
    setup = re.search(r"with app.setup:\n(.*?)\n\n\n@app", source, re.S)[1]
    exec(textwrap.dedent(setup), other)
    assert other["TURN"] is explore.TURN and "with TURN" in source


def test_the_page_runs_as_it_is():
    """All cells, marimo's own controls; every control has the name that the tests give values to."""
    outputs, definitions = explore.app.run()
    assert len(definitions["rows"]) == 4 and "run" not in definitions
    for name in CONTROLS:
        assert hasattr(definitions[name], "value")
    assert definitions["kind"].value == "q" and definitions["tau"].value == 0.2


@pytest.mark.parametrize("values", [
    {}, {"kind": "logit(q)"}, {"kind": "tanh(8 * (q - 0.5))", "labels": "soft"}, {"kind": "", "own": "q ** 3 + 1"},
    {"tau": 2, "place": "cyclic"}, {"tau": 0.05, "place": "deterministic"}, {"kind": "logit(q)", "place": "deterministic"},
    {"kind": "(sign(q - 0.5) + 1) / 2", "place": "cyclic", "labels": "soft"},
    *({"place": place, "labels": labels} for place in explore.BANDITS for labels in ("hard", "soft")),
    {"place": "bandit D1: a > b > c", "kind": "logit(q)"}], ids=str)
def test_what_is_shown_is_exact(values, monkeypatch):
    """Rows of the table against the core's own pose() with this psi, the page's reference and no sampling noise."""
    _, shown = page(**values)
    value = SimpleNamespace(**(CONTROLS | values))
    psi = explore.formula(value.kind or value.own)
    monkeypatch.setattr(ipo, "psi", psi)
    source = explore.Live(ipo.parse(["--tau", str(value.tau), "--labels", value.labels, "--pairs", "9"]), explore.world(value.place))
    ref = (source.base + 1e-4).log().expand_as(source.reward).log_softmax(-1)
    source.enumerate = lambda policy: ref
    source.pose(None, None, torch.Generator().manual_seed(0))
    rows = {row["policy"]: row for row in shown["rows"]}
    assert list(rows) == list(shown["policies"]) and len(rows) == 4
    certain = ipo.target(torch.ones(1), value.tau)
    for name, mine in ((explore.OPT, "opt"), ("IPO, endless labels", "labels")):
        if mine == "opt" or value.labels == "soft" or certain.isfinite():
            theirs = source.exact[mine]
            assert torch.allclose(shown["policies"][name].exp(), theirs.exp(), atol=1e-9), name
            assert rows[name]["kl_ref"] == ipo.show(source.numbers(theirs)["kl_ref"])
            assert rows[name]["win"] == ipo.show(source.numbers(theirs)["win"])
    assert all(torch.allclose(logp.exp().sum(-1), torch.ones(()).double()) for logp in shown["policies"].values())
    for name, f in (("IPO's pi*: q", lambda q: q), ("DPO's pi*: logit", torch.logit)):
        assert torch.equal(shown["policies"][name], data.optimum(ref, f(source.pstar), source.mu, value.tau))


@pytest.mark.parametrize("place, g", [("bandit D1: a > b > c", [2.5, 1.5, 0.5]), ("bandit D3': a, b > c", [2.0, 2.0, 0.5])])
def test_bandits_are_the_papers(place, g):
    """pi* is the softmax of E_mu p* / tau: means over three opponents, counted by hand."""
    _, shown = page(place=place, tau=0.5)
    assert torch.allclose(shown["policies"][explore.OPT].exp(), (torch.tensor([g]).double() / 3 / 0.5).softmax(-1))


def test_a_certain_pair_runs_away_under_logit_alone():
    """The margins asked for at p = .9, .99, .999, 1: closed forms 2 logit(p) / (2 tau) and (2p - 1) / (2 tau)."""
    def asked(**values):
        outputs, _ = page(**values)
        return re.search("asks for (.*?) nats", said(outputs))[1]
    assert asked(kind="logit(q)") == "10.99, 22.98, 34.53, inf"
    assert asked(kind="q") == "2.00, 2.45, 2.50, 2.50"
    assert asked(kind="q", tau=1) == "0.40, 0.49, 0.50, 0.50"


GOOD = {"q": lambda q: q, " q **2 ": lambda q: q**2, "1 - (1 - q)**3": lambda q: 1 - (1 - q) ** 3, "-exp(-q)": lambda q: -torch.exp(-q),
        "(q > 0.5) + q / 2": lambda q: (q > 0.5).double() + q / 2, "log(q)": torch.log, "3": lambda q: 0 * q + 3, "sigmoid(8*q)": lambda q: (8 * q).sigmoid(),
        "sqrt(q) + abs(q) + sin(q) - cos(q) + tanh(q) + logit(q)": lambda q: q.sqrt() + q + q.sin() - q.cos() + q.tanh() + q.logit(), "2 ** q": lambda q: 2**q}
BAD = ["", "q q", "1 - q", "sin(9 * q)", "x", "q.real", "q.__class__", "__import__('os').system('touch HERE')", "exec('1')", "eval(q)", "open('x')",
       "lambda q: q", "[q for q in q]", "q if q else q", "q[0]", "'q'", "True and q", "exp", "exp()", "exp(q, q)", "exp(q=q)", "exp(*q)", "f'{q}'",
       "q; q", "q = 1", "import os", "(q := 1)", "q @ q", "q // 1", "q % 2", "~q", "not q", "q << 1", "0 < q < 1", "q == q", "None", "1j * q", "log(q - 0.5)",
       "0 / 0 * q", "9 ** 9 ** 9 ** 9 ** 9 - 9 ** 9 ** 9 ** 9", "1" + "0" * 190 + "** 9 * q - q", "(" * 190, "-" * 199 + "q", "q" * 500, "q\nq", "\0", "#", "...", "await q"]


@pytest.mark.parametrize("text", GOOD)
def test_a_formula_is_computed_as_it_reads(text):
    """Against torch's own."""
    q = torch.linspace(0, 1, 77, dtype=torch.float64)
    assert torch.allclose(explore.formula(text)(q), GOOD[text](q), rtol=1e-12)
    assert explore.formula(text)(q.float()[:, None]).shape == (77, 1)


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_formula_is_a_text_in_the_page(text, tmp_path, monkeypatch):
    """One ValueError, nothing executed; in the page a callout in place of the pictures, and no further cell runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        explore.formula(text)
    assert str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_formula_is_shown_and_stops_the_rest():
    """Cells behind it have no output and no definitions."""
    for own in ("import os", "1 - q", "q.real"):
        outputs, definitions = page(kind="", own=own, button=True)
        assert "Psi: " in said(outputs) and "asks for" not in said(outputs) and "rows" not in definitions and "run" not in definitions


def test_formulas_are_parsed_never_executed():
    """The page's own source calls none of what would execute a text."""
    tree = ast.parse(Path(explore.__file__).read_text())
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec", "compile", "__import__"}
    for text in explore.PSI.values():
        assert not text or explore.formula(text)


@pytest.mark.parametrize("values", [{}, {"place": "bandit D1: a > b > c", "tau": 0.5}, {"loss": "dpo", "labels": "soft", "tau": 1},
                                    {"kind": "", "own": "q ** 4"}], ids=str)
def test_the_button_trains_the_policy(values, monkeypatch):
    """A line for each evaluation, from pi = ref (KL 0) to nearer to pi*; the core's psi is as before."""
    before = ipo.psi
    _, definitions = page(button=True, pairs=10_000, **values)
    run = definitions["run"]
    steps = [0, 20, 40, 60, 80, 100, 100]
    assert len(run.lines) == len(steps) and run.lines[0]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert run.lines[-1]["kl_opt"] < 0.7 * run.lines[0]["kl_opt"] and ipo.psi is before
    for name in ("tau", "labels", "pairs", "loss", "steps"):
        assert getattr(run.args, name) == (CONTROLS | {"pairs": 10_000} | values)[name]
    text = run.progress().text
    assert f"step 100; h {run.lines[-1]['h']:.4f} (exact: " in text
    ends = run.numbers(run.exact["opt" if "loss" in values else "labels"])
    assert (ends["kl_opt"] > 0.01) == ("own" in values)  # hard labels see psi(1) - psi(0) alone
    assert f"kl_ref {run.lines[-1]['kl_ref']:.4f} (exact: {ends['kl_ref']:.4f})" in text


def test_a_run_that_cannot_be_is_said_in_the_page(monkeypatch):
    """Psi = logit and hard labels: the core's refusal is the output, and psi is put back."""
    put = []
    monkeypatch.setattr(explore.mo.output, "replace", put.append)
    before = ipo.psi
    page(kind="logit(q)", button=True)
    assert "over-fitting" in put[-1].text and ipo.psi is before


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --window-size=1250,1500").split()
DEEP = """function all(root, found) {for (const e of root.querySelectorAll('*')) {found.push(e); if (e.shadowRoot) all(e.shadowRoot, found)} return found}
          function text(root) {let t = ''; for (const c of root.childNodes) {if (c.nodeType == 3) t += c.textContent;
              else if (c.nodeType == 1 && !['SCRIPT', 'STYLE'].includes(c.tagName)) {t += ' ' + text(c); if (c.shadowRoot) t += ' ' + text(c.shadowRoot)}} return t}
       """


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="lab/requirements.txt: the page in a browser needs selenium")
    from selenium.common.exceptions import WebDriverException
    driver = shutil.which("chromedriver")
    if not BROWSER or not driver:
        pytest.skip("no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", "lab/course/explore.py", "--headless", "--no-token", "--port", str(port)]
    server = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    chrome = None
    try:
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        for _ in range(120):
            try:
                chrome.get(f"http://127.0.0.1:{port}")
                break
            except WebDriverException:  # the server is not up yet
                time.sleep(0.5)
        yield chrome
    finally:
        if chrome:
            chrome.quit()
        server.terminate()
        server.wait()


def seen(chrome, pattern, seconds=40):
    """The text of the page, shadow roots and all, once the pattern is in it."""
    for _ in range(5 * seconds):
        text = " ".join(chrome.execute_script(DEEP + "return text(document.body)").split())
        if re.search(pattern, text):
            return text
        time.sleep(0.2)
    raise AssertionError(f"{pattern!r} did not appear: {text[-1500:]}")


def elements(chrome, css):
    return chrome.execute_script(DEEP + f"return all(document, []).filter(e => e.matches({css!r}))")


def test_the_page_in_a_browser(browser):
    """A slider is moved, a formula typed, the button pressed: each time the numbers of the page change as they should."""
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    text = seen(browser, "IPO's pi.: q 0.3389")
    assert "asks for 2.00, 2.45, 2.50, 2.50 nats" in text
    tau = elements(browser, "[role=slider]")[0]
    tau.send_keys(Keys.ARROW_RIGHT)  # .2 -> .5
    text = seen(browser, "asks for 0.80, 0.98, 1.00, 1.00 nats")
    assert "IPO's pi*: q 0.0609" in text
    tau.send_keys(Keys.ARROW_LEFT)
    seen(browser, "asks for 2.00, 2.45")
    kind, place, labels, loss = map(Select, elements(browser, "select")[:4])
    kind.select_by_visible_text("logit")
    seen(browser, "asks for 10.99, 22.98, 34.53, inf nats")
    kind.select_by_visible_text("yours")
    seen(browser, "asks for 2.00, 2.45, 2.50, 2.50 nats.*of this Psi 0.4388")
    for formula, answer in (("q ** 4 +", "Psi: this is no formula"), ("q ** 4 + 1", "asks for 1.64, 2.40, 2.49, 2.50 nats")):
        own = elements(browser, "input")[0]
        own.send_keys(Keys.END, *[Keys.BACKSPACE] * 20, formula, Keys.ENTER)
        seen(browser, answer)
    [button] = [e for e in elements(browser, "button") if "train the GPT" in e.text]
    button.click()
    first = seen(browser, r"step \d+; h")
    last = seen(browser, r"step 400; h")
    h, exact, off, there = map(float, re.search(r"step 400; h (\S+) \(exact: (\S+)\).*kl_opt (\S+) \(exact: (\S+)\)", last).groups())
    assert "step 400" not in first  # it was drawn as it went
    assert abs(h - exact) < 0.1 and abs(off - there) < 0.02 < there  # hard labels lead elsewhere than to this Psi's pi*
    picture = os.environ.get("EXPLORE_PNG")  # where to leave a screenshot
    if picture:
        time.sleep(1)
        browser.save_screenshot(picture)
