"""Measures training and decoding on one GPU, beside PyTorch where it is installed, in under 8 minutes.

    python scripts/bench_gpu.py --json docs/bench-gpu.json
    python scripts/bench_gpu.py --smoke       # tiny models, to see on a CPU that all of it runs

It needs jax, flax, optax and NumPy; torch and transformers are compared with where they are. GPT-2 124M with 1,024
tokens a row, Llama 3.2 1B with 2,048 and a T5-large-sized encoder-decoder with 512 + 512, in bfloat16 with float32
parameters; greedy decoding of one row in bfloat16. What fails is reported, and the rest goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax

from transformer_jax.bench import generate, train
from transformer_jax.bench.measure import peak_flops, read_bandwidth, surroundings
from transformer_jax.bench.subject import Subject
from transformer_jax.config import ModelConfig
from transformer_jax.errors import InputError
from transformer_jax.files import check_output
from transformer_jax.host import prepare
from transformer_jax.recipes import find_recipe

GPT2 = find_recipe("gpt2-124m").model.replace(vocab_size=50_304, dtype="bfloat16")
LLAMA = find_recipe("llama-1b").model
T5_LARGE = find_recipe("t5-small").model.replace(
    d_model=1024, num_layers=24, num_heads=16, head_dim=64, d_ff=4096, dtype="bfloat16"
)
TRAINING = {
    "gpt2-124m": train.Case(Subject(GPT2, 16, 1024), "gpt2"),
    "llama-1b": train.Case(Subject(LLAMA, 4, 2048), "llama"),
    "t5-large": train.Case(Subject(T5_LARGE, 8, 512), "t5"),
}
DECODING = {
    "gpt2-124m": generate.Case(GPT2.replace(param_dtype="bfloat16"), 1, 16, 256, uncached=False),
    "llama-1b": generate.Case(LLAMA.replace(param_dtype="bfloat16"), 1, 16, 256, uncached=False, peer=False),
}
GOALS = "goals: 1.15 times PyTorch's tokens/s at 124M and 1B, 55 % MFU at 1B, 70 % of the bound in decoding"


def tiny(config: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a CPU runs at once."""
    kv_heads = 2 if config.num_kv_heads < config.num_heads else 4
    shape = dict(d_model=64, num_layers=2, num_heads=4, num_kv_heads=kv_heads, head_dim=16, d_ff=128)
    return config.replace(vocab_size=512, max_length=64, **shape)


def smoke(cases: dict[str, Any]) -> dict[str, Any]:
    """Cases with tiny models."""
    found = {}
    for name, case in cases.items():
        if isinstance(case, train.Case):
            found[name] = case._replace(subject=Subject(tiny(case.subject.config), 2, 16))
        else:
            found[name] = case._replace(config=tiny(case.config), new=8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes, besides stdout")
    parser.add_argument("--smoke", action="store_true", help="tiny models, two turns")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1.")
    try:
        check_output(args.json, "--json")
    except InputError as error:
        parser.error(str(error))
    prepare(keep=False)
    if jax.default_backend() == "cpu" and not args.smoke:
        parser.error("this machine's JAX has no GPU, and a CPU would take hours: give --smoke for tiny models.")
    training, decoding = (smoke(TRAINING), smoke(DECODING)) if args.smoke else (TRAINING, DECODING)
    repeats, turn, start = (2, 0.0, time.perf_counter()) if args.smoke else (args.repeats, 2.0, time.perf_counter())
    bandwidth, about = read_bandwidth(), surroundings("optax", "transformers", "torch")
    base = dict(**about, repeats=repeats, smoke=args.smoke, failed={})
    result: dict[str, Any] = {
        "bench": "gpu",
        "train": {"bench": "train", **base, "peak": peak_flops(), "cases": {}},
        "generate": {"bench": "generate", **base, "read_bytes_per_second": bandwidth, "cases": {}},
    }

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {what}", flush=True)

    def attempt(part: str, name: str, measure: Any) -> None:
        say(f"{part} {name}")
        try:
            result[part]["cases"][name] = measure()
        except Exception as error:  # the time on an accelerator is dear: the other cases are still measured
            result[part]["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            say(f"{part} {name} failed: {result[part]['failed'][name]}")
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    for name, case in training.items():
        attempt("train", name, lambda case=case: train.measure(case, repeats, say, turn))
    for name, case in decoding.items():
        attempt("generate", name, lambda case=case: generate.measure(case, repeats, bandwidth))
    for part, bench in (("train", train), ("generate", generate)):
        print(" | ".join(bench.COLUMNS))
        for row in bench.rows(result[part]):
            print(" | ".join(row))
        for line in bench.remarks(result[part]):
            print(line)
    print(f"{about['device']}; {GOALS}; {time.perf_counter() - start:.0f} s in all")
    if any(result[part]["failed"] for part in ("train", "generate")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
