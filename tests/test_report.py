"""Laws of reports: a page says what is on record and runs nothing of it; and of pages in a real browser."""

import html
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import call, every_mode, quick, train  # noqa: F401 - the fixture is for this file too
from test_compare import made, read

from transformer_jax.compare.page import page as compared
from transformer_jax.config import RunConfig
from transformer_jax.config_file import to_json
from transformer_jax.metrics import Record
from transformer_jax.page import FEW_POINTS, MOST_LINES, MOST_POINTS, Line, chart, document, key_of, thinned
from transformer_jax.pictures import Maps
from transformer_jax.report.attention import draw
from transformer_jax.report.history import read_history
from transformer_jax.report.page import page, summary
from transformer_jax.report.samples import first_prompt, pairs_in

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from screenshot import find_browser, opened

BAD = "<script>alert(1)</script>&\"'"
SAMPLES = f"--- step 10\n{BAD}\n  expected a\n  output   b\n\n--- step 20\n{BAD}\n  expected a\n  output   a\n\n"
START: Record = {"event": "start", "step": 0, "parameters": 1234, "device": BAD, "versions": {"jax": "1", BAD: BAD}}
END: Record = {"event": "end", "step": 20, "param_digest": "abc"}


def lines_of(steps=20):
    """A run's record without its end: 2 seconds a step, evaluations of 5."""
    found = [START | {"report": ["train: 3 pairs"]}]
    for step in range(1, steps + 1):
        train = {"loss": 4 / step, "accuracy": step / 40, "learning_rate": 1e-3, "grad_norm": 1.0, "compiles": 1}
        train |= {"tokens_per_second": 1e4 + step, "data_wait": 0.01, "seconds": 2.0 * step}
        found.append({"step": step, "split": "train"} | train)
        if step % 10 == 0:
            scores = {"loss": 5 / step, "perplexity": 2.0, "accuracy": step / 50, "exact_match": step / 100}
            found.append({"step": step, "split": "validation"} | scores | {"seconds": 5.0})
    return found


def run_in(folder, records, samples=SAMPLES, **config):
    """A run's folder with these lines."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(RunConfig(steps=20, workdir=str(folder), **config)))
    lines = (each if isinstance(each, str) else json.dumps(each) for each in records)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if samples:
        (folder / "samples.txt").write_text(samples)
    return folder


def text_of(folder, **looked):
    """The words of a run's page, whose tags are closed."""
    history = read_history(folder)
    return read(page([history], looked))


# --- what a page says


def test_a_page_says_what_is_on_record(tmp_path):
    folder = run_in(tmp_path / "a run", [*lines_of(), END])
    text = text_of(folder)
    assert "encoder-decoder with 1,234 parameters" in text
    assert "finished, 20 steps; on unseen data exact match 20.0% (its best), loss 0.2500 (its best)." in text
    wanted = ["train: 3 pairs", "45 s", "10 s", "10k", "step 20: end: abc", "At step 20", "step 10", "model.d_model"]
    assert [words for words in wanted if words not in text] == []
    history = read_history(folder)
    assert history.seconds == 45
    assert history.total("seconds") == [10]
    assert list(history.curve("train", "loss")[1]) == [4 / step for step in range(1, 21)]


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ([], "at step 20 of 20, not finished"),
        ([{"event": "preempted", "step": 20, "reason": "SIGTERM"}], "stopped at step 20 of 20"),
        ([{"event": "preempted", "step": 10, "reason": "stop_at"}, {"event": "resume", "step": 10}], "not finished"),
        ([END], "finished, 20 steps"),
    ],
)
def test_it_says_how_a_run_stands(last, says, tmp_path):
    assert says in summary([read_history(run_in(tmp_path / "run", lines_of() + last))])


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    text = text_of(run_in(tmp_path / "run", lines_of(1), ""))
    assert "not evaluated yet" in text
    assert "None yet." in text


def test_several_starts_add_up(tmp_path):
    """A resume takes back lines, never time that is on record; the clock of a start begins at 0."""
    again = [record | {"seconds": 3.0} for record in lines_of() if record.get("split") == "train"][10:12]
    records = [*lines_of(10), {"event": "resume", "step": 10}, START | {"step": 10}, *again]
    assert read_history(run_in(tmp_path / "run", records)).seconds == 20 + 5 + 3


def test_older_runs_have_no_times(tmp_path):
    """Nor hardware, and a page all the same."""
    records = [{k: v for k, v in each.items() if k != "seconds"} for each in lines_of() if "event" not in each]
    text = text_of(run_in(tmp_path / "run", records))
    assert "Not on record" in text
    assert "–" in text


