"""Laws of published models' configs and folders, without PyTorch."""

import dataclasses
import json
import math
import re
import time
import tracemalloc

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from published import PUBLISHED

from transformer_jax import ModelConfig, Tokens, generate, load_huggingface, save_huggingface
from transformer_jax.data.tokenizer import make_tokenizer
from transformer_jax.errors import InputError
from transformer_jax.huggingface.folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    read_config,
    read_pretrained,
    shapes_of,
    write_config,
    write_pretrained,
)
from transformer_jax.safetensors_file import SafetensorsFile, write_safetensors

FEW = [name if number % 5 == 0 else pytest.param(name, marks=pytest.mark.long) for number, name in enumerate(PUBLISHED)]


@pytest.mark.parametrize("name", FEW)
def test_published_models_have_their_parameters(name):
    """Exactly, from shapes alone. The logits' bias is not trained there, and not counted."""
    count, found = PUBLISHED[name]
    config = read_config(found)[1]
    shapes = shapes_of(config.replace(scan_layers=config.num_layers % len(config.windows) == 0))
    assert sum(math.prod(leaf.shape) for path, leaf in shapes.items() if path != "output_bias_V") == count


@pytest.mark.parametrize("name", FEW)
def test_a_config_comes_back(name):
    """What is written of a model is read as the same model."""
    found = PUBLISHED[name][1]
    config = read_config(found)[1]
    assert read_config(write_config(found["model_type"], config))[1] == config


def published(name, **changes):
    """Its config.json with changes; `...` takes a key out."""
    return {key: value for key, value in (PUBLISHED[name][1] | changes).items() if value is not ...}


def test_keys_of_older_files_are_known():
    """As those of opus-mt have them; another value of one that changes what is computed is refused."""
    older = dict(normalize_before=False, add_final_layer_norm=False, normalize_embedding=True, add_bias_logits=False)
    older |= dict(static_position_embeddings=False, extra_pos_embeddings=2, num_hidden_layers=6)
    assert read_config(published("bart-base", **older)) == read_config(published("bart-base"))
    for key, value in older.items():
        if isinstance(value, bool):
            with pytest.raises(InputError, match=f"{key}={not value} is not known"):
                read_config(published("bart-base", **older | {key: not value}))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mistral-7b", dict(num_key_value_heads=...), "there is no 'num_key_value_heads'"),
        ("qwen3-8b", dict(head_dim=...), "there is no 'head_dim'"),
        ("m2m100-418m", dict(scale_embedding=...), "there is no 'scale_embedding'"),
        ("llama-3-8b", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not known"),
        ("llama-3-8b", dict(rope_scaling=dict(type="linear")), "rope of type linear has no 'factor'"),
        ("qwen2-7b", dict(layer_types=["full_attention"]), "layer_types has 1 layers, and num_hidden_layers is 28"),
        ("opt-125m", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine=False is not known"),
    ],
)
def test_what_is_not_said_is_not_guessed(name, changes, says):
    with pytest.raises(InputError, match=re.escape(says)):
        read_config(published(name, **changes))


def test_what_a_family_takes_where_nothing_is_said():
    gemma = read_config(published("gemma-2-2b", attn_logit_softcapping=..., final_logit_softcapping=None))[1]
    assert (gemma.attention_softcap, gemma.logits_softcap) == (50.0, None)
    assert read_config(published("pythia-70m", rotary_pct=...))[1].rope.fraction == 0.25
    assert read_config(published("mistral-7b", sliding_window=...))[1].windows == (4096,)
    assert read_config(published("qwen2-7b", sliding_window=9, max_window_layers=2))[1].windows == (0,)
    assert read_config(published("t5-small", num_decoder_layers=...))[1].num_layers == 6


# --- folders

LLAMA = ModelConfig(
    mode="decoder-only",
    vocab_size=11,
    d_model=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    d_ff=12,
    max_length=16,
    position="rope",
    norm="rmsnorm",
    use_bias=False,
    gated=True,
    activation="silu",
    scale_embeddings=False,
    tie_embeddings=False,
)


