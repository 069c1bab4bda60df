"""Every command of the README, of CONTRIBUTING and of docs/ is run, in a folder with stand-ins for the user's files.

A command is a line of a block of shell (``` alone, or bash, sh, console), or in a cell of a table. It runs in this
process as it is written, with those flags of SHRINK added that it does not have. The few that cannot are rows of
SCRIPTS and EXCEPTIONS; the package's own among them are parsed all the same.
"""

import contextlib
import functools
import gzip
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers as tk

from transformer_jax import verify
from transformer_jax.bench import command as bench_command
from transformer_jax.cli import DescribeArguments, parse_run, run_command
from transformer_jax.config import RunConfig
from transformer_jax.data import sources
from transformer_jax.partition import mesh_shape
from transformer_jax.plan import planned_mesh

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
newcomer = importlib.import_module("newcomer")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
SHELL = ("", "bash", "sh", "console", "shell")
CELL = re.compile(r"`((?:python train\.py|transformer-jax|python scripts/)[^`]*)`")

MODEL = "--model.d-model 16 --model.d-ff 16 --model.num-heads 2 --model.num-layers 1 --model.num-encoder-layers 1"
TRAIN = "!--steps 2 --batch-size 2 --num-samples 2 --eval-rows 2 --max-new-tokens 4 --optimizer.warmup-steps 0"
# What a command that begins so is made small with, where it does not say it itself; "!" in front: whatever it says.
SHRINK = {
    r"train .*--init-from": TRAIN,
    r"train": f"{TRAIN} {MODEL}",
    r"compare": f"{TRAIN} {MODEL} !--seeds 1 --jobs 1",
    r"evaluate .*--score": "",
    r"evaluate": "--limit 2",
    r"generate": "--max-new-tokens 4",
    r"describe .*--examples": "--batch-size 2",
    r"sweep": "!--limit 2",
    r"describe|import|export|prepare|verify|bench|report|average|moses|significance|reproduce": "",
}
# Blocks that are programs for other machines, by what they have, and lines that are not run, and why. What is the
# package's own in them is parsed.
SCRIPTS = {
    r"#SBATCH|scontrol": "it needs Slurm",
    r"\bgcloud\b": "it needs Cloud TPU",
    r"\bmpirun\b": "it needs Open MPI",
    r"CUDA_VISIBLE_DEVICES=\$i": "it needs two GPUs; tests/test_job.py runs two processes",
}
EXCEPTIONS = {
    r"pip install": "it installs",
    r"pre-commit install|ruff |pyright|pytest": "checks of the project, not the package's",
    r"python scripts/bench_gpu\.py": "it needs a GPU and PyTorch",
    r"python docs/examples/": "tests/test_examples.py runs them",
    r"cd \S+/checkpoints|sha256sum -c": "a run of 300 steps; tests/test_manifest.py checks what it would",
    r"transformer-jax reproduce .*--data": "hours; tests/test_reproduce.py runs them with smaller models",
    r".*--writers .*wandb": "it needs the extra; tests/test_writers.py has stand-ins",
    r"transformer-jax significance": "outputs after two steps are blank; tests/test_translation.py runs it",
    r"tensorboard --logdir": "it serves until it is stopped",
    r".*--parallel\.mesh": "it needs many devices; tests/test_plan.py and tests/on_devices.py play them",
}


class Block(NamedTuple):
    """Commands that stand together: `where` they do, and all of their text."""

    page: str
    where: str
    text: str

    @property
    def lines(self) -> list[str]:
        """One command each."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        prompts = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in prompts or lines if line.strip() and not line.startswith("#")]


def blocks(path: Path) -> list[Block]:
    """The blocks of shell of a page, and the commands of its tables, one each."""
    text, page, found = path.read_text("utf-8"), path.relative_to(ROOT).as_posix(), []
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if match[1].strip() in SHELL:
            found.append(Block(page, f"{page}:{text[: match.start()].count(chr(10)) + 1}", match[2]))
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("|"):
            found += [Block(page, f"{page}:{number}", command) for command in CELL.findall(line)]
    return found


BLOCKS = [block for path in PAGES for block in blocks(path)]


def reasons(block: Block, command: str) -> list[str]:
    """The rows that a command is not run for."""
    scripts = [row for row in SCRIPTS if re.search(row, block.text)]
    return scripts or [row for row in EXCEPTIONS if re.match(row, command)]


def parts(line: str) -> list[tuple[str, str]]:
    """(command, stdin) of each part of a line between `&&`; what `echo` says is the stdin of what it is piped to."""
    found = []
    for part in re.split(r"\s&&\s", line):
        said, pipe, command = part.rpartition(" | ")
        stdin = " ".join(shlex.split(said)[1:]) + "\n" if pipe and said.startswith("echo ") else ""
        found.append((command.strip(), stdin))
    return found


def own(command: str) -> list[str] | None:
    """The words of a command line of the package, without the program; None where it is none."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # a quote that does not end
        return None
    if words[:2] == ["python", "train.py"]:
        return ["train", *words[2:]]
    return words[1:] if words[:1] == ["transformer-jax"] else None


