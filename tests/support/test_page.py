"""support/page.py: what report.html holds, that a browser draws it, and that nothing a model wrote becomes markup."""
import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from support import page
from support.report import curve_line

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(
    not BROWSER, reason="no Chromium here: apt-get install chromium, and the page is drawn")
HOSTILE = ["</script><script>document.body.setAttribute('data-hacked','1')</script>", "<img src=x onerror=alert(1)>",
           "&lt;b&gt;", "\u2028\u2029", "<!--", "]]>", "{{7*7}}", "\x00\x1b[31m", '"DATA"', "SCRIPT_HASH",
           "\ud800", "a\nb\tc", ""]


def write_run(folder, steps=40, seed=0, accuracy=0.5, pieces=("7", "+", "<|end|>"), **config):
    """A run's folder as train.py leaves it: three evaluations, `steps` steps, one view of tokens."""
    n = len(pieces)
    (folder / "tokens").mkdir(parents=True)
    config = dict(recipe="fire", student="toy/student", teacher="toy/teacher", steps=steps, weight="fire",
                  advantage="opd", divergence="policy_gradient", problems=4, samples=2, seed=seed,
                  name=folder.name, **config)
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"config": config}, {"step": 0, "eval": {"avg@2": 0.2, "avg@2_ci": [0.1, 0.3], "seconds": 1.0},
                                  "eval_teacher": {"avg@2": 0.9, "avg@2_ci": [0.8, 1.0]}}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 1 / step, "reverse_kl": 2 / step, "mean_length": 5.0 + seed, "kept": 0.8,
                      "student_entropy": None, "rollout_seconds": 0.2, "score_seconds": 0.1, "update_seconds": 0.1,
                      **{f"reverse_kl/q{q}": q / step for q in range(1, 5)}})
    lines += [{"step": steps // 2, "eval": {"avg@2": 0.4}}, {"step": steps, "eval": {"avg@2": accuracy}}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 99, "lo')
    sample = dict(prompt=pieces[0], pieces=list(pieces), length=n, finished=False, right=0.0,
                  columns={"kl": [0.1 * i for i in range(n)], "weight": [0.0] * n, "behavior_logp": [-1.0] * n,
                           "teacher_logp": [-2.0] * n, "advantage": [-1.0] * n, "student_entropy": [None] * n},
                  top=[[[[piece, 0.9]], [[piece, 0.8]]] for piece in pieces])
    (folder / "tokens/step-000001.json").write_text(json.dumps({"step": 1, "training": [sample], "held-out": [sample]}))
    return folder


def data_of(text):
    """What the page's script reads."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def drawn(text, tmp_path, width=1000, probe=""):
    """The document as a headless browser leaves it; probe: a script of the test's, allowed beside the page's own."""
    if probe:
        digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
        text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
        text = text.replace("</body>", f"<script>{probe}</script></body>")
    (tmp_path / "page.html").write_text(text)
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --virtual-time-budget=3000").split()
    done = subprocess.run([BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
                           "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True,
                          timeout=120)
    return done.stdout


def test_the_page_has_the_numbers_of_the_run(tmp_path):
    """fails if: an evaluation, a step or the teacher is lost, or a line that a kill has cut ends the page."""
    folder = write_run(tmp_path / "a")
    page.write_page(folder)
    (run,) = data_of((folder / "report.html").read_text())["runs"]
    assert [e[1]["avg@2"] for e in run["evals"]] == [0.2, 0.4, 0.5] and run["teacher"]["avg@2"] == 0.9
    assert run["series"]["reverse_kl"] == [[step, page.number(2 / step)] for step in range(1, 41)]
    assert run["series"]["reverse_kl/q4"][1] == [2, 2.0] and "student_entropy" not in run["series"]
    assert run["phases"] == {"rollout": 8.0, "score": 4.0, "update": 4.0, "evaluation": 1.0} and run["steps"] == 40


def test_a_long_run_stays_small(tmp_path):
    """20,000 steps. fails if: every step of a long run becomes a point."""
    folder = write_run(tmp_path / "a", steps=20_000)
    page.write_page(folder)
    (run,) = data_of((folder / "report.html").read_text())["runs"]
    assert len(run["series"]["loss"]) <= page.POINTS and run["series"]["loss"][-1][0] == 20_000
    assert (folder / "report.html").stat().st_size < 2 ** 21


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    """fails if: seeds are told apart as settings, or settings are thrown together."""
    folders = [write_run(tmp_path / name, seed=seed, **more) for name, seed, more in
               (("a", 0, {}), ("b", 1, {}), ("c", 0, {"lr": 2.0}))]
    out = tmp_path / "compared.html"
    assert page.main([*map(str, folders), "--out", str(out)]) == 0
    assert data_of(out.read_text())["lines"] == [[0, 1], [2]]


@pytest.mark.parametrize("arguments, words", [
    (["nowhere"], "no folder of a run"), (["RUN", "RUN"], "--out"), ([".."], "no folder")])
def test_a_wrong_command_is_one_sentence(arguments, words, tmp_path, capsys):
    write_run(tmp_path / "a")
    assert page.main([argument.replace("RUN", str(tmp_path / "a")) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_no_text_can_end_the_data_or_name_another_script(tmp_path):
    """fails if: a sign of markup is not escaped, or a placeholder inside a text is filled in."""
    folder = write_run(tmp_path / "a", pieces=HOSTILE)
    page.write_page(folder)
    text = (folder / "report.html").read_text()
    data = text[text.index('<script id="data"'):text.index("<script>\n")]
    assert data.count("<") == 2 and data.count("&") == 0     # the element that holds it, and its end
    (run,) = data_of(text)["runs"]
    assert run["tokens"][0]["training"][0]["pieces"] == HOSTILE


@in_a_browser
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_a_browser_draws_it_at_every_width(width, tmp_path):
    """fails if: the script stops at an error, a part is missing, or a phone has to scroll sideways."""
    folder = write_run(tmp_path / "a")
    page.write_page(folder)
    probe = ("document.body.setAttribute('data-wide', "
             "document.documentElement.scrollWidth > innerWidth ? 'yes' : 'no');"
             "document.querySelector('.said .t').click();")
    dom = drawn((folder / "report.html").read_text(), tmp_path, width, probe)
    assert 'data-drawn="yes"' in dom and 'data-wide="no"' in dom
    assert dom.count("<polyline") >= 5 and "dropped by the filter" in dom and "student's likeliest tokens" in dom


@in_a_browser
def test_hostile_text_stays_text(tmp_path):
    """fails if: a model's text becomes an element or runs, wherever the page shows it: token, prompt, title,
    details."""
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>", pieces=HOSTILE)
    page.write_page(folder)
    probe = ("for (const token of document.querySelectorAll('.said .t')) token.click();"
             "document.body.setAttribute('data-images', document.images.length);"
             "document.body.setAttribute('data-scripts', document.scripts.length);")
    dom = drawn((folder / "report.html").read_text(), tmp_path, probe=probe)
    assert 'data-drawn="yes"' in dom and 'data-images="0"' in dom and 'data-scripts="3"' in dom
    assert "data-hacked=" not in dom
    assert "&lt;img src=x onerror=alert(1)&gt;" in dom


@in_a_browser
def test_a_script_that_is_not_the_pages_own_does_not_run(tmp_path):
    """fails if: the content security policy lets any script in."""
    folder = write_run(tmp_path / "a")
    page.write_page(folder)
    text = (folder / "report.html").read_text()
    hack = "<script>document.body.setAttribute('data-hacked', '1')</script></body>"
    dom = drawn(text.replace("</body>", hack), tmp_path)
    assert 'data-drawn="yes"' in dom and "data-hacked=" not in dom.replace("setAttribute('data-hacked'", "")


def test_the_small_curve_of_the_terminal():
    evals = [(0, {"avg@8": 0.25}), (20, {"avg@8": 0.625}), (40, {"avg@8": 1.0})]
    assert curve_line(evals) == "        25.0% ▁▅█ 100.0% at steps 0 to 40\n"
    assert curve_line(evals[:1]) == "" and curve_line([(0, {"mean_length": 3.0})] * 2) == ""