DAMAGED = [
    "{",
    "[1]",
    "[" * 100_000,
    '{"step": "1", "split": "train", "loss": 1}',
    '{"step": 1e999, "split": "train", "loss": 1}',
    '{"step": true, "event": "start"}',
    '{"step": -1, "split": "train"}',
]
ODD: list[Record] = [
    {"step": 3, "split": "odd", "loss": "text", "accuracy": None, "exact_match": True, "grad_norm": 10**400},
    {"step": 3, "split": 5},
    {"step": 3, "event": ["end"]},
    {"step": 3, "event": "start", "versions": [1], "report": "no list", "parameters": "many"},
    {"step": 4, "split": "train", "seconds": "long", "loss": -1.0, BAD: 1.5},
]


def test_what_is_damaged_is_left_out_and_counted(tmp_path):
    folder = run_in(tmp_path / "run", [*lines_of(), *DAMAGED, *ODD])
    (folder / "samples.txt").write_bytes(b"no step\n--- step 5\n\xff\n--- step 99999999999999999999\n")
    text = text_of(folder)
    assert f"{len(DAMAGED)} damaged lines of metrics.jsonl are left out" in text
    assert read_history(folder).curve("odd", "loss")[0].tolist() == []


def test_nothing_of_a_run_becomes_a_part_of_the_page(tmp_path):
    """Names, samples, events, settings, devices, prompts are quoted; the browser is told to run and fetch nothing."""
    folder = run_in(tmp_path / "run", [*lines_of(), *ODD, {"event": BAD, "step": 1, "reason": BAD}], recipe=BAD)
    maps = Maps("self", np.full((1, 1, 2, 2), 0.5, np.float32), [BAD, "b"], ["a", BAD])
    made = page([read_history(folder, BAD)], {BAD: (BAD, draw([maps]))})
    assert "<script" not in made
    assert made.count("&lt;script") > 10
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in made
    assert set(re.findall(r'(?:src|href)="(.{10})', made)) == {"data:image"}
    assert not re.search(r"\bon\w+=|javascript:|https?:|url\(", html.unescape(re.sub(r'"data:[^"]*"', "", made)))


def test_several_runs_are_beside_each_other(tmp_path):
    """With the best of each number, what differs between them, and a line in each chart for each."""
    one = run_in(tmp_path / "one", [*lines_of(), END])
    better = [each | ({"loss": 0.1} if each.get("split") == "validation" else {}) for each in lines_of(10)]
    two = run_in(tmp_path / "two", better, "", seed=7, batch_size=32)
    made = page([read_history(one), read_history(two)], {})
    text = read(made)
    assert "two has the lowest loss on unseen data, 0.1000 at step 10, against 0.2500 of one." in text
    differ = made[made.index("<h2>Settings") : made.index("All settings")]
    assert [name in differ for name in ("seed", "batch_size", "d_model", "workdir")] == [True, True, False, False]
    (loss,) = re.findall(r"<figcaption>Loss, validation.*?</figure>", made, re.DOTALL)
    assert loss.count("<polyline") == 2
    assert "one, from 0.5 at 10 steps to 0.25 at 20; two, from 0.1 at 10 steps" in loss


def test_samples_are_pairs_or_as_they_are():
    pairs = "a b\n  expected c\n  output   d\ne\nf\n  expected g\n  output   "
    assert pairs_in(pairs) == [("a b", "c", "d"), ("e\nf", "g", "")]
    assert pairs_in(pairs + "\nmore") == pairs_in("to be|or not") == pairs_in("q\n  output   a") == []


@pytest.mark.parametrize(
    ("samples", "prompt"),
    [(SAMPLES, BAD), ("--- step 1\nto be|or not\n\n", "to be"), ("--- step 1\nq\n  output   a\n\n", "q"), ("", "")],
)
def test_the_first_sample_is_looked_at(samples, prompt, tmp_path):
    assert first_prompt(read_history(run_in(tmp_path / "run", lines_of(), samples))) == prompt


# --- charts


def test_a_long_curve_keeps_its_extremes():
    """Of a million values there are few points; all values of neighbours are in their band."""
    values = np.sin(np.arange(100_001) / 999)
    values[777] = 5
    points = thinned(np.arange(100_001.0), values.tolist())
    assert len(points) <= MOST_POINTS
    assert sum(len(each) for _, each in points) == len(values)
    drawn = chart("t", "steps", "y", [Line("a", points)])
    assert len(drawn) < 30_000
    assert "(-0.0" in drawn or "to 5)" in drawn
    assert "<circle" not in drawn


