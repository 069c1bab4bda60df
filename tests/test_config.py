"""Laws of the configs: checked when made, derived fields derived anew, errors that name the field and the way out."""

import dataclasses
import math

import pytest

from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
)

CONFIGS = [
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
]
NAN = float("nan")


IMPOSSIBLE = [
    ("mode", dict(mode="encoder")),
    ("vocab_size", dict(vocab_size=0)),
    ("vocab_size", dict(vocab_size="100")),
    ("d_model", dict(d_model=512.0)),
    ("d_model", dict(d_model=None)),
    ("d_model.*num_heads", dict(d_model=512, num_heads=3)),
    ("d_model.*sinusoidal", dict(d_model=15, num_heads=1)),
    ("position_offset.*rope", dict(position="rope", position_offset=2)),
    ("position_offset", dict(position="learned", position_offset=-1)),
    ("parallel_residual.*norm_placement", dict(parallel_residual=True, norm_placement="post")),
    ("qkv_bias", dict(qkv_bias="no")),
    ("num_layers", dict(num_layers=0)),
    ("num_layers", dict(num_layers=True)),
    ("num_encoder_layers", dict(num_encoder_layers=0)),
    ("num_heads", dict(num_heads=0)),
    ("num_heads.*num_kv_heads", dict(num_heads=8, num_kv_heads=3)),
    ("num_heads.*num_kv_heads", dict(num_kv_heads=16)),
    ("num_kv_heads", dict(num_kv_heads=0)),
    ("head_dim", dict(head_dim=-64)),
    ("head_dim.*rope", dict(position="rope", head_dim=5)),
    ("head_dim.*rope.fraction", dict(position="rope", head_dim=64, rope=RopeConfig(fraction=0.3))),
    ("d_ff", dict(d_ff=0)),
    ("max_length", dict(max_length=0)),
    ("position", dict(position="absolute")),
    ("cross_position", dict(cross_position="rope")),
    ("rope", dict(rope={"base": 10_000.0})),
    ("relative_buckets", dict(relative_buckets=6)),
    ("relative_buckets", dict(relative_buckets=0)),
    ("relative_max_distance", dict(relative_max_distance=0)),
    ("norm", dict(norm=None)),
    ("norm_placement", dict(norm_placement="before")),
    ("norm_eps", dict(norm_eps=-1e-6)),
    ("norm_eps", dict(norm_eps=NAN)),
    ("activation", dict(activation="elu")),
    ("gated", dict(gated=1)),
    ("use_bias", dict(use_bias="no")),
    ("query_scale", dict(query_scale=0.0)),
    ("windows", dict(windows=())),
    ("windows", dict(windows=(-1,))),
    ("windows", dict(windows=[0])),
    ("encoder_windows", dict(encoder_windows=())),
    ("encoder_windows", dict(encoder_windows=(-1,))),
    ("num_encoder_layers", dict(encoder_windows=(1, 0), num_encoder_layers=3, scan_layers=True)),
    ("windows", dict(windows=(0, 1.5))),
    ("windows", dict(windows=(True,))),
    ("attention_softcap", dict(attention_softcap=0)),
    ("logits_softcap", dict(logits_softcap=-30.0)),
    ("prefix_attention", dict(prefix_attention="full")),
    ("dropout_rate", dict(dropout_rate=1.0)),
    ("dropout_rate", dict(dropout_rate=NAN)),
    ("attention_dropout_rate", dict(attention_dropout_rate=-0.1)),
    ("dtype", dict(dtype="float16")),
    ("param_dtype", dict(param_dtype="int8")),
    # as many places as buckets that are exact: the logarithm between them is 0
    ("relative_max_distance.*relative_buckets", dict(position="t5", relative_max_distance=16)),
    # learned positions are added, so there is no order that cross-attention could have
    ("cross_position.*learned", dict(position="learned", cross_position="same")),
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_frozen_values(kind):
    """Two of the same fields are equal and hash alike; no field can be set; the defaults are possible."""
    config = kind()
    assert config == kind()
    assert hash(config) == hash(kind())
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_float_is_finite_and_every_number_no_bool(kind):
    """NaN, infinity and True are refused for each number, by name."""
    for field in dataclasses.fields(kind):
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            for value in (NAN, math.inf, -math.inf, True):
                with pytest.raises(ValueError, match=field.name):
                    kind(**{field.name: value})


@pytest.mark.parametrize(("words", "fields"), IMPOSSIBLE, ids=str)
def test_the_impossible_is_refused_by_name(words, fields):
    """ValueError that starts with the field, when the config is made, replaced or part of a run."""
    for make in (ModelConfig, ModelConfig().replace, lambda **fields: RunConfig(model=ModelConfig(**fields))):
        with pytest.raises(ValueError, match=f"^{words}"):
            make(**fields)


@pytest.mark.parametrize(
    ("kind", "field", "value", "meant"),
    [
        (ModelConfig, "position", "rop", "rope"),
        (ModelConfig, "norm", "layer_norm", "layernorm"),
        (ModelConfig, "mode", "decoder", "decoder-only"),
        (ModelConfig, "activation", "swilu", "silu"),
        (RopeConfig, "scaling", "llama", "llama3"),
        (OptimizerConfig, "name", "adam", "adamw"),
        (OptimizerConfig, "schedule", "cosin", "cosine"),
        (ParallelConfig, "strategy", "pmp", "pmap"),
        (ParallelConfig, "mesh", "dat=2", "data"),
    ],
)
def test_the_nearest_name_is_suggested(kind, field, value, meant):
    """A slip of the pen is answered with the name that was meant."""
    with pytest.raises(ValueError, match=f"{field}.*Did you mean '{meant}'"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        (dict(d_model=512, num_heads=12), "num_heads=4"),
        (dict(num_heads=8, num_kv_heads=6), "num_kv_heads=2"),
    ],
)
def test_the_remedy_works(fields, remedy):
    """The value that an error suggests is possible."""
    with pytest.raises(ValueError, match=f"try {remedy}"):
        ModelConfig(**fields)
    name, value = remedy.split("=")
    ModelConfig(**fields | {name: int(value)})


