"""Laws of the documentation: what it says of the code is so, what it links to is there, and what it shows runs."""

import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path
from subprocess import run

import draw_tour
import link_lines
import numpy as np
import pytest
from link_lines import FIGURE, LINK, ROOT, lines_of, pages, rewritten
from tokenizers import Tokenizer, models, processors

import transformer_jax
from transformer_jax.cli import run_command

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ANY_LINK = re.compile(r"(!?)\[[^\]]*\]\((<[^>]*>|[^\s)]+)[^)]*\)")
EVERY = pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its blocks and its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page))


@EVERY
def test_links_to_code_are_to_the_lines_of_their_symbols_and_figures_are_those_measured(page):
    assert read(page) == rewritten(read(page)), "python scripts/link_lines.py rewrites lines and figures"


SOURCE = '''"""What
it is."""
X = {
    "a": 1,
    "b": 2,
}


class C:
    @property
    def f(self):
        y = (
            1
        )
        return y
'''


def test_a_symbol_is_found_with_its_decorators_and_a_line_by_its_text():
    found = {"__doc__": (1, 2), "X": (3, 6), 'X: "b"': (5, 5), "C.f": (10, 15), "C.f: y = (": (12, 14), "C": (9, 15)}
    assert {symbol: lines_of(SOURCE, symbol) for symbol in found} == found
    for wrong in ("C.g", "Y", "X: nothing", "C.f: y"):
        with pytest.raises(ValueError, match=r"statements are named|lines of"):
            lines_of(SOURCE, wrong)


def test_what_is_not_so_is_found(monkeypatch, tmp_path):
    """A link without a symbol, to a file that is not there, and figures that a file does not have."""
    (tmp_path / "a.py").write_text("\n\nX = 1\n")
    (tmp_path / "a.json").write_text('{"a b": {"c": 2}, "d": 8}')
    (tmp_path / "a.md").write_text("it takes 12.5 s\nor 13 s\n")
    monkeypatch.setattr(link_lines, "ROOT", tmp_path)
    url = link_lines.CODE
    assert rewritten(f'[x]({url}a.py#L1-L9 "X")') == f'[x]({url}a.py#L3 "X")'
    assert (
        rewritten("0.00 %<!-- a.json: a b/c over d times 100 -->") == "25.00 %<!-- a.json: a b/c over d times 100 -->"
    )
    assert rewritten("12.5<!-- a.md: it takes -->") == "12.5<!-- a.md: it takes -->"
    wrong = [f"[x]({url}a.py#L3)", f'[x]({url}b.py#L3 "X")', f'[x]({url}a.py "Y")', "2.5<!-- a.md: it takes -->"]
    for page in [*wrong, "1<!-- a.json: a b/e -->", "13<!-- a.md: it takes -->", "1<!-- a.md: nothing -->"]:
        with pytest.raises(ValueError, match=r"a\.|b\."):
            rewritten(page)


def test_the_tour_says_the_same_in_both_languages():
    """The same headings by level, code, links, pictures, figures, rows of tables and items, in the same order."""
    english, chinese = (read(ROOT / "docs" / name) for name in ("tour.md", "tour.zh.md"))

    def told(page: str) -> dict[str, list]:
        text = FENCE.sub("", page)
        return {
            "blocks": FENCE.findall(page),
            "headings": [len(each) for each in re.findall(r"^(#+) ", text, re.M)],
            "links": [m[2] for m in ANY_LINK.finditer(text) if not m[2].startswith("tour.")],
            "symbols": [m["symbol"] for m in LINK.finditer(text)],
            "figures": [m[0] for m in FIGURE.finditer(text)],
            "cells": [line.count("|") for line in re.sub(r"<!--.*?-->", "", text).splitlines() if line.startswith("|")],
            "items": re.findall(r"^[-*] ", text, re.M),
            "paragraphs": [re.findall(r"^[#|!-]", part, re.M) for part in re.split(r"\n\s*\n", text.strip())],
        }

    ours, theirs = told(english), told(chinese)
    for what in ours:
        assert ours[what] == theirs[what], what
    assert len(ours["symbols"]) > 50
    assert len(ours["blocks"]) > 10
    assert len(re.findall(r"[一-鿿]", chinese)) > 2000
    assert "(tour.zh.md)" in english
    assert "(tour.md)" in chinese
    assert not re.search(r"[一-鿿]", prose(english).replace("[中文]", ""))