def test_a_hint_has_the_values_of_its_place():
    drawn = chart("t", "steps", "y", [Line("a", [(1, [1.0]), (2, [2.0]), (3, [4.0])]), Line("b", [(2, [7.0, 9.0])])])
    assert re.findall(r"<title>(.*?)</title>", drawn, re.DOTALL) == [
        "1 steps\na: 1",
        "2 steps\na: 2\nb: 8 (7 to 9)",
        "3 steps\na: 4",
    ]
    assert drawn.count("<circle") == 4
    assert FEW_POINTS >= 4


@pytest.mark.parametrize("values", [[1e-9, 1e9], [0.5, 0.6], [3.0, 3.0], [0.0, 1.0], [-1.0, 1.0], [1e90, 1e-90]])
@pytest.mark.parametrize("log", [True, False])
def test_every_place_is_within_the_chart(values, log):
    """And an axis has a few numbers on it; one with values that are not positive is not logarithmic."""
    drawn = chart("t", "x", "y", [Line("a", [(float(x), [y]) for x, y in enumerate(values)])], log)
    places = re.findall(r"(-?[\d.]+),(-?[\d.]+)", "".join(re.findall(r'points="(.*?)"', drawn)))
    assert all(46 <= float(x) <= 334 and 22 <= float(y) <= 192 for x, y in places)
    assert 1 <= drawn.count('class="grid"') <= 7
    assert ("log scale" in drawn) == (log and min(values) > 0)


def test_lines_can_be_told_apart():
    drawn = re.findall(r"<path(.*?)/>", key_of([str(number) for number in range(MOST_LINES)]))
    assert len(set(drawn)) == MOST_LINES


# --- the command


@every_mode
@pytest.mark.long
def test_a_trained_run_is_reported(mode):
    """With its attention, also for a prompt; the run's own files stay as they are."""
    run = Path(f"reported-{mode}")
    status, _, err = train(run, mode)
    assert status == 0, err
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    status, out, err = call("report", run)
    assert (status, err) == (0, "")
    assert out.startswith(f"{run}/report.html: {mode} with ")
    made = (run / "report.html").read_text()
    kinds = {"Self-attention of the encoder", "Self-attention of the decoder", "Cross-attention"}
    assert {kind for kind in kinds if kind in made} == (kinds if mode == "encoder-decoder" else {sorted(kinds)[1]})
    assert made.count('href="data:image/png') == 2 * (3 if mode == "encoder-decoder" else 1)
    assert "CPU" in made or "cores" in made
    assert call("report", run, "--prompt 01.02.2003 --output one.html")[0] == 0
    assert "Prompt: &#x27;01.02.2003&#x27;, at step 6." in Path("one.html").read_text()
    assert call("report", run, f"--prompt {'1' * 40} --output two.html")[0] == 2
    assert {path: path.read_bytes() for path in before} == before
    (run / "report.html").unlink()


def test_runs_without_a_checkpoint_say_so(tmp_path):
    run = run_in(tmp_path / "run", lines_of())
    assert call("report", [str(run), "--output", str(tmp_path / "out.html")])[0] == 0
    assert "without a checkpoint yet" in read((tmp_path / "out.html").read_text())
    assert call("report", [str(run), "--no-attention"])[0] == 0
    assert call("report", [str(run), "--no-attention"])[0] == 0  # over the page that is there
    assert "Attention" not in read((run / "report.html").read_text())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "runs"),
        ("nowhere", "nowhere: not a run's folder: it has no config.json"),
        ("EMPTY", "there is nothing to report yet: metrics.jsonl has no line with numbers"),
        ("RUN RUN", "the same run is given twice"),
        ("RUN --output RUN/metrics.jsonl", "would be lost"),
        ("RUN --output no/where.html", "there is no folder"),
        ("RUN --prompt a --no-attention", "--prompt is for the attention"),
    ],
)
def test_what_cannot_be_reported_is_refused(words, says, tmp_path):
    run, empty = run_in(tmp_path / "run", lines_of()), run_in(tmp_path / "empty", [START, "{"])
    status, out, err = call("report", words.replace("RUN", str(run)).replace("EMPTY", str(empty)))
    assert (status, out) == (2, "")
    assert says in " ".join(re.sub("[│╭╰─]", " ", err).split())
    assert not list(tmp_path.rglob("*.html"))


# --- in a browser