def test_fields_are_derived():
    """From the others where they are None, and not where they are given."""
    config = ModelConfig(d_model=96, num_heads=6, num_layers=3)
    derived = ("num_encoder_layers", "num_kv_heads", "head_dim", "d_ff")
    assert [getattr(config, name) for name in derived] == [3, 6, 16, 384]
    given = ModelConfig(d_model=96, num_heads=6, num_encoder_layers=2, num_kv_heads=3, head_dim=5, d_ff=7)
    assert [getattr(given, name) for name in derived] == [2, 3, 5, 7]
    assert (config.vocab_size, config.query_scale) == (None, None)
    assert ModelConfig(d_model=512, num_heads=3, head_dim=64).head_dim == 64


def test_replace_derives_anew():
    """What was derived follows the change, what was given stays, and one replacement after another is both at once."""
    config = ModelConfig(d_model=96, num_heads=6, d_ff=100)
    wider = config.replace(d_model=48)
    assert wider == ModelConfig(d_model=48, num_heads=6, d_ff=100)
    assert (wider.head_dim, wider.d_ff) == (8, 100)
    deeper = wider.replace(num_layers=2).replace(num_heads=4)
    assert (deeper.num_encoder_layers, deeper.num_kv_heads, deeper.head_dim) == (2, 4, 12)
    assert wider.replace(vocab_size=10).replace(d_model=24).vocab_size == 10
    assert config.replace() == config
    assert config.d_model == 96


