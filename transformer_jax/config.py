"""Frozen dataclasses that say everything about a run, each checked when it is made; `config_model.py` has the model's.

Every field is a flag: `--optimizer.learning-rate 1e-3`. The text after a field is its help. Nothing here imports JAX,
so a wrong flag is answered at once.
"""

import dataclasses
import math
import re
from typing import Literal

from transformer_jax.config_checks import at_least, at_most, check_types, nearest, share
from transformer_jax.config_model import DERIVED, Derived, Mode, ModelConfig, RopeConfig

__all__ = [  # what a run is made of, in one place
    "CheckpointConfig",
    "DataConfig",
    "LossConfig",
    "Mode",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeConfig",
    "RunConfig",
]

OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine", "inverse-sqrt", "wsd"]
ObjectiveName = Literal[
    "auto",
    "causal",
    "sequence-to-sequence",
    "span-corruption",
    "ul2",
    "prefix-lm",
    "continuation",
    "fill-in-the-middle",
    "masked-lm",
    "chat",
]
TokenizerName = Literal["bpe", "bpe-words", "unigram", "word", "char", "bytes"]
BestName = Literal["none", "loss", "accuracy", "exact_match"]
StrategyName = Literal["jit", "pmap", "mesh"]
WriterName = Literal["tensorboard", "wandb", "mlflow", "aim"]