in_a_browser = pytest.mark.skipif(
    find_browser() is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium or Chrome, or no playwright: pip install 'transformer_jax[browser]'",
)
# What is seen of a page: (what is wider than the window and not in a box of its own, the least contrast of a text with
# what is behind it and that text, sizes of charts, the least height of type in charts).
SEEN = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number)
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  const light = colour => numbers(colour).slice(0, 3).map(c => linear(c / 255)).reduce(
    (sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0)
  const behind = each => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor
      if ((numbers(colour)[3] ?? 1) > 0) return colour
    }
    return "rgb(255, 0, 255)"
  }
  const all = [...document.body.querySelectorAll("*")].filter(each => each.checkVisibility())
  const wide = all.filter(each => each.getBoundingClientRect().right > innerWidth + 0.5)
    .filter(each => !each.parentElement.closest("div.wide"))
  const texts = all.filter(each => [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
    .filter(each => each.tagName != "title")
  const contrasts = texts.map(each => {
    const style = getComputedStyle(each), own = each.closest("svg") ? style.fill : style.color
    const [dark, bright] = [light(own), light(behind(each))].sort((a, b) => a - b)
    return [(bright + 0.05) / (dark + 0.05), each.textContent.slice(0, 40)]
  })
  const svgs = all.filter(each => each.tagName == "svg" && each.getAttribute("role") == "img")
  const boxes = svgs.map(each => each.getBoundingClientRect()).map(box => [box.width, box.height])
  const type = [...document.querySelectorAll("figure svg text")].filter(each => each.checkVisibility())
    .map(each => parseFloat(getComputedStyle(each).fontSize) * each.getScreenCTM().a)
  const across = document.documentElement.scrollWidth - innerWidth
  const hints = all.filter(each => each.tagName == "rect" && each.querySelector("title")).length
  const contrast = contrasts.sort((a, b) => a[0] - b[0])[0]
  return {wide: wide.map(each => each.outerHTML.slice(0, 80)), across, contrast, boxes, type: Math.min(...type), hints}
}"""


def report_of(folder):
    """A page of two runs with names, settings and samples that are long, and maps of many tokens."""
    long = f"--- step 20\n{'long ' * 60}\n  expected {'x' * 300}\n  output   b\n"
    runs = [run_in(folder / "one", [*lines_of(), *ODD, END]), run_in(folder / ("two" * 30), lines_of(10), long, seed=7)]
    maps = draw([Maps("cross", np.full((2, 3, 40, 30), 1 / 30, np.float32), ["query"] * 40, ["<key>"] * 30)])
    histories = [read_history(run) for run in runs]
    return page(histories, {each.name: ("a", maps) for each in histories})


PAGES = {
    "report": (report_of, 2 * 3 + 9),
    "compare": (lambda _: compared(made([0.9, 0.8], [0.5, 0.6])), 6),
}


@in_a_browser
@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.filterwarnings("ignore")  # of the browser's own driver
def test_a_page_is_legible(kind, tmp_path):
    """On a telephone and on a screen, in light and dark: nothing is asked for or complained of, nothing is wider than
    the window, texts have a contrast of 4.5 (WCAG 2.2, 1.4.3), every chart is there in type of 9 pixels or more."""
    make, charts = PAGES[kind]
    path = tmp_path / "page.html"
    path.write_text(make(tmp_path), "utf-8")
    with opened(path, 1200) as (tab, told):
        papers = set()
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            papers.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            for width in (360, 390, 1200):
                tab.set_viewport_size({"width": width, "height": 800})
                seen = tab.evaluate(SEEN)
                assert (seen["wide"], seen["across"]) == ([], 0)
                assert seen["contrast"][0] >= 4.5, seen["contrast"]
                assert len(seen["boxes"]) >= charts
                assert all(wide >= 150 and tall >= 100 for wide, tall in seen["boxes"])
                assert seen["type"] >= 9
                assert seen["hints"] > 0
        assert len(papers) == 2
        tables = tab.evaluate("[...document.querySelectorAll('table')].every(each => each.closest('div.wide'))")
        assert tables
        assert told == []


@in_a_browser
@pytest.mark.filterwarnings("ignore")
def test_the_checks_of_a_page_find_what_they_are_for(tmp_path):
    path = tmp_path / "page.html"
    body = '<p style="color: #999">pale</p><div style="width: 2000px">wide</div><img src="https://example.org/a.png">'
    path.write_text(document("t", f"{body}<script>alert(1)</script>"))
    with opened(path, 360) as (tab, told):
        seen = tab.evaluate(SEEN)
    assert seen["across"] > 0
    assert len(seen["wide"]) == 1
    assert seen["contrast"][0] < 4.5
    assert len(told) >= 2  # the browser refuses the image and the script
