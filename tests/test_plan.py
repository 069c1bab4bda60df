"""Laws of planning: what a plan says of devices equals closed forms, and a program's text is read as it is meant."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time

import pytest

from transformer_jax.accelerators import ACCELERATORS
from transformer_jax.cli import run_command
from transformer_jax.config import ModelConfig, ParallelConfig, RunConfig
from transformer_jax.describe import describe_plan, measure
from transformer_jax.errors import InputError
from transformer_jax.hlo import Collective, Product, first_group, read_program
from transformer_jax.plan import planned_mesh
from transformer_jax.recipes import RECIPES, find_recipe
from transformer_jax.roofline import Exchange, Plan

D, F, V, HEADS, LAYERS, B, T = 128, 512, 64, 8, 2, 16, 32
WEIGHTS, NORMS = LAYERS * (4 * D * D + 2 * D * F) + V * D, (2 * LAYERS + 1) * D
TINY = f"""--model.mode decoder-only --model.d-model {D} --model.d-ff {F} --model.num-heads {HEADS}
    --model.num-layers {LAYERS} --model.vocab-size {V} --model.max-length {T} --batch-size {B}
    --data.source-length 16 --data.target-length 16"""
PLANS = {
    "fsdp": "--parallel.mesh fsdp=8",
    "data": "--parallel.mesh data=8",
    "tensor": "--parallel.mesh tensor=8",
    "narrow": "--parallel.mesh fsdp=8 --optimizer.accumulate 2 --model.dtype bfloat16",
    "full": "--parallel.mesh data=2,fsdp=2,tensor=2 --model.remat full",
    "both": "--parallel.mesh data=8 --batch-size 512 --model.dtype bfloat16 --model.mode encoder-decoder"
    " --model.scan-layers False",
    "many": "--parallel.mesh data=-1,fsdp=2,tensor=2 --model.remat full --devices 4096 --batch-size 16384",
}
PLANS = {"both again": f"{PLANS['both']} --model.remat full"} | PLANS
DRIVER = """
import dataclasses, json, sys, time
from transformer_jax import plan
from transformer_jax.cli import DescribeArguments, parse_run
from transformer_jax.hlo import read_program
plan.simulate(8)
found = {}
for name, flags in json.load(sys.stdin).items():
    run, start = parse_run(flags.split(), "describe", DescribeArguments), time.monotonic()
    found[name] = dataclasses.asdict(plan.make_plan(run, run.devices)) | {"seconds": time.monotonic() - start}
