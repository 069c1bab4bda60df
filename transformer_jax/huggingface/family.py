"""What a family of published models is: what its config.json says in our words, and the rows of its tensors.

Every family is the same Transformer with other config values. A key of a config that is neither in a family's table nor
known to change nothing is refused, as it may change what the model computes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.config_checks import shown
from transformer_jax.errors import InputError
from transformer_jax.huggingface.rows import Row

Json = dict[str, Any]

# What says how a model was trained, is run or was saved, and not what it computes.
IGNORED = frozenset(
    """_name_or_path architectures attention_dropout attn_pdrop auto_map bos_token_id chunk_size_feed_forward
    classifier_dropout classifier_dropout_rate classif_dropout activation_dropout dropout dropout_rate
    decoder_layerdrop decoder_start_token_id
    do_sample dtype early_stopping embd_pdrop encoder_layerdrop eos_token_id forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label init_std initializer_factor initializer_range is_encoder_decoder
    label2id layerdrop length_penalty max_length min_length model_type n_ctx
    no_repeat_ngram_size num_beams num_labels output_past output_router_logits pad_token_id prefix pretraining_tp
    problem_type resid_pdrop router_aux_loss_coef router_jitter_noise summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params tie_encoder_decoder tokenizer_class
    torch_dtype transformers_version use_cache cache_implementation bad_words_ids _num_labels save_step is_llama_config
    transformers.js_config sliding_window_size""".split()  # noqa: SIM905
)
# of keys that any family may have, the one value that is known
EVERYWHERE: Json = {"is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None}
EVERYWHERE |= {"pruned_heads": {}}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of their config.json and the field of ours that it is.

    Attributes:
        theirs, ours: their names.
        default: what theirs is where it is missing; ... is that it must not be.
        words: their words for ours, where they differ.
        older: another name that it has had.
    """

    theirs: str
    ours: str
    default: Any = ...
    words: dict[Any, Any] | None = None
    older: str = ""

    def read(self, config: Json) -> Any:
        value = config.pop(self.theirs, config.pop(self.older, self.default))
        if value is ...:
            raise InputError(f"there is no {self.theirs!r}.")
        if self.words is not None:
            if not isinstance(value, str | bool) or value not in self.words:
                raise InputError(f"{self.theirs}={shown(value)} must be one of {', '.join(map(str, self.words))}.")
            return self.words[value]
        return value

    def write(self, config: ModelConfig) -> Any:
        value = getattr(config, self.ours)
        if self.words is None:
            return value
        return next((theirs for theirs, ours in self.words.items() if ours == value), next(iter(self.words)))


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        architecture: the class in `transformers`.
        base: the class of the same without an output layer, whose files have all of a tied model.
        keys: what has one field of ours.
        fields: fields of ours that all of the family share.
        only: keys of theirs with the one value that is known here.
        older: the same of keys that only older files have, which are not written.
        rows: of their tensors, or a function of the config that gives them.
        read: (what is left of config.json, the fields so far) -> more fields; it takes out what it has understood.
        write: (config) -> the keys that `read` understands.
        prefix: of all names but the output layer's, which some files leave out.
        buffers: tensors that say nothing, as patterns.
        copies: tensors that may be there as copies of others, which they must equal.
        tables: (config) -> tensors that no one has trained: where they are there, they must be these.
        tables_saved: whether `transformers` wants them.
        zeros: tensors that may be missing, and are zeros then.
        may_untie: an output layer that is there and is no copy is one of its own, whatever the config says.
    """

    architecture: str
    keys: tuple[Key, ...]
    fields: Json
    rows: tuple[Row, ...] | Callable[[ModelConfig], tuple[Row, ...]]
    base: str = ""
    only: Json = dataclasses.field(default_factory=dict)
    older: Json = dataclasses.field(default_factory=dict)
    read: Callable[[Json, Json], Json] = lambda config, fields: {}
    write: Callable[[ModelConfig], Json] = lambda config: {}
    prefix: str = ""
    buffers: tuple[str, ...] = ()
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    may_untie: bool = False
    tables: Callable[[ModelConfig], dict[str, np.ndarray]] | None = None
    tables_saved: bool = False

    def understood(self, config: Json) -> Json:
        """Our fields, from a config.json of the family that is used up.

        Raises:
            InputError: a key is unknown, or has a value that this package does not know.
        """
        for key, known in (EVERYWHERE | self.older | self.only).items():
            if (value := config.pop(key, known)) != known:
                raise InputError(f"{key}={shown(value)} is not known, only {shown(known)}.")
        fields = dict(self.fields)
        for key in self.keys:
            value = key.read(config)
            if value is not None:
                fields[key.ours] = value
        fields |= self.read(config, fields)
        if unknown := [key for key in config if key not in IGNORED]:
            raise InputError(f"unknown, and may change what the model computes: {', '.join(map(shown, unknown))}.")
        return fields

    def written(self, config: ModelConfig) -> Json:
        """What `understood` reads, where the family has such models."""
        return {key.theirs: key.write(config) for key in self.keys} | self.only | self.write(config)

    def rows_of(self, config: ModelConfig) -> tuple[Row, ...]:
        """The rows for a model."""
        return self.rows(config) if callable(self.rows) else self.rows
