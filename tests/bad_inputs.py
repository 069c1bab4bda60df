"""Bad inputs: command lines and files, and what the one message about each says. Also those that must work.

A `train pairs` or `train text` row gets a small model's flags, pairs.tsv and the workdir `new` before its own. RUN is a
finished run of pairs, decoder-only; RUNS/... are copies of it with damage; all else are FILES.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import NamedTuple


class Bad(NamedTuple):
    """A command line cut as a shell does, what its message says, its exit status and its stdin."""

    line: str
    says: str
    status: int = 2
    stdin: bytes = b""


PAIRS = "".join(f"{d:02}.{m:02}.2001\t2001-{m:02}-{d:02}\n" for d in range(1, 13) for m in range(1, 11))
TEXT = "the cat sat on the mat. a dog saw it. "
GZIP = gzip.compress(TEXT.encode() * 9)


def config(**values):
    return json.dumps(values)


def tokenizer(**model):
    return json.dumps({"version": "1.0", "model": model})


FILES = {
    "pairs.tsv": PAIRS,
    "text.txt": TEXT * 60,
    "keep.txt": "what was here before\n",
    # data
    "few.txt": "a few words",
    "empty.txt": "",
    "blank.txt": "\n \n\t\n",
    "bom.txt": "\ufeff",
    "latin.txt": b"one\ntwo\ncaf\xe9 au lait\n",
    "utf16.txt": TEXT.encode("utf-16"),
    "one.txt": "1\n",
    "two.txt": "1\n2\n",
    "letter.txt": "x",
    "fifty.txt": "a\n" * 50,
    "fifty-blank.txt": "\n" * 50,
    "long.txt": "a short one\n" + "x" * 99 + "\n",
    "cut.txt.gz": GZIP[:-9],
    "flipped.txt.gz": GZIP[:20] + bytes([GZIP[20] ^ 255]) + GZIP[21:],
    "not.txt.gz": "not packed",
    "bomb.jsonl.gz": gzip.compress(bytes(2**20)) * 300,
    "three.tsv": "a\tb\na\tb\tc\n",
    "one-field.tsv": "a\tb\nno tab here\n",
    "no-targets.tsv": "a\t\nb\t\n",
    "long.tsv": "a\tb\n" + "x" * 80 + "\ty\n",
    "cut.jsonl": '{"text": "a"}\n{"text": "b',
    "list.jsonl": '["text"]\n',
    "deep.jsonl": "[" * 20_000,
    "digits.jsonl": '{"text": 1' + "0" * 5000 + "}\n",
    "number.jsonl": '{"text": "a"}\n{"text": 5}\n',
    "null.jsonl": '{"source": "a", "target": null}\n',
    "half.jsonl": '{"source": "a"}\n',
    "other.jsonl": '{"text": "a"}\n\n{"txt": "b"}\n',
    "surrogate.jsonl": '{"text": "a"}\n{"text": "\\ud800b"}\n',
    "both.jsonl": '{"text": "a"}\n{"source": "a", "target": "b"}\n',
    "blank.jsonl": '{"text": "", "id": "7"}\n' * 50,
    "mixed/a.txt": "a text",
    "mixed/b.jsonl": '{"source": "a", "target": "b"}\n',
    "docs/readme.md": "no data",
    "published/config.json": config(model_type="llama"),
    # configs
    "unknown.json": config(stpes=3),
    "deeper.json": config(num_layers=3),
    "inner.json": config(model={"num_layer": 3}),
    "twice.json": '{"steps": 3, "steps": 4}',
    "twice-inner.json": '{"model": {"d_model": 64, "d_model": 32}}',
    "nothing.json": "",
    "cut.json": '{"steps": 3, "model": {',
    "list.json": "[1, 2, 3]",
    "deep.json": "[" * 20_000 + "]" * 20_000,
    "deep-field.json": '{"recipe": ' + "[" * 800 + "]" * 800 + "}",
    "binary.json": bytes(range(256)) * 8,
    "large.json": '{"steps":' + " " * 2**20 + "3}",
    "quoted.json": config(steps="3"),
    "float.json": config(steps=1e3),
    "bool.json": config(batch_size=True),
    "null.json": config(model=None),
    "gated.json": config(model={"gated": 1}),
    "nan.json": '{"optimizer": {"learning_rate": NaN}}',
    "inf.json": '{"optimizer": {"learning_rate": 1e999}}',
    "64-bits.json": config(steps=2**70),
    "400-digits.json": config(optimizer={"learning_rate": 10**400}),
    "5000-digits.json": '{"steps": 1' + "0" * 5000 + "}",
    "target.json": config(_target_="os.system", args=["touch canary"]),
    "import.json": config(optimizer={"name": "evil_module.Optimizer"}),
    "path.json": config(data={"train": "pairs.tsv"}),
    "nul.json": config(data={"train": ["a\0b"]}),
    "lone.json": config(data={"train": ["a\ud800b"]}),
    "climb.json": config(recipe="../../elsewhere", data={"train": ["pairs.tsv"]}),
    # tokenizers
    "tokenizers/cut.json": tokenizer(type="BPE", vocab={"a": 0}, merges=[])[:40],
    "tokenizers/nothing.json": "",
    "tokenizers/gap.json": tokenizer(type="BPE", vocab={"a": 0, "b": 99}, merges=[]),
    "tokenizers/far.json": tokenizer(type="WordLevel", vocab={"a": 0, "b": 2**31}, unk_token="a"),
    "tokenizers/same.json": tokenizer(type="BPE", vocab={"a": 0, "b": 0, "c": 1}, merges=[]),
    "tokenizers/type.json": tokenizer(type="Neural", vocab={"a": 0}, layers=3),
    "tokenizers/fields.json": tokenizer(type="BPE"),
    "tokenizers/unknown.json": tokenizer(type="WordLevel", vocab={"a": 0}, unk_token="zz"),
    "tokenizers/config.json": config(steps=3),
    "tokenizers/panic.json": tokenizer(
        type="BPE", vocab={"a": 0, "b": 1, "ab": 2}, merges=[["a", "b"]], continuing_subword_prefix="longer"
    ),
    "tokenizers/good.json": tokenizer(type="WordLevel", vocab={"a": 0, "b": 1, "c": 2}, unk_token="a"),
}

TRAIN = [
    Bad("train datse", "Unknown recipe 'datse'. Did you mean 'dates'?"),
    Bad("train pairs dates", "pairs.*'dates'|Unrecognized options: dates"),
    Bad("train dates text", r"Give one recipe \(dates\), then flags; got 'text'"),
    Bad("train RUN", "takes a recipe, not a folder.*--config RUN/config.json"),
    Bad("train pairs stray", "Unrecognized options: stray"),
    Bad("train pairs --recipe text", "--recipe only names a run.*train text"),
    # flags
    Bad("train pairs --model.num-haeds 2", "num-haeds.*Perhaps you meant.*--model.num-heads"),
    Bad("train pairs --num-layers 2", "--num-layers.*--model.num-layers"),
    Bad("train pairs --steps 1e3", "--steps '1e3' must be a whole number"),
    Bad("train pairs --steps", "Missing value for argument '--steps'"),
    Bad("train pairs --steps -1", "steps=-1 must be at least 1"),
    Bad("train pairs --steps 9999999999", "steps=9999999999 must be at most 2147483647"),
    Bad("train pairs --seed 1180591620717411303424", "seed=1180591620717411303424 must be at most 4294967295"),
    Bad("train pairs --seed=-1", "seed=-1 must be at least 0"),
    Bad("train pairs --batch-size 2.5", "--batch-size '2.5' must be a whole number"),
    Bad("train pairs --batch-size 0", "batch_size=0 must be at least 1"),
    Bad("train pairs --batch-size 99999999", "[0-9]+ rows, fewer than batch_size=99999999"),
    Bad("train pairs --optimizer.accumulate 3", "batch_size=4 must be a multiple of optimizer.accumulate=3"),
    Bad("train pairs --optimizer.warmup-steps 7", "warmup_steps=7 must not exceed steps=1"),
    Bad("train pairs --optimizer.learning-rate nan", "learning_rate=nan must be a finite number"),
    Bad("train pairs --optimizer.learning-rate 1e999", "learning_rate=inf must be a finite number"),
    Bad("train pairs --optimizer.learning-rate -1", "learning_rate=-1.0 must be at least 0"),
    Bad("train pairs --optimizer.eps 0", "eps=0.0 must be at least 1e-30"),
    Bad("train pairs --optimizer.learning-rate fast", "--optimizer.learning-rate 'fast' must be a finite number"),
    Bad("train pairs --optimizer.name adamm", "--optimizer.name 'adamm'.*Did you mean 'adamw'"),
    Bad("train pairs --optimizer.name=LION", "'LION' must be one of.*Did you mean 'lion'"),
    Bad("train pairs --model.mode encoder-decodr", "'encoder-decodr'.*Did you mean 'encoder-decoder'"),
    Bad("train pairs --model.gated true", "--model.gated 'true' must be one of True, False. Did you mean 'True'"),
    Bad("train pairs --model.dtype float17", "--model.dtype 'float17'.*Did you mean"),
    Bad("train pairs --model.dropout-rate 1", r"dropout_rate=1.0 must lie in \[0, 1\)"),
    Bad("train pairs --loss.label-smoothing 1.5", "label_smoothing=1.5"),
    Bad("train pairs --stop-after 3", "stop_after='3' must be a time such as"),
    Bad("train pairs --checkpoint.every 0", "every=0 must be at least 1"),
    Bad("train pairs --data.train a b c", "data.train takes one path, or two parallel files; got 3"),
    # models
    Bad("train pairs --model.num-heads 3", "d_model=16 must be a multiple of num_heads=3.*try num_heads=1"),
    Bad("train pairs --model.d-model 1000000000", "d_model=1000000000.*GB of memory"),
    Bad("train pairs --model.vocab-size 2147483647", "vocab_size=2147483647.*GB of memory"),
    Bad("train pairs --model.vocab-size 99999999999999", "vocab_size=99999999999999 must be at most"),
    Bad("train pairs --model.num-layers 1000000", "num_layers=1000000 must be at most 10000"),
    Bad("train pairs --model.windows 99999999999999999999", "windows=.* must be at most 2147483647"),
    Bad("train pairs --model.vocab-size 5", r"model.vocab_size=5 is smaller than the tokenizer's \d+"),
    Bad("train pairs --model.max-length 9", "pairs are longer than a row; the first is pairs.tsv, line 1 .*=9"),
    Bad(
        "train text --model.mode encoder-decoder --data.train text.txt --model.max-length 2", "max_length is too small"
    ),
    # devices
    Bad("train pairs --parallel.strategy mehs", "'mehs'.*Did you mean 'mesh'"),
    Bad("train pairs --parallel.mesh dta=2", "mesh='dta=2'.*Did you mean 'data'"),
    Bad("train pairs --parallel.mesh data=0", "mesh='data=0': the size of data must be a whole number"),
    Bad("train pairs --parallel.mesh data=2,data=2", "names data twice"),
    Bad("train pairs --parallel.strategy mesh --parallel.mesh data=64", "mesh='data=64' needs 64 devices"),
    Bad("train pairs --parallel.coordinator here", "coordinator='here'"),
    # tokenizers
    Bad("train pairs --data.tokenizer chra", "data.tokenizer='chra'.*Did you mean 'char'"),
    Bad("train pairs --data.tokenizer missing.json", "missing.json: no such file"),
    Bad("train pairs --data.tokenizer docs", "docs: cannot be read .it is a folder"),
    Bad("train pairs --data.tokenizer tokenizers/cut.json", "tokenizers/cut.json: not a tokenizer.json.*EOF"),
    Bad("train pairs --data.tokenizer tokenizers/nothing.json", "tokenizers/nothing.json: not a tokenizer.json"),
    Bad("train pairs --data.tokenizer tokenizers/gap.json", "gap.json: not.*2 tokens have ids up to 99"),
    Bad("train pairs --data.tokenizer tokenizers/far.json", "far.json: not.*2 tokens have ids up to 2,147,483,648"),
    Bad("train pairs --data.tokenizer tokenizers/same.json", "same.json: not.*two tokens have the same id"),
    Bad("train pairs --data.tokenizer tokenizers/type.json", "type.json: not a tokenizer.json"),
    Bad("train pairs --data.tokenizer tokenizers/fields.json", "fields.json: not a tokenizer.json.*vocab"),
    Bad("train pairs --data.tokenizer tokenizers/unknown.json", "unknown.json: not.*cannot encode a text"),
    Bad("train pairs --data.tokenizer tokenizers/config.json", "config.json: not a tokenizer.json"),
    Bad("train pairs --data.tokenizer tokenizers/panic.json", "panic.json: not.*out of range"),
    Bad("train pairs --data.tokenizer tokenizers/good.json --model.vocab-size 2", "vocab_size=2 is smaller"),
    Bad("train pairs --data.tokenizer bpe --data.tokenizer-size 99", "tokenizer_size=99 is too small for bpe"),
    Bad("train pairs --data.tokenizer bpe --data.tokenizer-size 2147483647", "tokenizer_size=2147483647 must be at m"),
    # data
    Bad("train pairs --data.train", "This recipe needs data: give --data.train"),
    Bad("train pairs --data.train ''", "An empty path names no data"),
    Bad("train pairs --data.train missing.tsv", "missing.tsv: no such file"),
    Bad("train pairs --data.train pairs.tsv/x", "pairs.tsv/x: cannot be read"),
    Bad("train pairs --data.train /dev/zero", "/dev/zero: cannot be read .it is a device"),
    Bad("train pairs --data.train *.rst", r"\*.rst: no file matches"),
    Bad("train pairs --data.train docs", "docs: the folder has no .txt or .jsonl or .parquet file"),
    Bad("train pairs --data.train nowhere/", "nowhere: no such file"),
    Bad("train pairs --data.train mixed", "mixed: holds both plain texts and pairs"),
    Bad("train pairs --data.train empty.txt", "empty.txt: the file is empty"),
    Bad("train pairs --data.train blank.txt", "blank.txt: only blank lines"),
    Bad("train pairs --data.train bom.txt", "bom.txt: the file is empty"),
    Bad("train pairs --data.train letter.txt", "single example"),
    Bad("train pairs --data.train latin.txt", r"latin.txt: byte 11 \(line 3\) is not valid UTF-8: found 0xe9"),
    Bad("train pairs --data.train utf16.txt", r"utf16.txt: byte 0 \(line 1\) is not valid UTF-8"),
    Bad("train text --data.train few.txt", "rows, fewer than batch_size=4"),
    Bad("train pairs --data.train cut.txt.gz", "cut.txt.gz: cannot be read"),
    Bad("train pairs --data.train flipped.txt.gz", "flipped.txt.gz: cannot be read"),
    Bad("train pairs --data.train not.txt.gz", "not.txt.gz: cannot be read .Not a gzipped file"),
    Bad("train pairs --data.train bomb.jsonl.gz", "bomb.jsonl.gz: its [0-9,]+ bytes unpack to .* the limit of 200"),
    Bad("train pairs --data.train one.txt two.txt", "line 2 of two.txt is the first without a partner in one.txt"),
    Bad("train pairs --data.train fifty.txt fifty-blank.txt", "fifty-blank.txt: only blank lines"),
    Bad("train pairs --data.train text.txt docs", "docs: cannot be read"),
    Bad("train pairs --data.validation text.txt", "--data.train holds pairs and --data.validation holds text"),
    Bad("train pairs --data.validation missing.tsv", "missing.tsv: no such file"),
    Bad("train pairs --data.objective causal", "data.objective='causal' does not go with data that is pairs"),
    Bad("train pairs --data.train three.tsv", "three.tsv, line 2: .*one tab.*3 fields"),
    Bad("train pairs --data.train one-field.tsv", "one-field.tsv, line 2: .*one tab.*1 fields"),
    Bad("train pairs --data.train no-targets.tsv", "no-targets.tsv: only blank targets"),
    Bad("train pairs --data.train cut.jsonl", "cut.jsonl, line 2: not a JSON object"),
    Bad("train pairs --data.train list.jsonl", "list.jsonl, line 1: expected an object"),
    Bad("train pairs --data.train deep.jsonl", "deep.jsonl, line 1: not a JSON object"),
    Bad("train pairs --data.train digits.jsonl", "digits.jsonl, line 1: not a JSON object"),
    Bad("train pairs --data.train number.jsonl", "number.jsonl, line 2: field 'text' must be a string; got 5"),
    Bad("train pairs --data.train null.jsonl", "null.jsonl, line 1: field 'target' must be a string"),
    Bad("train pairs --data.train half.jsonl", "half.jsonl, line 1: expected an object"),
    Bad("train pairs --data.train other.jsonl", "other.jsonl, line 3: expected an object"),
    Bad("train pairs --data.train surrogate.jsonl", "surrogate.jsonl, line 2: .*lone surrogate"),
    Bad("train pairs --data.train both.jsonl", "both.jsonl, line 2: has other fields"),
    Bad("train pairs --data.train blank.jsonl", "blank.jsonl: only blank texts"),
    # folders
    Bad("train pairs --workdir keep.txt", "--workdir keep.txt: cannot be used"),
    Bad("train pairs --workdir keep.txt/run", "--workdir keep.txt/run: cannot be used"),
    Bad(
        "train pairs --workdir RUN --model.d-ff 64 --seed 3",
        "RUN holds a run with another.*seed: 0 -> 3; .*d_ff: 32 -> 64",
    ),
    Bad("train pairs --workdir RUNS/config-alone", "RUNS/config-alone/config.json: the config is not JSON"),
    # configs
    Bad("train --config", "--config needs a file"),
    Bad("train pairs --config RUN/config.json", r"recipe \(pairs\) or --config, not both"),
    Bad("train --config RUN/config.json --config RUN/config.json", "give one file, not several"),
    Bad("train --config missing.json", "missing.json: no such file"),
    Bad("train --config docs", "docs: cannot be read .it is a folder"),
    Bad("train --config unknown.json", "unknown.json: unknown field 'stpes'. Did you mean 'steps'?"),
    Bad("train --config deeper.json", "unknown field 'num_layers'. Did you mean 'model.num_layers'?"),
    Bad("train --config inner.json", "inner.json, model: unknown field 'num_layer'. Did you mean 'num_layers'?"),
    Bad("train --config twice.json", "twice.json: .*'steps' is given more than once"),
    Bad("train --config twice-inner.json", "'d_model' is given more than once"),
    Bad("train --config nothing.json", "nothing.json: the config is not JSON"),
    Bad("train --config cut.json", "cut.json: the config is not JSON .*line 1"),
    Bad("train --config list.json", r"list.json: expected an object with the fields of RunConfig; got \[1, 2, 3\]"),
    Bad("train --config deep.json", "deep.json: the config is not JSON .*recursion"),
    Bad("train --config deep-field.json", "deep-field.json: recipe=.* must be text"),
    Bad("train --config binary.json", "binary.json: byte 128 .line 2. is not valid UTF-8"),
    Bad("train --config large.json", "large.json: larger than 1,048,576 bytes"),
    Bad("train --config quoted.json", "quoted.json: steps='3' must be a whole number"),
    Bad("train --config float.json", "float.json: steps=1000.0 must be a whole number"),
    Bad("train --config bool.json", "bool.json: batch_size=True must be a whole number"),
    Bad("train --config null.json", "null.json, model: expected an object"),
    Bad("train --config gated.json", "gated.json, model: gated=1 must be true or false"),
    Bad("train --config nan.json", "nan.json, optimizer: learning_rate=nan must be a finite number"),
    Bad("train --config inf.json", "inf.json, optimizer: learning_rate=inf must be a finite number"),
    Bad("train --config 64-bits.json", "64-bits.json: steps=1180591620717411303424 must be at most"),
    Bad("train --config 400-digits.json", "400-digits.json, optimizer: learning_rate=10.* must be a finite number"),
    Bad("train --config 5000-digits.json", "5000-digits.json: the config is not JSON"),
    Bad("train --config target.json", "target.json: unknown field '_target_'"),
    Bad("train --config import.json", "import.json, optimizer: name='evil_module.Optimizer' must be one of"),
    Bad("train --config path.json", "path.json, data: train='pairs.tsv' must be a list of texts"),
    Bad("train --config nul.json", "nul.json, data: train=.* must not hold a NUL"),
    Bad("train --config lone.json", "lone.json, data: train=.* lone surrogate"),
    Bad("train --config climb.json", "recipe='../../elsewhere' cannot name a folder"),
]
GENERATE = [
    Bad("generate", "Missing from transformer-jax generate.*RUN"),
    Bad("generate docs --prompt a", "docs: not a run's folder.*config.json"),
    Bad("generate pairs.tsv --prompt a", "pairs.tsv: not a run's folder"),
    Bad("generate nowhere/run --prompt a", "nowhere/run: not a run's folder"),
    Bad("generate RUNS/no-config --prompt a", "RUNS/no-config: not a run's folder.*no config.json"),
    Bad("generate RUNS/no-tokenizer --prompt a", "RUNS/no-tokenizer: not a run's folder.*no tokenizer.json"),
    Bad("generate RUNS/no-checkpoints --prompt a", "RUNS/no-checkpoints: not a run's folder.*no checkpoints"),
    Bad("generate RUNS/config-cut --prompt a", "RUNS/config-cut/config.json: the config is not JSON"),
    Bad("generate RUNS/all-cut --prompt a", "RUNS/all-cut/checkpoints: no checkpoint can be used", 3),
    Bad("generate RUN extra", "Unrecognized options: extra"),
    Bad("generate RUN --promt a", "--promt.*Perhaps you meant.*--prompt"),
    Bad("generate RUN --prompt a --input pairs.tsv", "Give --prompt or --input, not both"),
    Bad("generate RUN --prompt a --beam-size 0", "beam-size=0 must be at least 1"),
    Bad("generate RUN --prompt a --num-return 0", "num-return=0 must be at least 1"),
    Bad("generate RUN --prompt a --length-penalty nan", "length-penalty=nan must be finite"),
    Bad("generate RUN --prompt a --temperature nan", "temperature=nan must be at least"),
    Bad("generate RUN --prompt a --temperature 0", "temperature=0.0 must be at least"),
    Bad("generate RUN --prompt a --temperature 1e-40", "temperature=1e-40 must be at least"),
    Bad("generate RUN --prompt a --temperature warm", "--temperature 'warm' must be a finite number"),
    Bad("generate RUN --prompt a --top-k -3", "top-k=-3 must be at least 1"),
    Bad("generate RUN --prompt a --top-p 1.5", r"top-p=1.5 must lie in \(0, 1\]"),
    Bad("generate RUN --prompt a --max-new-tokens 0", "max-new-tokens=0 must be at least 1"),
    Bad("generate RUN --prompt a --max-new-tokens 1.5", "--max-new-tokens '1.5' must be a whole number"),
    Bad("generate RUN --max-new-tokens 1000000", "--max-new-tokens 1000000 must be below the model's max_length=64"),
    Bad("generate RUN --prompt abc --max-new-tokens 60", "--prompt: 5 tokens, and 60 new ones.*max_length=64"),
    Bad("generate RUN --prompt a --seed 99999999999", "seed=99999999999"),
    Bad("generate RUN --prompt a --min-p 0", r"min-p=0.0 must lie in \(0, 1\]"),
    Bad("generate RUN --prompt a --repetition-penalty -1", "repetition-penalty=-1.0 must be above 0"),
    Bad("generate RUN --prompt a --num-return 3", "num-return=3 needs a beam-size of as many, or drawing"),
    Bad("generate RUN --prompt a --num-return 3 --beam-size 2", "num-return=3 needs a beam-size.*beam-size=2"),
    Bad("generate RUN --prompt a --beam-size 2 --top-p 0.5", "beam-size=2 takes the likeliest.*top-p=0.5 draws"),
    Bad(
        "generate RUN --prompt a --beam-size 2 --repetition-penalty 2", "repetition-penalty=2.0 is not for a beam-size"
    ),
    Bad("generate RUN --prompt a --draft docs", "docs: not a run's folder"),
    Bad("generate RUN --prompt a --draft RUN --beam-size 2", "draft=RUN is not for a beam-size"),
    Bad("generate RUN --prompt a --draft-tokens 0", "draft-tokens=0 must be at least 1"),
    Bad(f"generate RUN --prompt a --prefix {'x' * 70}", "--prompt: .*max_length=64"),
    Bad("generate RUN --prompt a --parallel.strategy pmap", "generate takes --parallel.strategy jit or mesh"),
    Bad(
        "generate RUN --prompt a --parallel.strategy mesh --parallel.mesh tensor=3", "parallel.mesh='tensor=3' needs 3"
    ),
    Bad("evaluate RUN --data pairs.tsv --score --limit 3", "--score is for all given targets"),
    Bad("evaluate RUN --data text.txt --score", "--data holds text, and the run was trained on pairs"),
    Bad("evaluate RUN --data pairs.tsv --beam-size 0", "beam-size=0 must be at least 1"),
    Bad("bench", "bench: WHAT is missing. One of attention"),
    Bad("bench generat", "bench: Unknown benchmark 'generat'. Did you mean 'generate'"),
    Bad("bench generate --case gpt3", "--case gpt3: one of gpt2-batch-1"),
    Bad("bench generate --repeats 0", "repeats=0 must be at least 1"),
    Bad("bench generate --json no/file.json", "--json no/file.json: cannot be written"),
    Bad("generate RUN --prompt a --batch-size 0", "batch-size=0 must be at least 1"),
    Bad(f"generate RUN --prompt {'x' * 5000}", "--prompt: 5002 tokens.*max_length=64"),
    Bad("generate RUN --prompt '\udcff'", "--prompt: byte 0 .*not valid UTF-8: found 0xff"),
    Bad("generate RUN", r"stdin: byte 2 \(line 2\) is not valid UTF-8", stdin=b"a\n\xff\n"),
    Bad("generate RUN", "stdin: there is no prompt"),
    Bad("generate RUN --input missing.txt", "missing.txt: no such file"),
    Bad("generate RUN --input empty.txt", "empty.txt: there is no prompt"),
    Bad("generate RUN --input docs", "docs: cannot be read"),
    Bad("generate RUN --input latin.txt --output keep.txt", r"latin.txt: byte 11 \(line 3\) is not valid UTF-8"),
    Bad("generate RUN --input long.txt --output keep.txt", "long.txt, line 2: 101 tokens.*max_length=64"),
    Bad("generate RUN --input keep.txt --output ./keep.txt", "--output keep.txt: is also what is read"),
    Bad("generate RUN --prompt a --output RUN/config.json", "--output RUN/config.json: is also what is read"),
    Bad("generate RUN --prompt a --output docs", "--output docs: cannot be written .it is a folder"),
    Bad("generate RUN --prompt a --output no/file.txt", "--output no/file.txt: cannot be written .there is no folder"),
    Bad("generate RUN --prompt a --output keep.txt/x", "--output keep.txt/x: cannot be written"),
]
EVALUATE = [
    Bad("evaluate RUN", "Missing from transformer-jax evaluate.*--data"),
    Bad("evaluate RUN --data", "--data takes one path, or two parallel files; got 0"),
    Bad("evaluate RUN --data a b c", "got 3"),
    Bad("evaluate RUN --data missing.tsv", "missing.tsv: no such file"),
    Bad("evaluate RUN --data text.txt", "--data holds text, and the run was trained on pairs"),
    Bad("evaluate RUN --data long.tsv", "--data: 1 of 2 pairs are longer than a row; the first is long.tsv, line 2"),
    Bad("evaluate RUN --data pairs.tsv --limit -1", "limit=-1 must be at least 0"),
    Bad("evaluate RUN --data pairs.tsv --batch-size some", "--batch-size 'some' must be a whole number"),
    Bad("evaluate RUN --data pairs.tsv --output pairs.tsv", "--output pairs.tsv: is also what is read"),
    Bad("evaluate RUN --data pairs.tsv --output no/x", "--output no/x: cannot be written"),
    Bad("evaluate docs --data pairs.tsv", "docs: not a run's folder"),
    Bad("evaluate RUNS/all-cut --data pairs.tsv", "RUNS/all-cut/checkpoints: no checkpoint can be used", 3),
]
DESCRIBE = [
    Bad("describe datse", "Unknown recipe 'datse'. Did you mean 'dates'?"),
    Bad("describe docs", "docs: not a run: it has no config.json"),
    Bad("describe nowhere/run", "nowhere/run: not a run: it has no config.json"),
    Bad("describe RUNS/config-cut", "config.json: the config is not JSON"),
    Bad("describe RUN dates", "Unrecognized options: dates"),
    Bad("describe --devices 0", "devices=0 must be at least 1"),
    Bad("describe --devices 8 --parallel.mesh data=3", "mesh='data=3' is 3 devices, and there are 8"),
    Bad("describe --parallel.mesh data=3,fsdp=7", "batch_size=16 must be a multiple of .* the 21 parts"),
    Bad("describe --parallel.mesh data=-1", "give their --devices"),
    Bad("describe --parallel.mesh tensor=4096", "at most 2048 devices"),
    Bad("describe --accelerator h1000", "Unknown accelerator 'h1000'. Did you mean 'h100'?"),
]
VERIFY = [
    Bad("verify datse", "Unknown recipe 'datse'. Did you mean 'dates'?"),
    Bad("verify --devices 0", "devices=0 must be at least 1"),
    Bad("verify --devices 65", "devices=65 must be at most 64"),
    Bad("verify --devices two", "--devices 'two' must be a whole number"),
    Bad("verify --json docs", "--json docs: cannot be written .it is a folder"),
    Bad("verify --json no/x.json", "--json no/x.json: cannot be written .there is no folder"),
    Bad("verify RUN", "takes a recipe, not a folder"),
]
OTHER = [
    Bad("", "COMMAND is missing"),
    Bad("tarin", "Unknown command 'tarin'. Did you mean 'train'?"),
    Bad("--hepl", "Unknown command '--hepl'"),
]
MOVED = [
    Bad("import", "FOLDER"),
    Bad("import docs new", "docs/config.json: no such file"),
    Bad("import RUN new", "RUN/config.json: model_type .* is none of gpt2"),
    Bad("import published new", "published/config.json of .*: there is no 'vocab_size'"),
    Bad("import published RUN", "RUN: there is something already, and import replaces nothing"),
    Bad("import published new --as decoder", "--as.*decoder-only"),
    Bad("export RUN", "FOLDER"),
    Bad("export docs new", "docs: not a run's folder"),
    Bad("export RUN docs", "docs: there is something already, and export replaces nothing"),
    Bad("export RUN new --family llma", "family='llma' must be one of|llma"),
    Bad("export RUN new --family t5", "As t5 this model cannot be saved: mode='decoder-only'"),
    Bad("export RUN new", "No family of transformers has such a model. As .* this model cannot be saved"),
    Bad("export RUN new --adapter --family llama", "no adapters"),
    Bad("export RUN new --checkpoint 5", "there is no checkpoint '5'"),
    Bad("train pairs --init-from", "--init-from needs a folder"),
    Bad("train pairs --init-from docs", "--init-from docs: no run's folder, and none of transformers"),
    Bad("train pairs --init-from RUN --init-from RUN", "give one folder, not several"),
    Bad("train pairs --init-from RUN --model.d-model 32", "--init-from RUN: model.d_model is 16 there and 32 here"),
    Bad("train pairs --tuning.lora attention", "lora='attention' must be PATTERN=RANK"),
    Bad("train pairs --tuning.lora '(=2'", "'[(]' is no regular expression"),
    Bad("train pairs --tuning.lora atention=2", "tuning.lora='atention=2' fits no weight"),
    Bad("train pairs --tuning.freeze embeding", "tuning.freeze='embeding' fits no parameter"),
    Bad("train pairs --tuning.freeze embedding --tuning.lora w_=2", "give one of them"),
    Bad("train pairs --data.special.bos -1", "bos=-1 must be at least 0"),
    Bad("train pairs --data.special.bos 99999", "data.special.bos=99999 must be below model.vocab_size"),
    Bad("train pairs --data.special.stops 3 99999", "data.special.stops=99999 must be below model.vocab_size"),
    Bad("train pairs --data.special.stops -3", "special.stops=.*must be at least 0"),
]
BAD = TRAIN + GENERATE + EVALUATE + DESCRIBE + VERIFY + MOVED + OTHER


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


# RUNS/name: what is done to a copy of RUN
DAMAGE = {
    "no-config": lambda run: (run / "config.json").unlink(),
    "no-tokenizer": lambda run: (run / "tokenizer.json").unlink(),
    "no-checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "config-cut": lambda run: cut(run / "config.json"),
    "config-alone": lambda run: (cut(run / "config.json"), shutil.rmtree(run / "checkpoints")),
    "all-cut": lambda run: [cut(path) for path in run.glob("checkpoints/*/MANIFEST.sha256")],
}

# What people have: (the command line, its files). It must work.
GOOD = {
    "a byte order mark, CRLF, no line end at the end, a line separator in a line, and spaces in a path": (
        "train pairs --data.train 'my data/a.de' 'my data/b.en'",
        {
            "my data/a.de": ("\ufeff" + "\r\n".join(f"ein\u2028Satz\x85{n}" for n in range(60))).encode(),
            "my data/b.en": "\n".join(f"a sentence {n}" for n in range(60)) + "\n",
        },
    ),
    "pairs that spell special tokens, and an empty source": (
        "train pairs --data.train spelled.tsv",
        {"spelled.tsv": "<eos>\t<bos><pad>\n\tempty\n" + "a<sep>b\tc<unk>\n" * 58},
    ),
    "JSON lines with a byte order mark, CRLF and blank lines": (
        "train pairs --data.train pairs.jsonl",
        {"pairs.jsonl": ("\ufeff" + '{"target": "a<eos>", "source": "b", "n": 1}\r\n\r\n' * 40).encode()},
    ),
    "a very long line": ("train text --data.train line.txt", {"line.txt": TEXT * 3000}),
    "a folder in a folder, packed": (
        "train text --data.train folder",
        {"folder/in/it.txt.gz": gzip.compress(TEXT.encode()), "folder/b.txt": TEXT * 30, "folder/no.md": "\xff"},
    ),
    "a glob": ("train text --data.train glob/**/*.md", {"glob/a.md": TEXT * 20, "glob/deep/b.md": TEXT * 20}),
}