def test_a_model_is_its_fields():
    """The resolved fields make an equal config, so a saved one can be read again."""
    config = ModelConfig(d_model=96, num_heads=6, position="rope", rope=RopeConfig(base=500_000.0))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert ModelConfig(**fields) == config


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("base", dict(base=1.0)),
        ("fraction", dict(fraction=0.0)),
        ("fraction", dict(fraction=1.5)),
        ("scaling", dict(scaling="longrope")),
        ("factor", dict(factor=0.5)),
        ("original_length", dict(original_length=0)),
        ("original_length", dict(original_length=8192.0)),
        ("rope.low.*rope.high", dict(low=4.0, high=4.0)),
        ("base", dict(base=NAN)),
        ("rope.low", dict(scaling="yarn", low=0.0, high=32.0)),  # no feature turns that slowly
    ],
    ids=str,
)
def test_impossible_ropes_are_refused(words, fields):
    """ValueError that names the field."""
    with pytest.raises(ValueError, match=words):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ("data=-1", {"data": -1}),
        ("data=2,fsdp=2,tensor=2", {"data": 2, "fsdp": 2, "tensor": 2}),
        (" tensor=4 , data=-1", {"tensor": 4, "data": -1}),
    ],
)
def test_a_mesh_is_its_axes(mesh, axes):
    """In the order they are written."""
    assert list(ParallelConfig(mesh=mesh).axes.items()) == list(axes.items())


@pytest.mark.parametrize(
    "mesh",
    ["", "data", "data=", "data=0", "data=-2", "data=two", "data=1.5", "data=2;fsdp=2", "data=2,data=2", "model=2"]
    + ["data=-1,fsdp=-1", "data=2,", "data=--1", "data=²"],
)
def test_impossible_meshes_are_refused(mesh):
    """ValueError that names the field, when the config is made."""
    with pytest.raises(ValueError, match="mesh"):
        ParallelConfig(mesh=mesh)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", math.inf), ("90s", 90), ("20m", 1200), ("3h50m", 13_800), ("1h2m3s", 3723), ("0.5h", 1800), ("1m30s", 90)],
)
def test_a_time_is_its_seconds(text, seconds):
    """Hours, minutes and seconds; none is for ever."""
    assert RunConfig(stop_after=text).seconds("stop_after") == seconds


@pytest.mark.parametrize("text", ["90", "h", "3h50", "3x", "-5m", "0s", "soon", "1h m", ".s", "1..5h", "5m garbage"])
def test_impossible_times_are_refused(text):
    """ValueError that names the field, when the config is made."""
    with pytest.raises(ValueError, match="stop_after"):
        RunConfig(stop_after=text)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("steps", lambda: RunConfig(steps=0)),
        ("seed", lambda: RunConfig(seed=2**32)),
        ("seed", lambda: RunConfig(seed=-1)),
        ("warmup_steps.*steps", lambda: RunConfig(steps=10, optimizer=OptimizerConfig(warmup_steps=11))),
        ("batch_size.*accumulate", lambda: RunConfig(batch_size=10, optimizer=OptimizerConfig(accumulate=4))),
        ("target_length.*max_length", lambda: RunConfig(data=DataConfig(target_length=513))),
        ("learning_rate", lambda: OptimizerConfig(learning_rate=-1.0)),
        ("b2", lambda: OptimizerConfig(b2=1.0)),
        ("final_fraction", lambda: OptimizerConfig(final_fraction=1.5)),
        ("label_smoothing", lambda: LossConfig(label_smoothing=1.0)),
        ("z_loss", lambda: LossConfig(z_loss=-1e-4)),
        ("train", lambda: DataConfig(train=("a", "b", "c"))),
        ("train", lambda: DataConfig(train="corpus.txt")),
        ("noise_density", lambda: DataConfig(noise_density=1.0)),
        ("tokenizer_size", lambda: DataConfig(tokenizer_size=2)),
        ("keep", lambda: CheckpointConfig(keep=0)),
    ],
)
def test_impossible_runs_are_refused(words, make):
    """ValueError that names the field, of whichever part of the run."""
    with pytest.raises(ValueError, match=words):
        make()
