"""Measures training and decoding on one GPU, beside PyTorch where it is installed: some 8 minutes.

    python scripts/bench_gpu.py --json docs/bench-gpu.json
    python scripts/bench_gpu.py --smoke       # tiny models, to see on a CPU that all of it runs
    python scripts/bench_gpu.py --read docs/bench-gpu.json --markdown docs/benchmarks.md    # the tables alone

It needs jax, flax, optax and NumPy; torch and transformers are compared with where they are. GPT-2 124M with 1,024
tokens a row, Llama 3.2 1B with 2,048 and a T5-large-sized encoder-decoder with 512 + 512, in bfloat16 with float32
parameters; greedy decoding of one row in bfloat16. Each case has a process of its own, and both sides of it share the
GPU's memory. What fails, or takes too long, is reported, and the rest goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from transformer_jax.bench import generate, train
from transformer_jax.bench.measure import peak_flops, read_bandwidth
from transformer_jax.bench.subject import Subject
from transformer_jax.config import ModelConfig
from transformer_jax.errors import InputError
from transformer_jax.files import check_output
from transformer_jax.host import prepare
from transformer_jax.recipes import find_recipe
from transformer_jax.surroundings import surroundings

GPT2 = find_recipe("gpt2-124m").model.replace(vocab_size=50_304, dtype="bfloat16")
LLAMA = find_recipe("llama-1b").model
T5_LARGE = find_recipe("t5-small").model.replace(
    d_model=1024, num_layers=24, num_heads=16, head_dim=64, d_ff=4096, dtype="bfloat16"
)
LARGE_MEMORY = 90e9  # bytes that JAX may take, with which Llama's step has 8 rows instead of 2
CASES: dict[str, Any] = {
    "train gpt2-124m": train.Case(Subject(GPT2, 16, 1024), "gpt2"),
    "train llama-1b": train.Case(Subject(LLAMA, 8, 2048), "llama"),
    "generate llama-1b": generate.Case(LLAMA.replace(param_dtype="bfloat16"), 1, 16, 256, uncached=False, peer=False),
    "generate gpt2-124m": generate.Case(GPT2.replace(param_dtype="bfloat16"), 1, 16, 256, uncached=False),
    "train t5-large": train.Case(Subject(T5_LARGE, 8, 512), "t5"),
}
PARTS: dict[str, Any] = {"train": train, "generate": generate}
LONGEST = 240  # seconds of a case
GOALS = "goals: 1.15 times PyTorch's tokens/s at 124M and 1B, 55 % MFU at 1B, 70 % of the bound in decoding"


def tiny(config: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a CPU runs at once."""
    kv_heads = 2 if config.num_kv_heads < config.num_heads else 4
    shape = dict(d_model=64, num_layers=2, num_heads=4, num_kv_heads=kv_heads, head_dim=16, d_ff=128)
    return config.replace(vocab_size=512, max_length=64, **shape)


def sized(case: Any, smoke: bool) -> Any:
    """A case with a tiny model for a smoke test, else one that fits the GPU."""
    if smoke and isinstance(case, train.Case):
        return case._replace(subject=Subject(tiny(case.subject.config), 2, 16))
    if smoke:
        return case._replace(config=tiny(case.config), new=8)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if isinstance(case, train.Case) and case.subject.config == LLAMA and limit < LARGE_MEMORY:
        return case._replace(subject=case.subject._replace(batch=2))
    return case


def measure(name: str, smoke: bool, repeats: int) -> dict[str, Any]:
    """What one case gives, and what all results begin with."""
    part, case = name.split()[0], sized(CASES[name], smoke)
    about = surroundings("optax", "transformers", "torch")
    if part == "train":
        say = lambda what: print(f"  {what}", flush=True)  # noqa: E731
        extra = {"peak": peak_flops()}
        return {"about": about | extra, "case": train.measure(case, repeats, say, 0.0 if smoke else train.TURN)}
    bandwidth = read_bandwidth()
    return {
        "about": about | {"read_bytes_per_second": bandwidth},
        "case": generate.measure(case, repeats, bandwidth),
    }


def apart(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; {"failed": why} where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--case", name, "--json", str(out), "--repeats", str(args.repeats)]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ  # else there is no room for PyTorch
        try:
            ended = subprocess.run([*command, *["--smoke"] * args.smoke], env=environment, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {LONGEST} s"}
        if ended.returncode == 2:  # what was asked for is wrong, and that has been said
            raise SystemExit(2)
        return json.loads(out.read_text()) if out.exists() else {"failed": f"exit status {ended.returncode}"}


def show(result: dict[str, Any], page: Path | None) -> None:
    """Tables on stdout, and on a page."""
    from transformer_jax.bench.command import about, as_markdown, placed

    for part, bench in PARTS.items():
        if not result[part]["cases"]:
            continue
        rows, remarks = bench.rows(result[part]), [*bench.remarks(result[part]), about(result[part])]
        for row in [bench.COLUMNS, *rows]:
            print(" | ".join(row))
        print(*remarks, sep="\n")
        if page is not None:
            text = as_markdown(f"gpu-{part}", "python scripts/bench_gpu.py", bench.COLUMNS, rows, remarks)
            page.write_text(placed(page, f"gpu-{part}", text), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes, besides stdout")
    parser.add_argument("--markdown", type=Path, help="a page whose tables are made anew")
    parser.add_argument("--read", type=Path, help="an earlier result: it is shown, and nothing is measured")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two turns")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--case", choices=CASES, help="one case, in this process, as JSON alone")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1.")
    try:
        check_output(args.json, "--json")
        check_output(args.markdown, "--markdown")
    except InputError as error:
        parser.error(str(error))
    if args.read is not None:
        return show(json.loads(args.read.read_text()), args.markdown)
    if args.case is not None:
        prepare(keep=False)
        if jax.default_backend() == "cpu" and not args.smoke:
            parser.error("this machine's JAX has no GPU, and a CPU would take hours: give --smoke for tiny models.")
        found = json.dumps(measure(args.case, args.smoke, 2 if args.smoke else args.repeats))
        if args.json is None:
            return print(found)
        args.json.write_text(found)
        return None
    start, repeats = time.perf_counter(), 2 if args.smoke else args.repeats
    result: dict[str, Any] = {"bench": "gpu"}
    for part in PARTS:
        result[part] = {"bench": part, "repeats": repeats, "smoke": args.smoke, "failed": {}, "cases": {}}
    for name in CASES:
        print(f"{time.perf_counter() - start:6.0f} s  {name}", flush=True)
        part, _, model = name.partition(" ")
        found = apart(name, args)
        if "failed" in found:
            result[part]["failed"][model] = found["failed"]
        else:
            result[part] |= found["about"]
            result[part]["cases"][model] = found["case"]
        result["seconds"] = time.perf_counter() - start
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result, args.markdown)
    print(f"{GOALS}; {result['seconds']:.0f} s in all")
    failed = {f"{part} {model}": why for part in PARTS for model, why in result[part]["failed"].items()}
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