def shrunk(words: list[str]) -> list[str]:
    """The command with the flags of the first row of SHRINK that fits."""
    row = next(row for row in SHRINK if re.match(row, " ".join(words)))
    pairs = shlex.split(SHRINK[row])
    for flag, value in zip(pairs[::2], pairs[1::2], strict=True):
        name = flag.lstrip("!")
        if flag.startswith("!") and name in words:
            words = [value if before == name else word for before, word in zip(["", *words], words)]
        elif name not in words:
            words = [*words, name, value]
    return words


COMMANDS = [(block, *part) for block in BLOCKS for line in block.lines for part in parts(line)]
RUN = [each for each in COMMANDS if not reasons(*each[:2])]
NOT_RUN = [each for each in COMMANDS if reasons(*each[:2])]


# --- which commands there are


def test_commands_are_found():
    assert len(PAGES) > 5
    assert len(RUN) > 30
    assert ("python train.py pairs --data.train train.en train.de --data.validation val.en val.de", "") in [
        each[1:] for each in RUN if each[0].page == "README.md"
    ]


def test_every_command_is_known():
    """A block without a language is shell; what is none is marked as text."""
    unknown = [f"{block.where}: {command}" for block, command, _ in RUN if own(command) is None]
    assert not unknown, "Mark the block ```text, or add a row with its reason to SCRIPTS or EXCEPTIONS: " + "\n".join(
        unknown
    )
    new = [command for _, command, _ in RUN if not any(re.match(row, " ".join(own(command) or [])) for row in SHRINK)]
    assert not new, "Add to SHRINK what makes them small: " + "\n".join(new)


def test_no_exception_is_left_over():
    found = {row for each in NOT_RUN for row in reasons(*each[:2])}
    assert found == {*SCRIPTS, *EXCEPTIONS}, "Take out those that are not in the pages."


OURS = re.compile(r"(?:python train\.py|transformer-jax (?:train|describe)) ([^>&|'\n]*)")
UNSAID = {"coordinator": "localhost:1", "SIZE": "2", "N": "2"}  # what shell variables are; the others are 0
DEVICES = {"data=2,fsdp=2,tensor=2": 8}


@pytest.mark.parametrize(
    "text",
    sorted({match for block, _, _ in NOT_RUN for line in block.lines for match in OURS.findall(line)}),
)
def test_what_is_not_run_is_parsed(text):
    """And its mesh is one of as many devices as it is for."""
    text = re.sub(r"\$\{?(\w+)\}?", lambda match: UNSAID.get(match[1].rpartition("_")[2], "0"), text)
    words, plan = shlex.split(text, comments=True), "--devices" in text
    run = parse_run(words, "describe" if plan else "train", DescribeArguments if plan else RunConfig)
    if plan:
        assert planned_mesh(run, run.devices)
    elif run.parallel.mesh in DEVICES:
        assert mesh_shape(run.parallel, DEVICES[run.parallel.mesh])


def test_the_newcomer_s_script_reads_the_readme():
    """Its first line of shell, and its first `generate`, which reads what that one trains."""
    first, generate = newcomer.first_commands((ROOT / "README.md").read_text("utf-8"))
    assert first == ["pip install -e .", "python train.py"]
    (command, stdin) = parts(generate)[0]
    assert parse_run([]).workdir in (own(command) or [])
    assert stdin.startswith("Donnerstag, 2. April 2020")


# --- they are run

DAYS = [(f"{day:02}.{month:02}.2001", f"2001-{month:02}-{day:02}") for month in range(1, 13) for day in range(1, 13)]
TEXT = "the cat sat on the mat. a dog saw it. " * 60


def sides(name: str, left: str, right: str) -> dict[str, str]:
    return {f"{name}.{end}": "".join(pair[i] + "\n" for pair in DAYS) for i, end in enumerate((left, right))}