def random_params(config):
    random = np.random.default_rng(0)
    flat = {path: random.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in shapes_of(config).items()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture
def folder(tmp_path):
    """A Llama in two shards, with an index."""
    write_pretrained(tmp_path, "llama", LLAMA, random_params(LLAMA))
    with SafetensorsFile(tmp_path / WEIGHTS) as file:
        tensors = {name: np.array(file[name]) for name in file}
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, part in shards.items():
        write_safetensors(tmp_path / shard, {name: tensors[name] for name in part})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (tmp_path / WEIGHTS).unlink()
    return tmp_path


def same(one, other):
    one, other = (flatten_dict(tree, sep="/") for tree in (one, other))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def test_shards_are_read_as_one(folder):
    config, params = read_pretrained(folder)
    assert config == LLAMA.replace(scan_layers=False)
    same(params, random_params(LLAMA))


def test_layers_in_a_loop_are_the_same_layers(folder):
    plain, looped = read_pretrained(folder)[1], read_pretrained(folder, scan_layers=True)[1]
    flat = flatten_dict(looped, sep="/")
    for path, leaf in flatten_dict(plain, sep="/").items():
        stack, _, rest = path.partition("/block_")
        if rest:
            number, _, rest = rest.partition("/")
            np.testing.assert_array_equal(flat[f"{stack}/layers/block_0/{rest}"][int(number)], leaf, err_msg=path)
    write_pretrained(folder / "again", "llama", LLAMA.replace(scan_layers=True), looped)
    same(read_pretrained(folder / "again")[1], plain)


def test_a_large_model_is_never_on_the_host_as_a_whole(tmp_path):
    """Written in shards, with an index, and read: what is in memory on the way is less than the largest shard."""
    large = LLAMA.replace(vocab_size=50_000, d_model=128, d_ff=1024, num_layers=2)
    params = random_params(large)
    shard = 50_000 * 128 * 4
    size = sum(leaf.nbytes for leaf in flatten_dict(params).values())
    for scan_layers in (False, True):
        tracemalloc.start()
        write_pretrained(tmp_path, "llama", large, params, shard_bytes=shard)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * shard
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > size / shard
        assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 1.01 * shard
        tracemalloc.reset_peak()
        _, found = read_pretrained(tmp_path, scan_layers=scan_layers)
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most - kept < 1.3 * shard
        if not scan_layers:
            same(found, params)


def test_what_fits_no_family_is_said():
    with pytest.raises(InputError, match=r"As llama.*norm='layernorm' \(it has 'rmsnorm'\)"):
        write_config("llama", LLAMA.replace(norm="layernorm"))
    with pytest.raises(InputError, match=r"As gpt2.*position='rope'"):
        write_config("gpt2", LLAMA)
    with pytest.raises(InputError, match=r"As llama.*prefix_attention='bidirectional'"):
        write_config("llama", LLAMA.replace(prefix_attention="bidirectional"))
    t5 = read_config(PUBLISHED["t5-small"][1])[1]
    with pytest.raises(InputError, match=r"As t5.*share_source_embedding=False"):
        write_config("t5", t5.replace(share_source_embedding=False))


def change_config(**changes):
    def change(folder):
        found = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def change_index(edit):
    def change(folder):
        found = json.loads((folder / INDEX).read_text())
        edit(found)
        (folder / INDEX).write_text(json.dumps(found))

    return change


def change_bytes(edit, shard="model-00001-of-00002.safetensors"):
    def change(folder):
        path = folder / shard
        path.write_bytes(edit(path.read_bytes()))

    return change


def change_header(edit):
    """The first shard with another header before the same data."""

    def edit_bytes(raw):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        text = json.dumps(edit(header) or header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return change_bytes(edit_bytes)


def change_tensors(edit):
    """The first shard with other tensors, in a file that is sound, and the index that goes with them."""

    def change(folder):
        path = folder / "model-00001-of-00002.safetensors"
        with SafetensorsFile(path) as file:
            tensors = {name: np.array(file[name]) for name in file}
        edit(tensors)
        write_safetensors(path, tensors)
        found = json.loads((folder / INDEX).read_text())
        found["weight_map"] = {n: s for n, s in found["weight_map"].items() if s != path.name}
        found["weight_map"] |= dict.fromkeys(tensors, path.name)
        (folder / INDEX).write_text(json.dumps(found))

    return change


def pickled(folder):
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


EMBEDDING = "model.embed_tokens.weight"
FIRST = "model-00001-of-00002.safetensors"
DAMAGE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "config.json: not JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "config.json: expected an object"),
    "config with twins": (lambda f: (f / CONFIG).write_text('{"a": 1, "a": 2}'), "config.json.*'a'"),
    "unknown family": (change_config(model_type="bloom"), "model_type 'bloom' is none of gpt2"),
    "no family": (change_config(model_type=...), "model_type None is none of"),
    "another class": (change_config(architectures=["LlamaForSequenceClassification"]), "only LlamaForCausalLM"),
    "unknown key": (change_config(attn_temperature=2.0), "may change what the model computes: 'attn_temperature'"),
    "a key that is not known here": (change_config(attention_bias=True), "attention_bias=True is not known"),
    "unknown activation": (change_config(hidden_act="xielu"), "hidden_act='xielu' must be one of"),
    "unknown rope": (change_config(rope_parameters={"rope_type": "longrope"}), "rope_type 'longrope'"),
    "unknown key of rope": (change_config(rope_parameters={"rope_type": "default", "mscale": 2}), "unknown 'mscale'"),
    "rope is text": (change_config(rope_parameters="yes"), "cannot be read as llama"),
    "missing key": (change_config(hidden_size=...), "there is no 'hidden_size'"),
    "width is text": (change_config(hidden_size="8"), "d_model='8' must be a whole number"),
    "negative width": (change_config(hidden_size=-8), "d_model=-8"),
    "another width": (change_config(intermediate_size=13), r"\[12, 8\], where config.json makes it \[13, 8\]"),
    "a million layers": (change_config(num_hidden_layers=1_000_000), "num_layers=1000000 must be at most"),
    "more layers": (change_config(num_hidden_layers=3), "'model.layers.2.*' is missing"),
    "fewer layers": (change_config(num_hidden_layers=1), "'model.layers.1.*' is left over"),
    "index is no JSON": (lambda f: (f / INDEX).write_text("x"), f"{INDEX}: not JSON"),
    "index without map": (change_index(lambda i: i.pop("weight_map")), "weight_map must be an object"),
    "index names a missing file": (
        change_index(lambda i: i["weight_map"].update({EMBEDDING: "model-3.safetensors"})),
        "model-3.safetensors: no such file|unlike",
    ),
    "index names a path": (
        change_index(lambda i: i["weight_map"].update({EMBEDDING: "../x.safetensors"})),
        "'../x.safetensors' is not the name of a .safetensors file here",
    ),
    "index names an absolute path": (
        change_index(lambda i: i["weight_map"].update({EMBEDDING: "/etc/passwd"})),
        "'/etc/passwd' is not the name",
    ),
    "index lacks a tensor": (change_index(lambda i: i["weight_map"].pop(EMBEDDING)), f"also has tensor '{EMBEDDING}'"),
    "index has a tensor more": (
        change_index(lambda i: i["weight_map"].update({"x": FIRST})),
        "lacks tensor 'x'",
    ),
    "a shard is missing": (lambda f: (f / FIRST).unlink(), f"{FIRST}: no such file"),
    "a shard is empty": (change_bytes(lambda raw: b""), "not a safetensors file, or cut short"),
    "a shard is cut short": (change_bytes(lambda raw: raw[:-7]), "cut short"),
    "a shard has more": (change_bytes(lambda raw: raw + b"x"), "there is more behind them"),
    "a header beyond the file": (change_bytes(lambda raw: (2**40).to_bytes(8, "little") + raw[8:]), "cut short"),
    "a pickle in disguise": (change_bytes(lambda raw: b"PK\x03\x04" + raw), "a pickle"),
    "only a pickle": (pickled, "pytorch_model.bin is a pickle.*save_pretrained"),
    "overlapping offsets": (
        change_header(lambda h: h[EMBEDDING].update(data_offsets=[4, 4 + 11 * 8 * 4])),
        "shares bytes|has a gap",
    ),
    "offsets of another size": (
        change_header(lambda h: h[EMBEDDING].update(data_offsets=[0, 4])),
        "data_offsets say 4",
    ),
    "unknown dtype": (change_header(lambda h: h[EMBEDDING].update(dtype="F128")), "dtype must be one of"),
    "huge shape": (change_header(lambda h: h[EMBEDDING].update(shape=[2**40, 2**40])), "beyond what a machine"),
    "whole numbers": (
        change_tensors(lambda t: t.update({EMBEDDING: np.ones((11, 8), np.int32)})),
        f"'{EMBEDDING}' holds int32",
    ),
    "another shape": (change_tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].T.copy()})), r"\[8, 11\]"),
    "a tensor is missing": (change_tensors(lambda t: t.pop(EMBEDDING)), f"'{EMBEDDING}' is missing"),
    "a tensor more": (change_tensors(lambda t: t.update(extra=np.ones(3, np.float32))), "'extra' is left over"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_understood_is_refused(folder, what):
    """By name, soon, and without memory for what is not there."""
    damage, says = DAMAGE[what]
    damage(folder)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(InputError) as found:
            read_pretrained(folder)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert most < 50e6
    assert re.search(says, str(found.value)), str(found.value)
    assert "\n" not in str(found.value)


# --- runs


def test_a_folder_is_a_run_and_goes_back(folder, tmp_path):
    """With its tokenizer and the ids that its config gives the special tokens."""
    found = json.loads((folder / CONFIG).read_text()) | {"eos_token_id": [7, 3], "bos_token_id": 2}
    (folder / CONFIG).write_text(json.dumps(found))
    assert load_huggingface(folder).tokenizer is None
    tokenizer = make_tokenizer("char", 16, lambda: ["abcabc"])
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    run = load_huggingface(folder)
    assert (run.tokenizer.eos_id, run.tokenizer.bos_id) == (7, 2)
    np.testing.assert_array_equal(run.tokenizer.encode(["abc"])[0], tokenizer.encode(["abc"])[0])
    prompt = Tokens.from_ids([[1, 2, 3]])
    ids = generate(run.model, run.params, prompt, max_new_tokens=3).ids
    save_huggingface(tmp_path / "out", run)
    again = load_huggingface(tmp_path / "out")
    same(again.params, run.params)
    assert (again.config.model, again.tokenizer.eos_id) == (run.config.model, 7)
    np.testing.assert_array_equal(generate(again.model, again.params, prompt, max_new_tokens=3).ids, ids)


def test_a_model_of_no_family_is_not_saved(folder, tmp_path):
    run = load_huggingface(folder)
    model = run.config.model.replace(norm="layernorm")
    odd = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    with pytest.raises(InputError, match="No family"):
        save_huggingface(tmp_path / "out", odd)
    with pytest.raises(InputError, match="must be one of"):
        save_huggingface(tmp_path / "out", run, family="bloom")
    assert not (tmp_path / "out").exists()