model = run.model.replace(scan_layers=False, remat="none", num_layers=1)
run = dataclasses.replace(run, batch_size=16, model=model)
program = plan._compile(run, plan.Partitioner.create(plan.ParallelConfig(strategy="mesh", mesh="fsdp=8")))[2]
products, _ = read_program(program.as_text())
found["counted"] = [program.cost_analysis()["flops"], sum(each.flops * each.times for each in products)]
print(json.dumps(found))
"""


def made_plans():
    """What the driver prints, in a process whose CPU plays 8 devices."""
    flags = {name: f"dates {TINY} --model.scan-layers True {more}" for name, more in PLANS.items()}
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command, words = [sys.executable, "-W", "error", "-c", DRIVER], json.dumps(flags)
    done = subprocess.run(command, input=words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of a small model on several meshes, made by one of pytest's processes for all of them."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    file, lock = folder / "plans.json", folder / "plans.lock"
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        (folder / "plans.part").write_text(made_plans(), "utf-8")
        (folder / "plans.part").rename(file)
    found = json.loads(file.read_text("utf-8"))
    return {name: (revived(found[name]), found[name]) for name in PLANS} | {"counted": found["counted"]}


def revived(fields):
    exchanges = tuple(
        Exchange(each["kind"], tuple(each["axes"]), tuple(each["devices"]), each["bytes"])
        for each in fields["exchanges"]
    )
    names = ("mesh", "simulated", "memory", "model_flops", "flops", "traffic")
    return Plan(*(fields[name] for name in names), exchanges)


def exchanged(plan, kind, axes):
    """Bytes that a device sends."""
    return sum(each.moved() for each in plan.exchanges if (each.kind, each.axes) == (kind, axes))


def test_a_device_holds_its_part(plans):
    """Exactly: weights and AdamW's two moments are split over fsdp, norms are whole, counters are 4 bytes each."""
    memory = plans["fsdp"][0].memory
    part = 4 * (WEIGHTS // 8 + NORMS)
    assert memory["parameters"] == memory["gradients"] == part
    assert 2 * part <= memory["optimizer"] <= 2 * part + 16
    assert memory["batch"] == B // 8 * T * 4 * 5
    assert plans["data"][0].memory["parameters"] == 4 * (WEIGHTS + NORMS)
    assert plans["tensor"][0].memory["parameters"] == part


@pytest.mark.parametrize(
    ("name", "kind", "axis", "bytes_of_whole"),
    [
        # each layer's weights are gathered for the forward pass and again for the backward pass
        ("fsdp", "all-gather", "fsdp", 4 * 2 * WEIGHTS),
        ("fsdp", "reduce-scatter", "fsdp", 4 * WEIGHTS),
        # in each of two microbatches, two bytes a number
        ("narrow", "all-gather", "fsdp", 2 * 2 * 2 * WEIGHTS),
        ("narrow", "reduce-scatter", "fsdp", 2 * 2 * WEIGHTS),
        ("data", "all-reduce", "data", 2 * 4 * (WEIGHTS + NORMS)),
        # two a layer and direction, and one each for the embedding and the logits
        ("tensor", "all-reduce", "tensor", 2 * 4 * (4 * LAYERS + 2) * B * T * D),
    ],
)
def test_devices_send_what_closed_forms_say(plans, name, kind, axis, bytes_of_whole):
    """Within 5 %: norms, the loss and the embedding's second use are not in the closed forms."""
    assert exchanged(plans[name][0], kind, (axis,)) == pytest.approx(bytes_of_whole * 7 / 8, rel=0.05)


def test_flops_are_three_forward_passes_and_what_is_computed_again(plans):
    """Exactly, where each device has its part of everything; recomputation repeats the blocks' forward pass, but for
    the last product of each, whose result nothing needs."""
    for name in ("fsdp", "narrow", "data", "tensor"):
        plan = plans[name][0]
        assert plan.flops * plan.devices == plan.model_flops
    plan = plans["full"][0]
    forward = plan.model_flops / 3
    logits, last = 2 * B * T * D * V, LAYERS * 2 * B * T * D * F
    assert plan.flops * plan.devices == 4 * forward - logits - last


def test_an_encoder_decoder_in_bfloat16_whose_layers_are_one_by_one(plans):
    """Both stacks are planned, and what is computed again is not kept."""
    kept, again = plans["both"][0], plans["both again"][0]
    assert again.memory["activations"] < 0.5 * kept.memory["activations"]
    assert 1.2 < again.flops / kept.flops < 1.34


def test_flops_agree_with_xla(plans):
    """Within 5 % above: XLA counts additions and exponentials too."""
    whole, products = plans["counted"]
    assert products <= whole <= 1.05 * products


def test_thousands_of_devices(plans):
    """More of them along data have the same program and the same memory; only the groups along data are larger."""
    (few, _), (many, fields) = plans["full"], plans["many"]
    assert (many.devices, many.simulated) == (4096, 8)
    assert many.memory | {"batch": 0} == few.memory | {"batch": 0} | {"activations": many.memory["activations"]}
    assert many.mesh == dict(data=1024, fsdp=2, expert=1, context=1, tensor=2)
    (group,) = {each.devices for each in many.exchanges if each.axes == ("data",)}
    assert group == tuple(range(0, 4096, 4))
    assert fields["seconds"] < 30


PROGRAM = """HloModule step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (in: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %in = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %w = f32[8,4]{1,0} get-tuple-element(%in), index=1
  %all = f32[16,4]{1,0} all-gather(%w), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %dot = f32[16,16]{1,0} dot(%all, %all), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %part = f32[8,4]{1,0} reduce-scatter(%all), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %i = s32[] get-tuple-element(%in), index=0
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %part)
}

%below (in.1: (s32[], f32[8,4])) -> pred[] {
  %in.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %end = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%in.1), index=0
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%outer (in.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %in.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%in.2), condition=%below, body=%inner
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %p)
  %loop.1 = (s32[], f32[8,4]{1,0}) while(%start), condition=%below, body=%outer, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %w.1 = f32[8,4]{1,0} get-tuple-element(%loop.1), index=1
  %both = (f32[8,4]{1,0}, bf16[2]{0}) all-reduce(%w.1, %w.1), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %alone = f32[8,4]{1,0} all-reduce(%w.1), channel_id=4, replica_groups={{0},{1}}, to_apply=%add
  ROOT %next = f32[8,4]{1,0} collective-permute(%w.1), channel_id=5, source_target_pairs={{0,2},{2,0},{1,3}}
}
"""


def test_loops_multiply_what_is_in_them():
    """A loop in a loop runs as often as both say: noted by XLA, or as the condition's bound. Groups of one are none."""
    products, collectives = read_program(PROGRAM)
    assert products == [Product(flops=2 * 16 * 16 * 4, elements=2 * 16 * 4 + 16 * 16, times=15)]
    assert sorted(collectives, key=lambda each: each.kind) == [
        Collective("all-gather", 16 * 4 * 4, (0, 1), 15),
        Collective("all-reduce", 8 * 4 * 4 + 2 * 2, (0, 1, 2, 3), 1),
        Collective("collective-permute", 8 * 4 * 4, (0, 2), 1),
        Collective("reduce-scatter", 2 * 8 * 4 * 4, (0, 2), 15),
    ]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, x", (0, 2)),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}, x", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2)),
        ("source_target_pairs={{0,0},{3,1},{1,3}}, x", (1, 3)),
        ("source_target_pairs={{0,0},{1,1}}, x", (0,)),
    ],
)
def test_every_way_to_write_a_group(text, group):
    """XLA has four, and versions differ in which they choose."""
    assert first_group(text) == group


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [
        ("all-gather", range(8), 7 / 8 / 450e9),  # one board
        ("all-reduce", range(8), 2 * 7 / 8 / 450e9),
        ("all-gather", range(0, 64, 8), 7 / 8 / 50e9),  # one device on each of 8 boards: its own network card
        ("reduce-scatter", range(64), 7 / 8 / 8 / 50e9),  # all of 8 boards: 8 cards for what a board tells another
        ("all-to-all", range(64), 7 / 8 / 50e9),  # but here each has its own to send
        ("collective-permute", (0, 1), 1 / 450e9),
        ("collective-permute", (0, 8), 1 / 50e9),
    ],
)
def test_time_of_an_exchange_on_boards_of_eight(kind, devices, expected):
    """One byte in all, on H100: 450 GB/s each way within a board and a card of 50 GB/s for each device."""
    exchange = Exchange(kind, ("fsdp",), tuple(devices), 1)
    assert exchange.seconds(ACCELERATORS["h100"]) == pytest.approx(expected, rel=1e-6)


