"""A folder as `transformers` saves it -> our config and parameters, and back.

Nothing is loaded that is not understood: an architecture, a key of the config, a tensor that is missing, left over or
of another shape end with one message that names it. Files are safetensors; a pickle is refused.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer_jax.axes import sizes
from transformer_jax.config import ModelConfig, RopeConfig
from transformer_jax.config_checks import nearest, shown
from transformer_jax.config_file import no_twins
from transformer_jax.config_model import SOFTMAX
from transformer_jax.errors import InputError
from transformer_jax.files import decode, read_whole
from transformer_jax.huggingface.families import FAMILIES
from transformer_jax.huggingface.family import Family
from transformer_jax.huggingface.rows import Piece, pieces
from transformer_jax.model.transformer import Transformer
from transformer_jax.partition import Partitioner
from transformer_jax.run import ONE_DEVICE, example_inputs
from transformer_jax.safetensors_file import Pending, SafetensorsFile, write_safetensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_JSON = 64 * 2**20
SHARD = 5e9  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises InputError."""
    name = str(path)
    try:
        found = json.loads(decode(name, read_whole(name, MOST_JSON)), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f"{name}: expected an object; got {shown(found)}.")
    return found


# --- the config


def read_config(found: Mapping[str, Any], name: str = CONFIG) -> tuple[Family, ModelConfig]:
    """What their config.json says, in our words.

    Raises:
        InputError: the family is unknown, or a key is, or has a value that this package does not know.
    """
    rest, kind = dict(found), found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = nearest(kind, FAMILIES) if isinstance(kind, str) else ""
        raise InputError(f"{name}: model_type {shown(kind)} is none of {', '.join(FAMILIES)}.{near}")
    family = FAMILIES[kind]
    classes = rest.get("architectures")
    if classes and not any(name in classes for name in (family.architecture, family.base) if name):
        raise InputError(f"{name}: architectures {shown(classes)}: only {family.architecture} of {kind} is known.")
    try:
        fields = family.understood(rest)
        if isinstance(fields.get("rope"), dict):
            fields["rope"] = RopeConfig(**fields["rope"])
    except InputError as error:
        raise InputError(f"{name} of {kind}: {error}") from None
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{name}: cannot be read as {kind}: {type(error).__name__}: {error}.") from None
    try:
        return family, ModelConfig(**fields)
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{name}: {error}") from None


class MisfitError(InputError):
    """A family has no such models: `fields` of them are others."""

    def __init__(self, message: str, fields: int) -> None:
        super().__init__(message)
        self.fields = fields


def write_config(kind: str, config: ModelConfig) -> dict[str, Any]:
    """Their config.json of a family for a model of ours.

    Raises:
        InputError: the family has no such models; the message names the fields that stand in the way.
    """
    family = FAMILIES[kind]
    found = family.written(config)
    found |= {"model_type": kind, "architectures": [family.architecture], "dtype": config.param_dtype}
    try:
        back = read_config(found)[1]
    except InputError as error:
        raise InputError(f"As {kind} this model cannot be saved: {error}") from None
    other = differing(what_it_is(back), what_it_is(config))
    if other:
        fields = ", ".join(f"{name}={getattr(config, name)!r} (it has {getattr(back, name)!r})" for name in other)
        far = 100 * ("mode" in other)
        raise MisfitError(f"As {kind} this model cannot be saved: {fields}.", far + len(other))
    return found


