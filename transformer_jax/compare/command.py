"""`transformer-jax compare [RECIPE] --workdir DIR`."""

import dataclasses
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

from transformer_jax.compare import STUDIES
from transformer_jax.config import RunConfig
from transformer_jax.config_checks import at_least, nearest
from transformer_jax.config_file import differences, read_config, to_json
from transformer_jax.errors import InputError
from transformer_jax.folders import write_whole

RECIPE, PLAN, RESULT, PAGE = "recipe.json", "plan.json", "compare.json", "compare.html"


@dataclasses.dataclass(frozen=True)
class CompareArguments(RunConfig):
    """A run's settings, of which each arm has its own."""

    study: Literal["modes", "norms", "positions", "feed-forward", "heads", "path"] = "modes"
    """What the arms differ in. modes: encoder-decoder, decoder-only, prefix-lm. norms: post-norm, pre-norm, rmsnorm.
    positions: sinusoidal, rope. feed-forward: relu, swiglu. heads: multi-head, grouped-query, multi-query. path: from
    the Transformer of 2017 to a decoder-only model of today, one change after the other."""
    match: Literal["parameters", "flops", "time"] = "parameters"
    """What all arms have as much of as the recipe's own model: parameters, and examples that they are trained on; or,
    with as many parameters, FLOPs or time of training, for which the number of steps is changed."""
    seeds: int = 3
    """Runs of each arm, with seeds from --seed on."""
    arms: tuple[str, ...] = ()
    """Which arms of the study are compared. None given: all."""
    jobs: int = 0
    """Runs at a time, each with its share of the CPU's cores. 0: one a core, and one on an accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds")
        at_least(self, 0, "jobs")
        known = STUDIES[self.study]
        for name in self.arms:
            if name not in known:
                raise ValueError(f"arms: {name!r} is none of {', '.join(known)}.{nearest(name, known)}")
        if self.arms and len(set(self.arms)) < max(2, len(self.arms)):
            raise ValueError(f"arms={' '.join(self.arms)}: give two or more, each once.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arms that are compared."""
        return self.arms or tuple(STUDIES[self.study])


def plan_of(args: CompareArguments, run: RunConfig, folder: Path) -> dict[str, Any]:
    """The arms, as they were decided when the comparison began. Raises InputError where it was another one."""
    from transformer_jax.compare.arms import arms_of, measure
    from transformer_jax.data.objectives import ARRANGEMENTS

    asked = {"study": args.study, "match": args.match, "arms": list(args.names)}
    if (folder / PLAN).exists():
        plan = json.loads((folder / PLAN).read_text("utf-8"))
        changes = differences(read_config(folder / RECIPE), run)
        changes += [f"{name}: {plan[name]} -> {value}" for name, value in asked.items() if plan[name] != value]
        if changes:
            raise InputError(f"{folder} holds another comparison: {'; '.join(changes)}. Give another --workdir.")
        return plan
    print("matches the arms, and measures what each takes, in turns, with nothing beside:", file=sys.stderr)
    plan: dict[str, Any] = asked | {"plans": {}}
    arms = arms_of(run, args.study, args.names, args.match)
    for name, arm in arms.items():
        print(f"{name}: {arm.parameters:,} parameters, {arm.run.steps} steps", file=sys.stderr)
    measure(arms.values())
    for name, arm in arms.items():
        model, speed = arm.run.model, arm.speed
        plan["plans"][name] = {
            "parameters": arm.parameters,
            "steps": arm.run.steps,
            "examples": arm.examples * arm.run.steps,
            "flops_per_step": arm.flops,
            "training_flops": arm.flops * arm.run.steps,
            "seconds_per_step": speed.seconds,
            "tokens_per_second": speed.tokens / speed.seconds,
            "memory": speed.memory,
            "latency": speed.latency,
            "encoder_layers": model.num_encoder_layers if ARRANGEMENTS[model.mode].has_source else 0,
            "decoder_layers": model.num_layers,
            "d_model": model.d_model,
            "d_ff": model.d_ff,
            "choices": {field: getattr(model, field) for field in STUDIES[args.study][name]},
        }
        write_whole(folder / f"{name}.json", to_json(arm.run))
    write_whole(folder / RECIPE, to_json(run))
    write_whole(folder / PLAN, json.dumps(plan, indent=1) + "\n")
    return plan


def means_of(runs: dict[str, Any]) -> dict[str, float]:
    """The scores of an arm: of its runs that came to their end, the mean."""
    finished = [run["scores"] for run in runs.values() if "scores" in run]
    return {name: statistics.fmean(scores[name] for scores in finished) for name in (finished[0] if finished else ())}


def command_compare(arguments: list[str]) -> int:
    """trains encoder-decoder, decoder-only and prefix LM at a matched budget, and says which is better"""
    from transformer_jax.cli import parse_run

    args = parse_run(arguments, "compare", CompareArguments)
    named = any(word.partition("=")[0] == "--workdir" for word in arguments)
    default = f"runs/compare-{args.recipe}" + ("" if args.study == "modes" else f"-{args.study}")
    folder = Path(args.workdir if named else default)
    run = RunConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RunConfig)})
    run = dataclasses.replace(run, workdir=str(folder))
    from transformer_jax.compare.page import answer, columns_of, page
    from transformer_jax.compare.runs import STOPPED, Task, jobs_of, outcomes
    from transformer_jax.host import prepare
    from transformer_jax.surroundings import surroundings
    from transformer_jax.workdir import opened

    prepare(run.deterministic)
    with opened(folder):
        plan = plan_of(args, run, folder)
        seeds = range(run.seed, run.seed + args.seeds)
        arms = {name: plan["plans"][name] | {"runs": {}} for name in args.names}
        result = {
            "recipe": run.recipe,
            "study": args.study,
            "match": args.match,
            "seeds": list(seeds),
            "command": shlex.join(["transformer-jax", "compare", *arguments]),
            **surroundings(),
            "arms": arms,
        }
        # a seed of all arms before the next, so that there is something to compare early
        tasks = [Task(folder, name, seed, arms[name]["steps"]) for seed in seeds for name in args.names]
        jobs = jobs_of(args.jobs, len(tasks), run.parallel, max(arm["memory"] for arm in arms.values()))
        for task, found in outcomes(tasks, jobs, run.deterministic):
            if found is None:
                print(f"{folder}: stopped, all saved; the same command goes on from here.", file=sys.stderr)
                return STOPPED
            arm = arms[task.arm]
            arm["runs"][str(task.seed)] = found
            arm["mean"] = means_of(arm["runs"])
            write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
            write_whole(folder / PAGE, page(result))
    print(answer(result, columns_of(result)))
    print(f"{folder / PAGE} has the curves, {folder / RESULT} the numbers.")
    return int(any("error" in each for arm in arms.values() for each in arm["runs"].values()))
