"""`transformer-jax compare [RECIPE] --workdir DIR`."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from transformer_jax.compare import ARMS
from transformer_jax.config import RunConfig
from transformer_jax.config_checks import at_least, nearest
from transformer_jax.config_file import differences, read_config, to_json
from transformer_jax.errors import ERRORS, InputError
from transformer_jax.folders import write_whole

RECIPE, PLAN, RESULT, PAGE = "recipe.json", "plan.json", "compare.json", "compare.html"
STOPPED = 75


@dataclasses.dataclass(frozen=True)
class CompareArguments(RunConfig):
    """A run's settings, of which each arm has its own."""

    match: Literal["parameters", "flops", "time"] = "parameters"
    """What all arms have as much of as the recipe's own model: parameters, and examples that they are trained on; or,
    with as many parameters, FLOPs or time of training, for which the number of steps is changed."""
    seeds: int = 3
    """Runs of each arm, with seeds from --seed on."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which are compared: encoder-decoder, decoder-only, prefix-lm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds")
        for name in self.arms:
            if name not in ARMS:
                raise ValueError(f"arms: {name!r} is none of {', '.join(ARMS)}.{nearest(name, ARMS)}")
        if len(set(self.arms)) < max(2, len(self.arms)):
            raise ValueError(f"arms={' '.join(self.arms)}: give two or more, each once.")


def plan_of(args: CompareArguments, run: RunConfig, folder: Path) -> dict[str, Any]:
    """The arms, as they were decided when the comparison began. Raises InputError where it was another one."""
    from transformer_jax.compare.arms import arms_of
    from transformer_jax.compare.measure import state_bytes
    from transformer_jax.data.objectives import ARRANGEMENTS

    asked = {"match": args.match, "arms": list(args.arms)}
    if (folder / PLAN).exists():
        plan = json.loads((folder / PLAN).read_text("utf-8"))
        changes = differences(read_config(folder / RECIPE), run)
        changes += [f"{name}: {plan[name]} -> {value}" for name, value in asked.items() if plan[name] != value]
        if changes:
            raise InputError(f"{folder} holds another comparison: {'; '.join(changes)}. Give another --workdir.")
        return plan
    plan: dict[str, Any] = asked | {"plans": {}}
    for name, arm in arms_of(run, args.arms, args.match).items():
        model = arm.run.model
        plan["plans"][name] = {
            "parameters": arm.parameters,
            "steps": arm.run.steps,
            "examples": arm.examples * arm.run.steps,
            "flops_per_step": arm.flops,
            "training_flops": arm.flops * arm.run.steps,
            "seconds_per_step": arm.seconds,
            "state_bytes": state_bytes(arm.run),
            "encoder_layers": model.num_encoder_layers if ARRANGEMENTS[model.mode].has_source else 0,
            "decoder_layers": model.num_layers,
            "d_model": model.d_model,
            "d_ff": model.d_ff,
        }
        write_whole(folder / f"{name}.json", to_json(arm.run))
    write_whole(folder / RECIPE, to_json(run))
    write_whole(folder / PLAN, json.dumps(plan, indent=1) + "\n")
    return plan


def outcome(arm: RunConfig, folder: Path, seed: int) -> dict[str, Any] | None:
    """The scores of an arm, trained where it is not yet, or why there are none; None where an end was asked for."""
    import jax

    from transformer_jax.compare.measure import result_of
    from transformer_jax.loop import train
    from transformer_jax.terminal import Terminal

    run = dataclasses.replace(arm, seed=seed, workdir=str(folder))
    try:
        if train(run, Terminal()) == STOPPED:
            return None
        return result_of(folder)
    except (*ERRORS, jax.errors.JaxRuntimeError) as error:  # the latter where a device has too little memory
        print(f"transformer-jax: {folder}: {error}", file=sys.stderr)
        return {"error": str(error)}


def command_compare(arguments: list[str]) -> int:
    """trains encoder-decoder, decoder-only and prefix LM at a matched budget, and says which is better"""
    from transformer_jax.cli import parse_run

    args = parse_run(arguments, "compare", CompareArguments)
    named = any(word.partition("=")[0] == "--workdir" for word in arguments)
    folder = Path(args.workdir if named else f"runs/compare-{args.recipe}")
    run = RunConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RunConfig)})
    run = dataclasses.replace(run, workdir=str(folder))
    from transformer_jax.bench.measure import surroundings
    from transformer_jax.compare.page import answer, columns_of, page
    from transformer_jax.host import prepare
    from transformer_jax.workdir import opened

    prepare(run.deterministic)
    with opened(folder):
        plan = plan_of(args, run, folder)
        seeds = range(run.seed, run.seed + args.seeds)
        arms = {name: plan["plans"][name] | {"runs": {}} for name in args.arms}
        result = {
            "recipe": run.recipe,
            "match": args.match,
            "seeds": list(seeds),
            "command": shlex.join(["transformer-jax", "compare", *arguments]),
            **surroundings(),
            "arms": arms,
        }
        for seed in seeds:  # a seed of all arms before the next, so that there is something to compare early
            for name in args.arms:
                print(f"{name}, seed {seed}: {arms[name]['steps']} steps", file=sys.stderr)
                found = outcome(read_config(folder / f"{name}.json"), folder / f"{name}-{seed}", seed)
                if found is None:
                    print(f"{folder}: stopped, all saved; the same command goes on from here.", file=sys.stderr)
                    return STOPPED
                arms[name]["runs"][str(seed)] = found
                write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
                write_whole(folder / PAGE, page(result))
    print(answer(result, columns_of(result)))
    print(f"{folder / PAGE} has the curves, {folder / RESULT} the numbers.")
    return int(any("error" in each for arm in arms.values() for each in arm["runs"].values()))