def what_it_is(config: ModelConfig) -> ModelConfig:
    """The config with all that does not change what the model computes as it is by default."""
    said = ["dropout_rate", "attention_dropout_rate", "dtype", "linear_dtype", "param_dtype", "remat", "scan_layers"]
    said += ["attention"] if config.attention in SOFTMAX else []
    if config.mode == "decoder-only":
        said += ["num_encoder_layers", "encoder_windows", "share_source_embedding", "cross_position"]
    else:
        said += ["prefix_attention"]
    said += [] if config.position == "rope" else ["rope"]
    said += [] if config.position == "t5" else ["relative_buckets", "relative_max_distance"]
    said += [] if config.num_experts else ["experts_per_token", "normalize_gates"]
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return config.replace(**{name: fields[name] for name in said})


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Names of the fields in which two models differ."""
    return [name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)]


# --- the tensors


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, whatever files they are in; use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files, self._stack = folder, {}, ExitStack()
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        folder = self.folder
        if (folder / INDEX).exists():
            found = read_json(folder / INDEX).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
                raise InputError(f"{folder / INDEX}: weight_map must be an object of file names.")
            for shard in dict.fromkeys(found.values()):
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise InputError(f"{folder / INDEX}: {shown(shard)} is not the name of a .safetensors file here.")
                file = self._stack.enter_context(SafetensorsFile(folder / shard))
                named = {name for name, where in found.items() if where == shard}
                if named != set(file):
                    odd = sorted(named ^ set(file))[0]
                    where = "lacks" if odd in named else "also has"
                    raise InputError(f"{folder / shard}: {where} tensor {shown(odd)}, unlike {INDEX} says.")
                self._files |= dict.fromkeys(file, file)
            return
        if not (folder / WEIGHTS).exists():
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            advice = f"{pickles[0]} is a pickle, which could run code when it is read. " if pickles else ""
            advice += (
                'Convert it where you trust it: python -c "from transformers import AutoModel as M; '
                "M.from_pretrained('IN').save_pretrained('OUT')\""
                if pickles
                else ""
            )
            raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}. {advice}".rstrip())
        file = self._stack.enter_context(SafetensorsFile(folder / WEIGHTS))
        self._files = dict.fromkeys(file, file)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].entries[name].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._files = {}
        self._stack.close()


def shapes_of(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by its path."""
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), *example_inputs(config))["params"]
    return {path: cast(Any, leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def _named(family: Family, wanted: list[Piece], tensors: Tensors) -> dict[str, str]:
    """Their names as the files have them, without the prefix where those leave it out."""
    bare = family.prefix and not any(name.startswith(family.prefix) for name in tensors)
    return {piece.name: piece.name.removeprefix(family.prefix) if bare else piece.name for piece in wanted}


def _check(
    family: Family, wanted: list[Piece], names: Mapping[str, str], tensors: Tensors, config: ModelConfig
) -> None:
    """Raises InputError where a tensor is missing, left over, or of another shape."""
    folder, length = tensors.folder, sizes(config)
    for piece in wanted:
        name = names[piece.name]
        if name not in tensors:
            raise InputError(f"{folder}: tensor {shown(name)} is missing.{nearest(name, list(tensors))}")
        if not jnp.issubdtype(tensors.dtype(name), jnp.floating):
            raise InputError(f"{folder}: tensor {shown(name)} holds {tensors.dtype(name)}, not floating point.")
        if tensors.shape(name) != piece.row.shape(length):
            raise InputError(
                f"{folder}: tensor {shown(name)} has the shape {list(tensors.shape(name))}, where config.json makes it "
                f"{list(piece.row.shape(length))}."
            )
    tables = {} if family.tables is None else family.tables(config)
    for name in tensors.keys() - set(names.values()):
        if (table := tables.get(name)) is not None:
            if tensors.shape(name) != table.shape or not np.allclose(tensors[name], table, rtol=0, atol=1e-3):
                raise InputError(f"{folder}: tensor {shown(name)} is not the table of sines that the family has.")
            continue
        original = family.copies.get(name, "") or family.copies.get(family.prefix + name, "")
        original = names.get(original, original)
        if original in tensors and np.array_equal(tensors[name], tensors[original]):
            continue
        if original:
            raise InputError(f"{folder}: tensor {shown(name)} should be a copy of {original}, and is another.")
        if not any(re.fullmatch(pattern, name) for pattern in family.buffers):
            raise InputError(f"{folder}: tensor {shown(name)} is left over: no part of this model is made of it.")


class Part(NamedTuple):
    """What one tensor of theirs gives to a parameter.

    Attributes:
        piece: the tensor.
        number: of the parameter among those that the tensor holds.
        place: of what it gives, by the parameter's first axes.
        tensor: gives the tensor.
    """

    piece: Piece
    number: int
    place: tuple[int, ...]
    tensor: Callable[[], np.ndarray]


def _tying(family: Family, config: ModelConfig, tensors: Tensors) -> dict[str, bool]:
    """What the tensors say of an output layer that the config calls tied."""
    name = "lm_head.weight"
    if not (family.may_untie and config.tie_embeddings and name in tensors and family.copies[name] in tensors):
        return {}
    return {} if np.array_equal(tensors[name], tensors[family.copies[name]]) else {"tie_embeddings": False}


def read_model(folder: str | Path) -> ModelConfig:
    """The config of a model that `transformers` has saved, whose weights are looked at and not read.

    Raises:
        InputError: see `read_pretrained`.
    """
    folder = Path(folder)
    family, config = read_config(read_json(folder / CONFIG), str(folder / CONFIG))
    with Tensors(folder) as tensors:
        return config.replace(**_tying(family, config, tensors))


def _array(leaf: Any, where: Any, parts: list[Part], length: dict[str, int]) -> jax.Array:
    """A parameter where it lives: each device's part of it is made on its own, out of mapped files."""

    def make(index: Any) -> np.ndarray:
        ends = [each.indices(size)[:2] for each, size in zip(index, leaf.shape, strict=True)]
        array = (np.empty if parts else np.zeros)([stop - start for start, stop in ends], leaf.dtype)
        for piece, number, place, tensor in parts:
            here = tuple(at - start for at, (start, _) in zip(place, ends, strict=False))
            if all(0 <= at < stop - start for at, (start, stop) in zip(here, ends, strict=False)):
                array[here] = piece.row.split(tensor(), length)[number][index[len(place) :]]
        return array

    if where is None:
        return jax.device_put(make((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, where, make)


def read_pretrained(
    folder: str | Path, partitioner: Partitioner = ONE_DEVICE, **changes: Any
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters of a model that `transformers` has saved.

    One parameter after the other is read from the files to where it lives, so besides the result the host's memory
    holds no more than its devices' parts of one parameter.

    Args:
        folder: with config.json and model.safetensors, or several files and their index.
        partitioner: says where parameters live.
        changes: of fields that change how the model is computed, such as scan_layers or param_dtype.

    Raises:
        InputError: anything in it is not understood, missing, left over or damaged; the message names it.
    """
    folder = Path(folder)
    family, config = read_config(read_json(folder / CONFIG), str(folder / CONFIG))
    params: dict[str, jax.Array] = {}
    with Tensors(folder) as tensors:
        config = config.replace(**changes | _tying(family, config, tensors))
        shapes, length = shapes_of(config), sizes(config)
        wanted = list(pieces(family.rows_of(config), config, shapes))
        missing = set(shapes) - {path for piece in wanted for path, _ in piece.places}
        if missing:
            raise InputError(f"{folder}: a {family.architecture} has no {sorted(missing)[0]}.")
        names = _named(family, wanted, tensors)
        wanted = [each for each in wanted if each.name not in family.zeros or names[each.name] in tensors]
        _check(family, wanted, names, tensors, config)
        places: dict[str, Any] = dict(flatten_dict(partitioner.shardings(unflatten_dict(shapes, sep="/")), sep="/"))
        parts: dict[str, list[Part]] = {path: [] for path in shapes}
        for piece in wanted:
            tensor = functools.partial(tensors.__getitem__, names[piece.name])
            for number, (path, place) in enumerate(piece.places):
                parts[path].append(Part(piece, number, place, tensor))
        for path, leaf in shapes.items():
            params[path] = _array(leaf, places[path], parts[path], length)
    return config, unflatten_dict(params, sep="/")


def _shards(tensors: Mapping[str, Pending], most: float) -> list[dict[str, Pending]]:
    """Tensors in turn, in files of at most so many bytes; one that is larger has a file of its own."""
    shards: list[dict[str, Pending]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + tensor.nbytes > most:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _write_tensors(folder: Path, tensors: Mapping[str, Pending], most: float) -> None:
    """One file, or several and their index; what a folder has of the other kind goes."""
    shards = _shards(tensors, most)
    (folder / (INDEX if len(shards) == 1 else WEIGHTS)).unlink(missing_ok=True)
    if len(shards) == 1:
        return write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    stem, weight_map = WEIGHTS.partition(".")[0], {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def write_pretrained(
    folder: str | Path,
    kind: str,
    config: ModelConfig,
    params: Mapping[str, Any],
    shard_bytes: float = SHARD,
    **tokens: int | None,
) -> None:
    """A model as a folder that `transformers` loads. One tensor after the other is brought to the host and written.

    Args:
        folder: is made; what it has of these names is replaced.
        kind: the family, a `model_type`.
        config: the model's.
        params: its parameters.
        shard_bytes: most of a file; a larger model has several, and an index.
        tokens: ids of special tokens, such as eos_token_id, which go into config.json.

    Raises:
        InputError: the family has no such models; the message names the fields that stand in the way.
    """
    folder, family = Path(folder), FAMILIES[kind]
    found = write_config(kind, config) | tokens
    flat: dict[str, Any] = dict(flatten_dict(dict(params), sep="/"))
    length = sizes(config)
    tensors: dict[str, Pending] = {}

    def joined(piece: Piece) -> np.ndarray:
        arrays = [flat[path][index] if index else flat[path] for path, index in piece.places]
        return piece.row.joined([np.asarray(array) for array in arrays], length)

    for piece in pieces(family.rows_of(config), config, flat):
        kept = np.dtype(flat[piece.places[0][0]].dtype)
        tensors[piece.name] = Pending(kept, piece.row.shape(length), functools.partial(joined, piece))
    count = sum(math.prod(leaf.shape) for leaf in flat.values())
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == count, "a parameter has no row"
    if family.tables is not None and family.tables_saved:
        tensors |= {name: Pending.of(table) for name, table in family.tables(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, tensors, shard_bytes)
    (folder / CONFIG).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", "utf-8")