def test_pictures_of_the_tour_are_what_their_script_draws():
    """Masks in them are those of `sees`, so they change with it."""
    for name, picture in draw_tour.pictures().items():
        assert read(draw_tour.FOLDER / name) == picture, f"python scripts/draw_tour.py draws {name} again"
    assert {path.name for path in draw_tour.FOLDER.iterdir()} == set(draw_tour.pictures())


def anchors(page: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY
def test_local_links_are_there(page):
    for match in ANY_LINK.finditer(FENCE.sub("", read(page))):
        if re.match(r"https?:|mailto:", match[2]):
            continue
        name, _, anchor = match[2].partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{match[2]} is not there"
        assert ROOT in target.parents
        assert not anchor or anchor in anchors(read(target)), f"{match[2]}: no such heading"


def test_the_api_page_has_every_public_name():
    named = set(re.findall(r"^::: transformer_jax\.public\.(\w+)$", read(ROOT / "docs" / "api.md"), re.M))
    assert named == set(transformer_jax.__all__)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks with the line each starts after."""
    text = read(page)
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in FENCE.finditer(text) if m[1] == "python"]


def make_run(folder: Path) -> None:
    """What `python train.py dates` leaves behind, in two steps of a tiny model."""
    model = dict(d_model=8, num_layers=1, num_encoder_layers=1, num_heads=1, d_ff=8)
    sizes = dict(steps=2, batch_size=2, num_samples=0, eval_rows=2, log_every=1)
    sizes |= {f"model.{name}": size for name, size in model.items()}
    flags = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    assert run_command(["train", "dates", "--workdir", str(folder), *flags]) == 0


def make_t5(folder: Path) -> None:
    """A T5 as `transformers` saves it, of random weights."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "t5", folder)
    names = ["<pad>", "</s>", "<unk>", *(f"word{number}" for number in range(58))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.add_special_tokens(names[:3])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.save(str(folder / "tokenizer.json"))


def readme(folder: Path) -> dict[str, object]:
    make_run(folder / "runs" / "dates")
    make_t5(folder / "path" / "to" / "t5-small")
    return {"source_ids": np.array([[5, 6, 7, 0]]), "target_ids": np.array([[1, 8, 9], [1, 8, 0]])[:1]}


def faq(folder: Path) -> dict[str, object]:
    make_run(folder / "runs" / "dates")
    return {}


def decoding(folder: Path) -> dict[str, object]:
    """The harness with everything but its tasks, which it would download."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    make_run(folder / "runs" / "text")
    lm_eval.simple_evaluate = lambda model, tasks: model.loglikelihood
    return {}


# What the blocks of a page suppose, made in the folder that they run in: page -> names that they have.
SUPPOSED = {"README.md": readme, "docs/faq.md": faq, "docs/decoding.md": decoding}
WITH_BLOCKS = [path for path in pages() if blocks(path) and path.name != "tour.zh.md"]


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """In one namespace for each page; those of the Chinese tour are those of the English one."""
    monkeypatch.chdir(tmp_path)
    names = SUPPOSED.get(str(page.relative_to(ROOT)), lambda folder: {})(tmp_path)
    module = types.ModuleType("page")
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "page", module)
    for line, block in blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), module.__dict__)


def test_blocks_are_of_languages_that_are_tried():
    """Python and bash are run, the others only shown."""
    shown = {"", "python", "bash", "text", "yaml", "json"}
    for page in pages():
        assert {language for language, _ in FENCE.findall(read(page))} <= shown, page


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs is not installed: pip install -e ".[docs]"')
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = re.compile(
        r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//(?!transformer-jax\.github)"
    )
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= 15
    for path in built:
        found = [m[0] for m in loads.finditer(path.read_text(encoding="utf-8")) if 'rel="canonical"' not in m[0]]
        assert not found, path
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("交叉注意力" in entry["text"] for entry in index["docs"])
