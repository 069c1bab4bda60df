"""Safe by construction: no code comes out of a file, nothing is connected to, nothing is written outside the workdir.

What SECURITY.md promises is held here, or by the tests that it names.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("transformer_jax/**/*.py"), *ROOT.glob("scripts/*.py"), ROOT / "train.py"])

# --- in the source

# What could run code that a file holds, unpack to anywhere, start a process, or reach a network.
MODULES = re.compile(
    "_pickle|c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal|yaml|torch|zipfile|tarfile|code|codeop|runpy|pty|"
    "subprocess|multiprocessing|socket|socketserver|ssl|urllib|http|ftplib|smtplib|xmlrpc|requests|httpx|aiohttp"
)
BUILTINS = ("eval", "exec", "compile", "__import__")
FUNCTIONS = re.compile(
    r"(os\.(system|popen|fork|startfile|exec\w+|spawn\w+|posix_spawn\w*)|importlib\.(import_module|reload)|import_module"
    r"|shutil\.(unpack_archive|make_archive)|torch\.load|joblib\.load|yaml\.\w*load\w*|asyncio\.create_subprocess\w*)"
)
ARGUMENTS = ("allow_pickle", "shell", "trust_remote_code")
ALLOWED = {
    ("transformer_jax/bench/peers.py", "torch"),  # it trains models there and loads nothing
    ("scripts/bench_gpu.py", "subprocess"),  # which runs itself, a process a case
    ("scripts/measure_prepare.py", "subprocess"),  # which runs this program, to kill it
    ("scripts/newcomer.py", "subprocess"),  # which does what a newcomer does, in a folder of its own
    ("transformer_jax/workers.py", "multiprocessing"),  # which runs itself
}


def risks(source):
    """(line, what) of each part of a program that MODULES, BUILTINS, FUNCTIONS or ARGUMENTS name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inner = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = [name.split(".")[0] for name in inner]
            yield from ((node.lineno, root) for root in roots if MODULES.fullmatch(root))
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.lineno, node.id
        if isinstance(node, (ast.Attribute, ast.Name)) and FUNCTIONS.fullmatch(ast.unparse(node)):
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg in ARGUMENTS and ast.unparse(node.value) != "False":
            yield node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"


def test_no_source_can_run_what_a_file_holds():
    assert len(SOURCES) > 40
    found = [
        (name, *risk)
        for path, name in ((path, path.relative_to(ROOT).as_posix()) for path in SOURCES)
        for risk in risks(path.read_text("utf-8"))
        if (name, risk[1]) not in ALLOWED
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, urllib.request",
        "from multiprocessing import Pool",
        "eval(text)",
        "run = exec",
        "__import__(name)",
        "importlib.import_module('json')",
        "os.system('true')",
        "os.execv(path, words)",
        "numpy.load(path, allow_pickle=True)",
        "run(words, shell=flag)",
        "shutil.unpack_archive(path)",
        "torch.load(path)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert list(risks(line))


def test_the_search_leaves_the_rest():
    assert not list(risks("import json\nx.compile()\nre.compile('a')\nnumpy.load(path, allow_pickle=False)"))


# --- in a run

# Trains and answers with a hook on all that Python's own functions ask of the system, each as a line of JSON.
AUDIT = """
import json, os, sys
log = open(sys.argv[1], "w")
WATCHED = ("socket", "subprocess", "os", "shutil", "urllib", "http", "ftplib", "smtplib", "pickle", "webbrowser", "pty")
QUIET = ("os.listdir", "os.scandir", "os.walk", "os.putenv", "os.unsetenv", "os.add_dll_directory", "os.fwalk")
def hook(event, args):
    if event == "open":
        path, _, flags = args
        if not isinstance(path, int) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            log.write(json.dumps([event, os.fspath(path)]) + "\\n")
    elif event.partition(".")[0] in WATCHED and event not in QUIET:
        log.write(json.dumps([event, *map(str, args)]) + "\\n")
sys.addaudithook(hook)
from transformer_jax.cli import run_command
for words in (sys.argv[2:], ["generate", "run", "--input", "prompts.txt", "--output", "run/answers.txt"]):
    status = run_command(words)
    if status:
        sys.exit(status)
"""
TINY = """train pairs --workdir run --steps 1 --batch-size 4 --num-samples 1 --eval-every 1 --eval-rows 4
    --model.d-model 8 --model.d-ff 8 --model.num-layers 1 --model.num-heads 2 --model.max-length 64
    --model.mode decoder-only --max-new-tokens 4 --data.tokenizer bytes --data.train pairs.tsv"""
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "open")
# asyncio, which Orbax writes with, wakes itself through a pair of sockets; TensorBoard's file has its host's name
UNCONNECTED = ("socket.__new__", "socket.gethostname")
# matplotlib makes two folders; it lists the machine's fonts, once, and keeps the list in the second
FOLDERS = ("home/.config", "home/.config/matplotlib", "home/.cache", "home/.cache/matplotlib")
PROGRAMS = "home/.cache/transformer_jax"  # compiled, for the next run


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """(its folder, its events) of a run in a process whose home and temporary folder are its own."""
    box = tmp_path_factory.mktemp("audited")
    for name in ("home", "tmp", "here"):
        (box / name).mkdir()
    lines = "".join(f"{d:02}.{m:02}.2001\t2001-{m:02}-{d:02}\n" for d in range(1, 13) for m in range(1, 6))
    (box / "here/pairs.tsv").write_text(lines)
    (box / "here/prompts.txt").write_text("01.02.2001\n<eos><pad>\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL", "JAX_"))}
    env |= {"HOME": str(box / "home"), "TMPDIR": str(box / "tmp"), "PYTHONPATH": str(ROOT)}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", AUDIT, str(box / "log"), *TINY.split()]
    done = subprocess.run(words, cwd=box / "here", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return box, [json.loads(line) for line in (box / "log").read_text().splitlines()]


def test_a_run_reads_no_pickle_and_opens_no_connection_or_process(audited):
    _, events = audited
    assert ["open", "run/config.json.tmp"] in events or any("config.json" in event[1] for event in events)
    kinds = {event for event, *_ in events}
    assert not [kind for kind in kinds if kind.startswith(("pickle.", "urllib.", "http.", "ftplib.", "smtplib."))]
    assert {kind for kind in kinds if kind.startswith("socket.")} <= set(UNCONNECTED)
    processes = [args for event, *args in events if event.startswith(("subprocess.", "os.")) and event not in CHANGES]
    assert {args[0] for args in processes} <= {"fc-list"}


def test_a_run_writes_nothing_outside_of_its_workdir(audited):
    """By what Python asked for, and by what is there afterwards, which is also what libraries wrote past Python."""
    box, events = audited
    allowed = (box / "here/run", box / FOLDERS[-1], box / PROGRAMS)
    for event, *args in events:
        if event in CHANGES:
            for name in args[: 2 if event in ("os.rename", "os.link") else 1]:
                path = Path(os.path.normpath(box / "here" / name))
                inside = any(path.is_relative_to(each) for each in allowed)
                made = event == "os.mkdir" and path in [box / name for name in FOLDERS]
                assert inside or made or name == os.devnull, (event, name)
    files = [path for path in box.rglob("*") if path.is_file()]
    others = [path for path in files if not any(path.is_relative_to(each) for each in allowed)]
    assert sorted(path.relative_to(box).as_posix() for path in others) == ["here/pairs.tsv", "here/prompts.txt", "log"]


# --- in what is said


def test_each_promise_names_a_test_that_is_there():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 5
    for path, name in named:
        assert not name or f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"
