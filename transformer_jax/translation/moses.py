"""Text <-> the tokens of Moses (Koehn et al. 2007), by `sacremoses`; and `transformer-jax moses`, a filter of lines.

What it writes is what `tokenizer.perl -no-escape` of Moses writes, with `--escape` that of `tokenizer.perl`, with
`--aggressive` that of `-a`, and with `--normalize` that of `normalize-punctuation.perl` before it. `--lowercase` comes
first, as in the files of Multi30k that papers score: the German test of 2016 has 12,103 tokens then, as Wu et al. 2021
report, and 12,102 where tokens are lower-cased afterwards. The port differs from Perl's in the colons inside of Finnish
and Swedish words. Special characters stay as they are by default: a model has no use for `&apos;`, and people who read
its output have none either.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError
from transformer_jax.files import check_output, lines_from, lines_of, output_file
from transformer_jax.flags import parse

Change = Callable[[str], str]
CJK = ("ja", "ko")  # which sacremoses knows besides those that it has abbreviations of


@dataclasses.dataclass(frozen=True)
class MosesArguments:
    language: str
    """Of the text: en, de, fr, ... Abbreviations and apostrophes differ."""
    normalize: bool = False
    """Make quotation marks, dashes and spaces plain first, as normalize-punctuation.perl does."""
    lowercase: bool = False
    """Lower-case the text first."""
    aggressive: bool = False
    """Split at hyphens inside of words too: foo @-@ bar, as tokenizer.perl -a does."""
    escape: bool = False
    """Write & | < > ' " [ ] as entities, as tokenizer.perl does where it is not told otherwise. With --detokenize:
    entities become characters again."""
    detokenize: bool = False
    """Make text of tokens instead."""
    input: Path | None = None
    """A file to read, which may be packed (.gz, .zst). None given: stdin."""
    output: Path | None = None
    """Where the lines go. None given: stdout."""

    def __post_init__(self) -> None:
        for name in ("normalize", "lowercase", "aggressive"):
            if self.detokenize and getattr(self, name):
                raise ValueError(f"--{name} is for making tokens, not for --detokenize.")
        if self.output is not None and self.output.suffix in (".gz", ".zst"):
            raise ValueError(f"--output {self.output}: plain text is written; give a name without {self.output.suffix}")


def _sacremoses(language: str) -> Any:
    """The library. Raises InputError where it is not installed, or does not know the language."""
    try:
        import sacremoses
        from sacremoses.corpus import NonbreakingPrefixes
    except ImportError:
        raise InputError('Moses\'s tokens need pip install "transformer_jax[moses]".') from None
    known = sorted({*NonbreakingPrefixes().available_langs.values(), *CJK})
    if language not in known:
        raise InputError(
            f"Moses has no rules for language {language!r}.{nearest(language, known)} It knows {', '.join(known)}; "
            "en is what it takes for others."
        )
    return sacremoses


def version(language: str) -> str:
    """Of the library. Raises InputError as `tokenizing`."""
    return _sacremoses(language).__version__


def tokenizing(
    language: str,
    *,
    normalize: bool = False,
    lowercase: bool = False,
    aggressive: bool = False,
    escape: bool = False,
) -> Change:
    """What makes of a text its tokens, with a space between them; the options are the flags of `transformer-jax moses`.

    Raises:
        InputError: there is no such language, or `sacremoses` is not installed.
    """
    library = _sacremoses(language)
    tokenize = library.MosesTokenizer(language).tokenize
    plain: Change = library.MosesPunctNormalizer(language).normalize if normalize else str

    def change(text: str) -> str:
        text = plain(text.lower() if lowercase else text)
        return tokenize(text, aggressive_dash_splits=aggressive, return_str=True, escape=escape)

    return change


def detokenizing(language: str, *, escape: bool = False) -> Change:
    """What makes of tokens with a space between them a text again, as well as rules can.

    Raises:
        InputError: as `tokenizing`.
    """
    detokenize = _sacremoses(language).MosesDetokenizer(language).detokenize
    return lambda text: detokenize(text.split(), unescape=escape)


def convert(source: Path | None, target: Path | None, change: Change) -> None:
    """Writes a file whose lines are those of another, each changed; one at a time, whatever their number.

    None is stdin, whose lines come out as they come in, or stdout.

    Raises:
        InputError: the file cannot be read, or there is no text in it.
        StorageError: the other cannot be written.
    """
    lines = lines_of(source) if source is not None else lines_from("stdin", sys.stdin.buffer)
    with output_file(target, "--output") if target is not None else contextlib.nullcontext(sys.stdout) as file:
        for line in lines:
            print(change(line), file=file, flush=source is None)


def command_moses(arguments: list[str]) -> int:
    """makes Moses's tokens of text, line by line, or text of them"""
    about = "Makes Moses's tokens of text, line by line, or text of them."
    args = parse(MosesArguments, "transformer-jax moses", arguments, about, switches=True)
    if args.detokenize:
        change = detokenizing(args.language, escape=args.escape)
    else:
        names = ("normalize", "lowercase", "aggressive", "escape")
        change = tokenizing(args.language, **{name: getattr(args, name) for name in names})
    check_output(args.output, "--output", *([args.input] if args.input else []))
    convert(args.input, args.output, change)
    return 0