def printed(plan, names):
    out = io.StringIO()
    run = RunConfig(model=ModelConfig(vocab_size=64))
    with contextlib.redirect_stdout(out):
        describe_plan(run, plan, [ACCELERATORS[name] for name in names])
    return out.getvalue()


def test_what_fits_is_said_with_how_much_is_left_or_missing():
    """To the last byte, by one line for each accelerator, and the longest of three times binds."""
    mesh = dict(data=1, fsdp=8, expert=1, context=1, tensor=1)
    plan = Plan(mesh, 8, {"parameters": 80 * 10**9, "activations": 10**9}, 8e15, 2e15, 9e12, ())
    text = printed(plan, ["a100", "h200"])
    (a100,), (h200,) = ([line for line in text.splitlines() if name in line] for name in ("a100", "h200"))
    assert "no, 1.00 GB missing" in a100
    assert "6.41 s compute" in a100
    assert "yes, 60.00 GB left" in h200
    assert "2.02 s compute" in h200
    assert "2.00 times those of the model" in text
    assert ACCELERATORS["h100"].source.split(",")[0] in " ".join(printed(plan, ["h100"]).split())


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ("fsdp=16", 8, r"'fsdp=16' needs 16 devices or more; there are 8"),
        ("fsdp=4", 8, r"'fsdp=4' is 4 devices, and there are 8"),
        ("data=-1,fsdp=3", 8, r"is 6 devices, and there are 8"),
        ("data=-1", None, r"takes the rest of the devices: give their --devices N"),
        ("fsdp=24", None, r"batch_size=16 must be a multiple of optimizer.accumulate=1 times the 24 parts"),
        ("fsdp=16,tensor=256", None, r"at most 2048 devices .* 4096 are needed"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_message(mesh, devices, message):
    run = RunConfig(batch_size=16, parallel=ParallelConfig(mesh=mesh), model=ModelConfig(vocab_size=64))
    with pytest.raises(InputError, match=message):
        planned_mesh(run, devices)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--devices 8 --accelerator h1000", "Unknown accelerator 'h1000'. Did you mean 'h100'?"),
        ("--devices 8 --parallel.mesh fsdp=16", "needs 16 devices or more; there are 8"),
        ("--parallel.mesh data=-1", "give their --devices N"),
    ],
)
def test_wrong_input_ends_with_status_2(flags, message, capsys):
    """Before anything is compiled."""
    assert run_command(["describe", "gpt2-1.5b", *flags.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_the_command_line_plans():
    """One process from the command to the tables."""
    flags = f"{TINY} --devices 32 --parallel.mesh data=-1,fsdp=4 --batch-size 64 --accelerator tpu-v5e".split()
    code = "from transformer_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "describe", "dates", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert "dates on 32 devices (data=8, fsdp=4)" in done.stdout
    assert "Compiled for 8 of the 32 devices" in done.stdout
    assert "tpu-v5e" in done.stdout
    assert "all-gather over fsdp (4)" in done.stdout


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("gpt2-1.5b", 1_557_611_200),  # as `gpt2-xl` is on the hub
        ("llama-8b", 8_030_261_248),  # Llama 3.1
        ("llama-70b", 70_553_706_496),
        ("t5-11b", 11_307_321_344),  # as `t5-11b` is on the hub
    ],
)
def test_planned_recipes_have_their_parameters(recipe, published):
    """Exactly, as counted with and without scanned layers; each recipe goes by its own name."""
    run = find_recipe(recipe)
    assert sum(part.parameters for part in measure(run, 1)) == published
    assert RECIPES[recipe]().recipe == recipe
    blocks = 2 * math.prod((run.model.d_model, run.model.d_ff, run.model.num_layers))
    assert published > blocks
