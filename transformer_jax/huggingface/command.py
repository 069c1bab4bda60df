"""`transformer-jax import` and `transformer-jax export`: published weights as a run, and a run as published weights."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from transformer_jax.config_model import Mode
from transformer_jax.errors import InputError
from transformer_jax.flags import RunFolder, parse
from transformer_jax.folders import check_new, made_whole

if TYPE_CHECKING:
    from transformer_jax.run import Run


@dataclasses.dataclass(frozen=True)
class ImportArguments:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """What `transformers` has saved: config.json, weights in safetensors, tokenizer.json or a SentencePiece model."""
    run: RunFolder
    """The run's folder that is made."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a SentencePiece model (.model, .spm), where the folder has none."""
    source_language: str | None = None
    """Of a model of many languages, that of prompts, as its tokenizer names it (eng_Latn, en_XX, en)."""
    target_language: str | None = None
    """The same of its answers."""
    mode: Annotated[Mode | None, tyro.conf.arg(name="as")] = None
    """Make a model of this mode of it. Of a decoder-only model an encoder-decoder: the encoder begins as the decoder,
    cross-attention as self-attention. Of an encoder-decoder its decoder without cross-attention. Both want training."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    run: RunFolder
    """A run's folder."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder that is made, for `transformers` to load."""
    family: str = ""
    """The model_type, such as llama. None given: the first whose models are like the run's."""
    adapter: bool = False
    """Save LoRA's adapters alone, for PEFT. Else they are merged into the model."""
    checkpoint: str = "newest"
    """The checkpoint to read: newest, best (as --checkpoint.best of the run says), or a step."""


def command_import(arguments: list[str]) -> int:
    """makes a run of published weights: import FOLDER RUN"""
    args = parse(ImportArguments, "transformer-jax import", arguments, "Makes a run of published weights.")
    from transformer_jax.data.load import check_vocabulary
    from transformer_jax.data.tokenizer import load_tokenizer
    from transformer_jax.host import prepare
    from transformer_jax.huggingface.run import load_huggingface
    from transformer_jax.huggingface.surgery import turned
    from transformer_jax.run import save_run

    prepare()
    folder = check_new(args.run, "import")
    run = load_huggingface(args.source)
    special = run.config.data.special
    if args.tokenizer is not None:
        run = dataclasses.replace(run, tokenizer=load_tokenizer(args.tokenizer, special=special.ids))
    if run.tokenizer is None:
        raise InputError(f"{args.source}: there is no tokenizer.json, nor a SentencePiece model. Give --tokenizer.")
    run = _speaking(run, args)
    if args.mode is not None:
        run = turned(run, args.mode)
    check_vocabulary(run.config.model, run.tokenizer, run.config.data.special)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, workdir=str(folder)))
    with made_whole(folder) as work:
        save_run(work, run, {"imported": str(args.source)})
    if args.tokenizer is None and (Path(args.source) / "target.spm").exists():
        print("Targets would be cut by source.spm here: right for generate, while training wants target.spm.")
    print(f"{folder}: {_summary(run)}. Next: transformer-jax generate {folder}, or train --init-from {folder}.")
    return 0


def _speaking(run: "Run", args: ImportArguments) -> "Run":
    """The run with the languages that are asked for."""
    from transformer_jax.data.tokenizer import tokenizer_of
    from transformer_jax.huggingface.tokenizer import language_token, with_language

    special, text, names = run.config.data.special, run.tokenizer.to_json(), run.tokenizer.inner.get_vocab()
    if args.source_language is not None:
        text = with_language(text, language_token(names, args.source_language, "--source-language"), also=False)
    if args.target_language is not None:
        name = language_token(names, args.target_language, "--target-language")
        if name.startswith(">>"):  # Marian reads it in front of the source
            text = with_language(text, name, also=True)
        else:
            special = dataclasses.replace(special, first=names[name])
    data = dataclasses.replace(run.config.data, special=special)
    config = dataclasses.replace(run.config, data=data)
    return dataclasses.replace(run, config=config, tokenizer=tokenizer_of(text, special=special.ids))


def _summary(run: "Run") -> str:
    import jax

    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    return f"{run.config.model.mode}, {count:,} parameters, {run.tokenizer.size:,} tokens"


def command_export(arguments: list[str]) -> int:
    """saves a run for `transformers` to load: export RUN FOLDER"""
    about = "Saves a run for `transformers` to load."
    args = parse(ExportArguments, "transformer-jax export", arguments, about, switches=True)
    from transformer_jax.host import prepare
    from transformer_jax.huggingface.adapters import write_adapters
    from transformer_jax.huggingface.run import family_of, save_huggingface
    from transformer_jax.run import load_run

    prepare()
    folder = check_new(args.target, "export")
    run = load_run(args.run, args.checkpoint)
    family = family_of(run, args.family)
    with made_whole(folder) as work:
        if args.adapter:
            write_adapters(work, family, run)
        else:
            save_huggingface(work, run, family)
    what = "adapters alone, of " if args.adapter else ""
    print(f"{folder}: {what}{family}, {_summary(run)}, step {run.step}.")
    return 0
