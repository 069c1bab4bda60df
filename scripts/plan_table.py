"""Writes the table of docs/scaling.md: `python scripts/plan_table.py`, 5 minutes on two cores, no accelerator."""

from pathlib import Path

from transformer_jax.accelerators import ACCELERATORS
from transformer_jax.cli import DescribeArguments, parse_run
from transformer_jax.plan import MOST_SIMULATED, make_plan, simulate
from transformer_jax.roofline import Plan

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- scripts/plan_table.py writes from here -->", "<!-- to here -->"
SHOWN = ("h100", "b200", "tpu-v5p", "tpu-v6e")
COMMANDS = """
gpt2-1.5b --devices 8 --parallel.mesh fsdp=8 --optimizer.accumulate 4
gpt2-1.5b --devices 64 --parallel.mesh data=8,fsdp=8
gpt2-1.5b --devices 512 --parallel.mesh data=64,fsdp=8
gpt2-1.5b --devices 4096 --parallel.mesh data=512,fsdp=8 --batch-size 4096
llama-8b --devices 8 --parallel.mesh fsdp=8 --optimizer.accumulate 64
llama-8b --devices 64 --parallel.mesh fsdp=64 --optimizer.accumulate 8
llama-8b --devices 512 --parallel.mesh data=8,fsdp=64
llama-8b --devices 4096 --parallel.mesh data=64,fsdp=8,tensor=8
llama-70b --devices 8 --parallel.mesh fsdp=8 --optimizer.accumulate 64
llama-70b --devices 8 --parallel.mesh tensor=8 --optimizer.accumulate 512
llama-70b --devices 64 --parallel.mesh fsdp=64 --optimizer.accumulate 8
llama-70b --devices 64 --parallel.mesh fsdp=8,tensor=8 --optimizer.accumulate 64
llama-70b --devices 512 --parallel.mesh fsdp=64,tensor=8 --optimizer.accumulate 8
llama-70b --devices 4096 --parallel.mesh data=8,fsdp=64,tensor=8
t5-11b --devices 8 --parallel.mesh fsdp=8 --optimizer.accumulate 4
t5-11b --devices 64 --parallel.mesh fsdp=64 --batch-size 512
t5-11b --devices 512 --parallel.mesh data=8,fsdp=64 --batch-size 4096
t5-11b --devices 4096 --parallel.mesh data=64,fsdp=64 --batch-size 4096
"""


def row(command: str, devices: int, mesh: str, plan: Plan) -> str:
    """One line of the table."""
    fitting = [each.name for each in ACCELERATORS.values() if plan.total <= each.memory_bytes]
    activations = plan.memory.get("activations", 0)
    cells = [f"`{command.split()[0]}`", f"{devices:,}", f"`{mesh}`"]
    cells.append(f"{(plan.total - activations) / 1e9:.1f} + {activations / 1e9:.1f}")
    cells.append("all" if len(fitting) == len(ACCELERATORS) else ", ".join(fitting) or "none")
    for name in SHOWN:
        times = plan.seconds(ACCELERATORS[name])
        binds = max(times, key=lambda what: times[what])
        cells.append(f"{times[binds]:.2f} s, {binds}" if name in fitting else "")
    return f"| {' | '.join(cells)} | `transformer-jax describe {command}` |"


def main() -> None:
    simulate(MOST_SIMULATED)
    head = ["recipe", "devices", "mesh", "GB of a device: state + activations", "fits", *SHOWN, "command"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for command in str(COMMANDS).strip().splitlines():
        run = parse_run(command.split(), "describe", DescribeArguments)
        lines.append(row(command, run.devices, run.parallel.mesh, make_plan(run, run.devices)))
        print(lines[-1], flush=True)
    before, rest = PAGE.read_text("utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