FILES = {
    **sides("train", "en", "de"),
    **sides("val", "en", "de"),
    **sides("test", "en", "de"),
    **{
        f"{name}.gz": text
        for each in ("train", "val", "test_2016_flickr")
        for name, text in sides(each, "en", "de").items()
    },
    **{name: "".join(f"{t}\n" for _, t in DAYS) for name in ("one.de", "other.de")},
    "train.tsv": "".join(f"{s}\t{t}\n" for s, t in DAYS),
    "test.tsv": "".join(f"{s}\t{t}\n" for s, t in DAYS),
    "prompts.txt": "".join(f"{s}\n" for s, _ in DAYS[:3]),
    "my.txt": TEXT,
    "tinyshakespeare.txt": TEXT,
    "texts/one.txt": TEXT,
    "texts/two.txt": TEXT,
    "books/one.txt": TEXT,
    "web.jsonl": json.dumps({"text": TEXT}) + "\n",
    "law.jsonl": json.dumps({"text": TEXT}) + "\n",
}
# Runs and folders that users have made before, by the command that makes them.
MADE = {
    "runs/dates": "train dates",
    "runs/dates-decoder-only": "train dates --model.mode decoder-only",
    "runs/pairs": "train pairs --data.train train.en train.de --checkpoint.every 1",
    "runs/text": "train text --data.train my.txt",
    "runs/tuned": "train pairs --init-from t5-small --data.train train.tsv --workdir runs/tuned",
    "runs/adapted": "train pairs --init-from t5-small --data.train train.tsv --workdir runs/adapted "
    "--tuning.lora attention/(query|value)=8",
    "shards": "prepare shards --data texts/ --tokenizer bpe --tokenizer-size 300",
}


def published(folder: Path) -> None:
    """A folder that `transformers` has saved, of a tiny T5 with random weights, and a tokenizer of letters."""
    shutil.copytree(ROOT / "tests/fixtures/t5", folder)
    letters = ["<pad>", "</s>", "<unk>", *sorted({*"".join(s + t for s, t in DAYS)})]
    model = tk.models.WordLevel({letter: number for number, letter in enumerate(letters)}, "<unk>")
    tokenizer = tk.Tokenizer(model)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tk.decoders.Fuse()
    tokenizer.add_special_tokens(letters[:3])
    tokenizer.post_processor = tk.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def call(words: list[str], stdin: str = "") -> tuple[int, str]:
    """(exit status, stdout and stderr) of a command line in this process."""
    out, before = io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = run_command(words)
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdin = before
    return status, out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a user, and a function that has what MADE names made there, once."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    for name in ("path/to/t5-small", "t5-small"):
        published(folder / name)
    with contextlib.chdir(folder):

        @functools.cache
        def make(name: str) -> Path:
            status, said = call(shrunk(MADE[name].split()))
            assert status == 0, said
            shutil.move(name, folder / "made" / name.replace("/", "-"))
            return folder / "made" / name.replace("/", "-")

        (folder / "made").mkdir()
        yield folder, make


@pytest.fixture
def quick(monkeypatch):
    """Few dates; and benchmarks and `verify`, which have tests of their own, have measured already."""
    pairs = sources.EMBEDDED["dates"]
    monkeypatch.setitem(sources.EMBEDDED, "dates", functools.cache(lambda: [each.take(slice(60)) for each in pairs()]))
    monkeypatch.setattr(verify, "simulate", lambda devices: None)
    monkeypatch.setattr(verify, "CHECKS", [verify.Check("same", "one device", 1, lambda _: {"loss": 0.0})])
    benchmark = bench_command.benchmark

    def measured(name: str):
        module = benchmark(name)
        result = json.loads((ROOT / f"docs/bench-{name}.json").read_text())
        monkeypatch.setattr(module, "run", lambda *_, **__: result)
        return module

    monkeypatch.setattr(bench_command, "benchmark", measured)


def ids(page: str) -> str:
    return page.replace("/", "-")


def run_all(chosen: list[tuple[Block, str, str]], made) -> None:
    """Runs commands in order, each once, here, with what `made` has."""
    folder, make = made
    for path in folder.iterdir():
        if path.name != "made":
            Path(path.name).symlink_to(path)
    trained, done = {}, set()
    for block, command, stdin in chosen:
        words = own(command)
        if words is None or command in done:
            continue
        done.add(command)
        if words[0] == "train" and "--help" not in words:
            workdir = parse_run(words[1:]).workdir
            if trained.get(workdir, block.where) != block.where:
                shutil.rmtree(workdir)
            trained[workdir] = block.where
        for word in words[1:]:
            if word in MADE and not Path(word).exists() and words[0] not in ("train", "prepare"):
                shutil.copytree(make(word), word)
        status, said = call(shrunk(words), stdin)
        assert status == 0, f"{block.where}: {command}\n{said}"


SLOW = re.compile("transformer-jax compare")  # trains several models
QUICK = [each for each in RUN if not SLOW.match(each[1])]


@pytest.mark.long
@pytest.mark.parametrize("page", sorted({block.page for block, *_ in QUICK}), ids=ids)
def test_the_commands_of_a_page_do_what_they_say(page, made, quick, tmp_path, monkeypatch):
    """Each with status 0. A later command of a page has what earlier ones have made; what nobody has made is from MADE;
    what another block has trained in a folder makes room for this one's."""
    monkeypatch.chdir(tmp_path)
    run_all([each for each in QUICK if each[0].page == page], made)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command, _ in RUN if SLOW.match(command)}))
def test_a_slow_command_does_what_it_says(command, made, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_all([each for each in RUN if each[1] == command], made)