@dataclasses.dataclass(frozen=True)
class SpecialConfig:
    """Which tokens have a role, and where they stand; a tokenizer's own names say it where nothing is given."""

    pad: int | None = None
    """Id of padding. None: of `<pad>` and its like, which is added where it is missing; with any id given, of the
    end."""
    bos: int | None = None
    """Id of what a target begins with. None: as with pad."""
    eos: int | None = None
    """Id of what ends a text. None: as with pad."""
    stops: tuple[int, ...] = ()
    """Ids of what ends an output besides eos, such as the end of a turn."""
    sep: int | None = None
    """Id of what stands between source and target in one sequence. None: as with pad."""
    first: int | None = None
    """Id of the token that every output has to begin with, such as a language. None: any."""
    prompts: Literal["roles", "tokenizer"] = "roles"
    """What a prompt has besides its text. roles: as in training, bos in front of a target, eos behind a source.
    tokenizer: what the tokenizer's own file puts around a text."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 0, "pad", "bos", "eos", "sep", "first")
        if min(self.stops, default=0) < 0:
            raise ValueError(f"special.stops={self.stops} must be at least 0.")

    @property
    def ids(self) -> dict[str, int] | None:
        """The ids that are given, by role; None for none."""
        given = {name: getattr(self, name) for name in ("pad", "bos", "eos", "sep")}
        return {name: value for name, value in given.items() if value is not None} or None

    @property
    def for_training(self) -> "SpecialConfig":
        """The same ids, without what only the prompts of a published model have: training puts roles around a text."""
        return dataclasses.replace(self, first=None, stops=(), prompts="roles")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads and how it becomes batches."""

    train: tuple[str, ...] = ()
    """One path: plain text (.txt, a folder, a glob), or pairs (.tsv, or .jsonl or .parquet with `source` and `target`;
    with `text` they are plain text), or conversations (.jsonl with `messages`). Two paths: parallel files, line by
    line. .gz and .zst are unpacked."""
    validation: tuple[str, ...] = ()
    """The same for validation. None given: validation_fraction of the training data, from its end."""
    mixture: tuple[str, ...] = ()
    """PATH=WEIGHT ...: several sources in place of train, whose rows are dealt in exactly this proportion, however long
    each is. Such as web.jsonl=0.7 books/=0.3. Each is also a validation set of its own."""
    validation_sets: tuple[str, ...] = ()
    """NAME=PATH ...: further validation data, each scored by itself under its name."""
    validation_fraction: float = 0.1
    """Share of the training data held out where no validation data is given."""
    embedded: Literal["none", "dates", "code"] = "none"
    """Data that comes with the package or the machine, read when no path is given: dates in many locales (pairs), or
    the Python standard library (plain text)."""
    tokenizer: str = "bpe"
    """bpe, bpe-words, unigram, word, char or bytes: trained on the training data. Or the path of a tokenizer.json.
    bpe-words: merges of letters within what stands between spaces, as by subword-nmt, for text that is in tokens
    already. word: a token a word, of the most frequent ones, and the others are <unk>."""
    source_tokenizer: str = ""
    """The same for the sources of pairs, where they have a vocabulary of their own and the encoder an embedding table.
    Nothing given: one vocabulary for both."""
    tokenizer_size: int = 8000
    """Entries of a trained bpe, bpe-words, unigram or word tokenizer, special tokens included."""
    bpe_dropout: float = 0.0
    """Chance of a merge to be passed over, each time it could be made, in the training pairs' texts; for tokenizers
    with merges (Provilkov et al. 2020). 0 is none; the paper takes 0.1."""
    bpe_segmentations: int = 8
    """Segmentations of each text that bpe_dropout makes, which epochs read in turn."""
    objective: ObjectiveName = "auto"
    """auto: sequence-to-sequence for pairs; for plain text causal, prefix-lm with a bidirectional prefix, or
    span-corruption with an encoder (Raffel et al. 2020, 3.1.4). ul2: several ways to hide spans or to go on, with the
    way in front (Tay et al. 2022). prefix-lm: a text from a place that is drawn; continuation: from its middle.
    fill-in-the-middle: causal, where the middle of some texts comes last (Bavarian et al. 2022). masked-lm: the tokens
    that were where masks are, for a decoder with a bidirectional prefix, which is then an encoder (Devlin et al. 2019,
    3.1)."""
    source_length: Derived = DERIVED
    """Source tokens in a packed row. None: max_length. A decoder-only model's row has the room of source and target
    together, as far as max_length allows."""
    target_length: Derived = DERIVED
    """Target tokens in a packed row. None: max_length."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a pair that does not fit: stop, or leave it out and count it. It goes for data that the run is
    scored on as well: `left_out` of the scores is the number."""
    noise_density: float = 0.15
    """Share of tokens that span-corruption hides."""
    mean_span: float = 3.0
    """Mean number of tokens in a hidden span."""
    fim_rate: float = 0.5
    """Share of chunks whose middle comes last, of fill-in-the-middle."""
    mask_rate: float = 0.15
    """Share of tokens that masked-lm asks for: of those 80 % are masked, 10 % are another token, 10 % stay."""
    chat_template: str = ""
    """What stands around the turns of conversations: a file with a Jinja template, or its text. Nothing given: that of
    the folder that a run starts from, or <|im_start|>ROLE, what is said, and <|im_end|>."""
    learned_roles: tuple[str, ...] = ("assistant",)
    """Whose turns of a conversation are learned."""
    workers: int = 0
    """Processes that make batches; 0 is a thread beside the training. Each holds the data that is not on the disk."""
    special: SpecialConfig = SpecialConfig()

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 0, "workers")
        at_most(self, 1024, "workers")
        for name in ("fim_rate", "bpe_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        at_least(self, 1, "source_length", "target_length", "mean_span", "bpe_segmentations")
        at_least(self, 16, "tokenizer_size")
        at_most(self, 2_000_000, "tokenizer_size")  # the library takes memory for as many
        for name in ("validation_fraction", "noise_density", "mask_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1).")
        for name in ("train", "validation"):
            if len(getattr(self, name)) > 2:
                raise ValueError(f"data.{name} takes one path, or two parallel files; got {len(getattr(self, name))}.")
        if self.train and self.mixture:
            raise ValueError("data.train and data.mixture: give one of them.")
        names = [text.partition("=")[0] for text in self.validation_sets]
        for text, name in zip(self.validation_sets, names, strict=True):
            if not re.fullmatch(r"[\w.-]+=.+", text) or names.count(name) > 1:
                raise ValueError(f"validation_sets: {text!r} must be NAME=PATH, each name once.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov and Hutter 2019), adafactor (Shazeer and Stern 2018), lion (Chen et al. 2023), muon (Jordan
    2024), sgd."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    schedule: ScheduleName = "cosine"
    """After the warm-up: constant; linear or cosine down to final_fraction; inverse-sqrt of the step (Vaswani et al.
    2017, 5.3); wsd: constant, then linear down over decay_fraction of the run (Hu et al. 2024)."""
    warmup_steps: int | None = None
    """Steps of linear increase from 0. None: a tenth of the run."""
    final_fraction: float = 0.1
    """Learning rate at the end as a share of the peak (linear, cosine, wsd)."""
    decay_fraction: float = 0.2
    """Share of the run in which wsd decays."""
    b1: float = 0.9
    """Decay of the first moment; momentum of sgd and muon."""
    b2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    momentum_dtype: Literal["parameters", "bfloat16"] = "parameters"
    """What the first moment is kept in: as the parameters are, or in half the memory of float32."""
    weight_decay: float = 0.01
    """Decoupled; matrices only, never norms, biases or embeddings."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 is no clipping."""
    accumulate: int = 1
    """Microbatches that a batch is cut into, one after the other."""
    ema_decay: float = 0.0
    """Decay of the moving average of the parameters that evaluation uses; 0 is none."""
    spike_factor: float = 0.0
    """Leave out a step whose gradient norm is above so many times the median of the latest 128; 0 is never."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be above 1, or 0 for no guard against spikes.")
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "clip_norm")
        at_least(self, 1e-30, "eps")  # else a parameter without a gradient becomes 0 / 0
        at_least(self, 1, "accumulate")
        share(self, "b1", "b2", "ema_decay")
        if self.name == "adafactor" and self.momentum_dtype != "parameters":
            raise ValueError(f"momentum_dtype={self.momentum_dtype!r}: adafactor keeps no momentum.")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy and what is added to it in training; evaluation is always plain."""

    label_smoothing: float = 0.0
    """Share of each target's probability spread evenly over the vocabulary (Vaswani et al. 2017, 5.4)."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits near normalised (Chowdhery et al. 2022, section 5)."""
    balance_loss: float = 0.01
    """Weight of the loss that spreads the tokens of a row evenly over experts (Fedus et al. 2022, section 2.2)."""
    router_z_loss: float = 0.001
    """Weight of log(Z)^2 of the router's logits (Zoph et al. 2022, section 3.4)."""
    logits_mib: int | None = None
    """Float32 logits that a device holds at a time, in MiB: tokens are taken in parts of that size, and gradients are
    made with each part. 0: all at once; None: 128 on a CPU and 1024 on an accelerator."""

    def __post_init__(self) -> None:
        check_types(self)
        share(self, "label_smoothing")
        at_least(self, 0, "z_loss", "balance_loss", "router_z_loss", "logits_mib")


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Which parameters move; all of them where nothing is given. Patterns are regular expressions that fit anywhere in
    the path of a parameter, such as decoder/block_0/self_attention/query/w_DHK."""

    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are."""
    lora: tuple[str, ...] = ()
    """PATTERN=RANK: weights that get an adapter of that rank (Hu et al. 2022), and nothing else moves. Such as
    attention/(query|value)=8."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by this over their rank."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.freeze and self.lora:
            raise ValueError("freeze and lora: with adapters all else is frozen; give one of them.")
        for text in self.lora:
            if not re.fullmatch(r".+=[1-9][0-9]*", text):
                raise ValueError(f"lora={text!r} must be PATTERN=RANK, such as attention/(query|value)=8.")
        for pattern in (*self.freeze, *(text.rpartition("=")[0] for text in self.lora)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Where arrays live."""

    strategy: StrategyName = "jit"
    """jit: one device. pmap: replicated on all devices. mesh: sharded as `mesh` says."""
    mesh: str = "data=-1"
    """Sizes of the mesh's axes, such as data=2,fsdp=2,tensor=2; -1 is the rest of the devices. data: a device reads a
    part of the batch. fsdp: that, and parameters are split. tensor: layers are split (Shoeybi et al. 2019). context:
    sequences are split. expert: a device reads a part of the batch and has a part of the experts."""
    coordinator: str = ""
    """HOST:PORT of the first of several processes, the same in all. Slurm, Open MPI 4 and TPU pods say it."""
    num_processes: int | None = None
    """Number of processes of the job."""
    process_id: int | None = None
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "num_processes")
        at_least(self, 0, "process_id")
        given = [name for name in ("num_processes", "process_id") if getattr(self, name) is not None]
        if len(given) != (2 if self.coordinator else 0):
            raise ValueError(
                f"coordinator={self.coordinator!r}, num_processes={self.num_processes} and "
                f"process_id={self.process_id}: give all three, or none."
            )
        if self.coordinator:
            if not re.fullmatch(r".+:[0-9]+", self.coordinator):
                raise ValueError(f"coordinator={self.coordinator!r} must be HOST:PORT.")
            if (self.process_id or 0) >= (self.num_processes or 0):
                raise ValueError(f"process_id={self.process_id} must be below num_processes={self.num_processes}.")
        self.axes  # noqa: B018 - raises where it cannot be read

    @property
    def axes(self) -> dict[str, int]:
        """`mesh` as axis sizes. Raises ValueError."""
        known, axes = ("data", "fsdp", "expert", "context", "tensor"), {}
        for part in self.mesh.split(","):
            name, _, size = part.strip().partition("=")
            if name not in known:
                raise ValueError(
                    f"mesh={self.mesh!r}: the axes are {', '.join(known)}; got {name!r}.{nearest(name, known)}"
                )
            if name in axes:
                raise ValueError(f"mesh={self.mesh!r} names {name} twice.")
            if not re.fullmatch("-1|[1-9][0-9]*", size):
                raise ValueError(f"mesh={self.mesh!r}: the size of {name} must be a whole number, or -1 for the rest.")
            axes[name] = int(size)
        if list(axes.values()).count(-1) > 1:
            raise ValueError(f"mesh={self.mesh!r}: only one axis can be -1.")
        return axes


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay for ever; 0 is none."""
    best: BestName = "loss"
    """The checkpoint that is best by this validation metric stays too; it is saved when it is found."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "every", "keep")
        at_least(self, 0, "keep_every")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run, whole: what `config.json` in its folder says."""

    recipe: str = "dates"
    """Name of the recipe that the run started from."""
    workdir: str = ""
    """Folder of the run. None given: runs/RECIPE, or runs/RECIPE-MODE where the mode is not the recipe's own."""
    steps: int = 1000
    """Updates of the parameters."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    batch_size: int = 64
    """Packed rows in a batch, over all devices and microbatches."""
    batch_tokens: int = 0
    """Target tokens in a batch, in place of batch_size: as many packed rows as hold so many; 0 is batch_size rows."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_rows: int = 1024
    """Validation rows that an evaluation during training reads at most; 0 is all. The last evaluation reads all."""
    log_every: int = 10
    """Steps between lines of metrics."""
    writers: tuple[WriterName, ...] = ("tensorboard",)
    """Where metrics and samples go besides metrics.jsonl and samples.txt; each but tensorboard is an extra of that
    name. They are kept in the run's folder unless the service's own variables say otherwise."""
    num_samples: int = 200
    """Validation examples decoded for exact match (pairs); a few of them are written to samples.txt."""
    max_new_tokens: int = 128
    """Tokens that a sample may have."""
    init_from: str = ""
    """A run's folder, or one that `transformers` has saved, whose parameters, model and tokenizer this run starts
    from. Nothing given: parameters are drawn."""
    stop_at: int = 0
    """Stop, with everything saved, at this step of the schedule; 0 is the end."""
    stop_after: str = ""
    """Stop, with everything saved, after this much time, such as 3h50m or 90s."""
    max_skipped: int = 10
    """Stop with status 3 after so many steps in a row that were left out, their numbers not finite or a spike."""
    stall_after: str = "1h"
    """Where no step ends for this long, say where every thread is and stop with status 7; nothing is never."""
    accept_changes: bool = False
    """Go on with the run in the folder although its config, data or tokenizer has changed."""
    deterministic: bool = False
    """On a GPU, leave out what makes the same run differ in its last bits: atomic additions and timed choices of
    kernels. Steps get slower, by how much depends on the model. On CPU and TPU it changes nothing and costs nothing."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    tuning: TuningConfig = TuningConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        check_types(self, seed=2**32 - 1)
        at_least(self, 1, "steps", "batch_size", "eval_every", "log_every", "max_new_tokens")
        at_least(self, 0, "seed", "eval_rows", "num_samples", "stop_at", "batch_tokens")
        if (self.optimizer.warmup_steps or 0) > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must not exceed steps={self.steps}."
            )
        if self.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of optimizer.accumulate={self.optimizer.accumulate}."
            )
        for name in ("source_length", "target_length"):
            length = getattr(self.data, name)
            if length is not None and length > self.model.max_length:
                raise ValueError(f"data.{name}={length} must not exceed model.max_length={self.model.max_length}.")
        at_least(self, 1, "max_skipped")
        if len(set(self.writers)) < len(self.writers):
            raise ValueError(f"writers={' '.join(self.writers)}: give each once.")
        for name in ("stop_after", "stall_after"):
            self.seconds(name)

    def seconds(self, name: str) -> float:
        """A field that is a time, in seconds; infinity where it is not given. Raises ValueError."""
        text = getattr(self, name)
        if not text:
            return math.inf
        parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([hms])", text)
        seconds = sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)
        if "".join(map("".join, parts)) != text or not seconds:
            raise ValueError(f"{name}={text!r} must be a time such as 3h50m, 20m or 90s.")
        return seconds
