"""One Transformer's settings: every choice of the model is one field here. `config.py` has those of a run.

Nothing here imports JAX, so a wrong flag is answered at once.
"""

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

from transformer_jax.config_checks import at_least, at_most, check_types, share

Mode = Literal["encoder-decoder", "decoder-only"]
PositionName = Literal["sinusoidal", "sinusoidal_t2t", "learned", "rope", "alibi", "t5", "none"]
NormName = Literal["layernorm", "rmsnorm", "rmsnorm1p"]
PlacementName = Literal["pre", "post", "sandwich"]
ActivationName = Literal["relu", "gelu", "gelu_tanh", "silu", "relu_squared", "tanh"]
RopeScalingName = Literal["none", "linear", "ntk", "llama3", "yarn"]
DtypeName = Literal["float32", "bfloat16", "float64"]
RematName = Literal["none", "dots", "full"]

# A field that is worked out from the others when it is left None. To the model's code it is always a number.
if TYPE_CHECKING:
    Derived = int
    DerivedSwitch = bool
    DerivedSizes = tuple[int, ...]
    AttentionName = str  # as `add_attention_name` can add to them
else:
    Derived = int | None
    DerivedSwitch = bool | None
    DerivedSizes = tuple[int, ...] | None
    AttentionName = Literal["auto", "reference", "blocks", "xla", "cudnn", "splash"]
DERIVED: Any = None
SOFTMAX = get_args(AttentionName)  # ways to compute one and the same attention

UNROLLED_LAYERS = 16  # deeper stacks take long to compile layer by layer, and gain nothing by it: `bench compile`


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, section 3.4) and the ways to stretch them over longer texts."""

    base: float = 10_000.0
    """Wavelength of the slowest pair of features, divided by 2 pi."""
    local_base: float | None = None
    """Of layers with a window, which are then not stretched either (Gemma 3). None: they are as the others."""
    fraction: float = 1.0
    """Share of each head's width that turns; the rest carries no position (GPT-NeoX: 0.25)."""
    scaling: RopeScalingName = "none"
    """linear: positions / factor (Chen et al. 2023). ntk: a larger base (bloc97 2023). llama3: slow features only
    (Llama 3.1). yarn: by wavelength, with a temperature (Peng et al. 2023, section 3)."""
    factor: float = 1.0
    """How many times longer than the original the texts may be."""
    original_length: int = 8192
    """Length in tokens that the model was first trained with (llama3 and yarn)."""
    low: float = 1.0
    """Turns over the original length below which a feature is stretched in full (llama3: 1; yarn: 1)."""
    high: float = 4.0
    """Turns over the original length above which a feature is left alone (llama3: 4; yarn: 32)."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least(self, 1, "factor", "original_length")
        for name in ("base", "local_base"):
            if getattr(self, name) is not None and getattr(self, name) <= 1:
                raise ValueError(f"rope.{name}={getattr(self, name)} must be above 1.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"rope.fraction={self.fraction} must lie in (0, 1].")
        if not 0 < self.low < self.high:
            raise ValueError(f"rope.low={self.low} must be above 0 and below rope.high={self.high}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Transformer. The defaults are those of Vaswani et al. 2017, with the norms before the sublayers.

    Fields that are None by default are derived from the others. Raises ValueError, with the fields' names, for a
    combination that cannot be built.
    """

    mode: Mode = "encoder-decoder"
    """encoder-decoder: a full Transformer. decoder-only: its decoder without cross-attention."""
    vocab_size: Derived = DERIVED
    """Rows of the embedding table. None: as many as the tokenizer has, filled in by `train`."""
    d_model: int = 512
    """Width of the residual stream."""
    num_layers: int = 6
    """Decoder blocks."""
    num_encoder_layers: Derived = DERIVED
    """Encoder blocks; a decoder-only model has none whatever this says. None: num_layers."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: Derived = DERIVED
    """Key/value heads: num_heads is multi-head, 1 is multi-query (Shazeer 2019), between them is grouped-query
    attention (Ainslie et al. 2023). None: num_heads."""
    head_dim: Derived = DERIVED
    """Width of one head. None: d_model / num_heads."""
    d_ff: Derived = DERIVED
    """Width of the feed-forward layer. None: 4 * d_model."""
    max_length: int = 512
    """Longest sequence in tokens, on either side."""
    position: PositionName = "sinusoidal"
    """How order enters: sinusoidal (Vaswani et al. 2017, 3.5), sinusoidal_t2t (the same up to a wavelength of exactly
    20,000 pi, as in the authors' code), learned, rope (Su et al. 2021), alibi (Press et al. 2022), t5 relative bias
    (Raffel et al. 2020, 2.1), none."""
    position_offset: int = 0
    """What the first place is counted as by sinusoidal and learned positions; a learned table has so many rows more
    (fairseq counts from 2)."""
    cross_position: Literal["none", "same"] = "none"
    """Order in cross-attention. none: it carries none, as in T5 (a target and a source place have no distance).
    same: the rope, alibi or t5 of self-attention, both sides counted from 0. Windows never apply there."""
    rope: RopeConfig = RopeConfig()
    relative_buckets: int = 32
    """Buckets of the T5 relative bias."""
    relative_max_distance: int = 128
    """Distance from which on all share the last bucket of the T5 relative bias."""
    norm: NormName = "layernorm"
    """layernorm (Ba et al. 2016), rmsnorm (Zhang and Sennrich 2019), or rmsnorm1p, whose scale is 1 plus what it learns
    (Gemma)."""
    norm_placement: PlacementName = "pre"
    """pre: before each sublayer (Xiong et al. 2020). post: after the sum (Vaswani et al. 2017). sandwich: before and
    after the sublayer, within the residual (Ding et al. 2021)."""
    parallel_residual: bool = False
    """All sublayers of a block read what enters the block, and their outputs are added to it together (Black et al.
    2022, section 2.1)."""
    norm_eps: float = 1e-6
    """Added to the variance."""
    embedding_norm: bool = False
    """A norm right after the embedding (BART)."""
    activation: ActivationName = "relu"
    """Of the feed-forward layer."""
    gated: bool = False
    """Feed-forward with a gate: activation(gate(x)) * up(x) (Shazeer 2020); silu gives SwiGLU."""
    use_bias: bool = True
    """Biases in linear layers and layer norms."""
    qkv_bias: DerivedSwitch = DERIVED
    """Biases of queries, keys and values. None: as use_bias."""
    output_bias: bool = False
    """A bias for each entry of the vocabulary, added to the logits (Marian)."""
    num_experts: int = 0
    """Feed-forward layers that each token chooses among (mixture of experts, Shazeer et al. 2017); 0 is one for all."""
    experts_per_token: Derived = DERIVED
    """Experts that a token goes through. None: 2, or 1 where there is 1."""
    num_shared_experts: int = 0
    """Experts that every token goes through besides those it chooses (Dai et al. 2024, section 3.2)."""
    expert_capacity: float = 0.0
    """Places that an expert has for the tokens of one row, as a multiple of an even share; tokens beyond are passed by
    (Lepikhin et al. 2021, section 2.2). 0: no limit, no token is dropped."""
    normalize_gates: bool = True
    """The weights of a token's experts add up to 1 (Jiang et al. 2024, section 2.1). False: they are the router's
    probabilities as they are (Fedus et al. 2022, section 2.1)."""
    qk_norm: bool = False
    """Norm over each head's queries and keys (Dehghani et al. 2023, section 2)."""
    query_scale: float | None = None
    """Factor on queries. None: 1 / sqrt(head_dim). T5: 1."""
    attention: AttentionName = "auto"
    """How attention is computed. auto: by the device's kernel where it fits. reference: all logits at once. blocks: of
    a part of the queries at a time, without the keys after them. xla, cudnn: jax.nn.dot_product_attention. splash:
    JAX's kernel for TPU. A program can add attentions of other kinds by name: transformer_jax.add_attention."""
    windows: tuple[int, ...] = (0,)
    """Self-attention window of each layer in tokens, repeated over the layers; 0 is no window. A decoder's query sees
    itself and window - 1 keys before it, an encoder's also as many after it (Beltagy et al. 2020)."""
    encoder_windows: DerivedSizes = DERIVED
    """Those of the encoder's layers. None: windows."""
    attention_softcap: float | None = None
    """Attention logits become cap * tanh(logits / cap) (Gemma 2)."""
    logits_softcap: float | None = None
    """The same for the output logits."""
    prefix_attention: Literal["causal", "bidirectional"] = "causal"
    """How a decoder-only model's prefix attends to itself; bidirectional is a prefix LM (Raffel et al. 2020, 3.2)."""
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(d_model) (Vaswani et al. 2017, 3.4)."""
    scale_logits: bool = False
    """Divide what enters the output layer by sqrt(d_model) (T5, when tied)."""
    tie_embeddings: bool = True
    """The output layer is the target embedding, transposed (Press and Wolf 2017)."""
    share_source_embedding: bool = True
    """The encoder reads the target's embedding table instead of one of its own."""
    source_vocab_size: int | None = None
    """Rows of the encoder's own embedding table. None: vocab_size."""
    dropout_rate: float = 0.0
    """On embeddings and on what each sublayer adds (Vaswani et al. 2017, 5.4)."""
    attention_dropout_rate: float = 0.0
    """On attention weights."""
    initializer: Literal["lecun", "xavier"] = "lecun"
    """How weights of linear layers start. lecun: variance 1 / fan-in, truncated normal (LeCun et al. 1998, 4.6).
    xavier: variance 2 / (fan-in + fan-out), uniform (Glorot and Bengio 2010, equation 16), half of it for queries, keys
    and values, as in fairseq and torch.nn.Transformer; with it post-norm learns sooner."""
    dtype: DtypeName = "float32"
    """Of activations and matrix products. Softmax, norms, logits and the loss are at least float32."""
    linear_dtype: Literal["same", "float8"] = "same"
    """Of the operands of linear layers. same: dtype. float8: 8 bits, with a scale for each token and each weight; for
    devices that have units for it, and models above 1B. Attention, routers, dropless experts and the output layer stay
    in dtype, and so do the gradients of weights."""
    param_dtype: DtypeName = "float32"
    """Of parameters."""
    scan_layers: DerivedSwitch = DERIVED
    """Compile one block, or one round of `windows`, and loop over it: a deep model compiles in the time of one.
    Parameters of all layers are stacked along a first axis N. None: where a stack has more than 16 layers."""
    remat: RematName = "none"
    """What the backward pass computes again instead of keeping it (Chen et al. 2016). dots: all but matrix products.
    full: all within a block."""

    def __post_init__(self) -> None:
        derived = frozenset(
            f.name for f in dataclasses.fields(self) if f.default is None and getattr(self, f.name) is None
        )
        none = {"query_scale", "attention_softcap", "logits_softcap", "source_vocab_size"}  # where None says something
        object.__setattr__(self, "_derived", derived - none)
        check_types(self)
        at_least(self, 1, "vocab_size", "d_model", "num_layers", "num_encoder_layers", "num_heads", "num_kv_heads")
        at_least(self, 1, "source_vocab_size")
        if self.source_vocab_size is not None and self.share_source_embedding:
            raise ValueError(
                f"source_vocab_size={self.source_vocab_size} needs an embedding table of its own: "
                "share_source_embedding=False."
            )
        at_least(self, 1, "head_dim", "d_ff", "max_length", "relative_max_distance")
        at_least(self, 1, "experts_per_token")
        at_most(self, 10_000, "num_layers", "num_encoder_layers")  # each is traced
        at_least(self, 0, "position_offset", "norm_eps", "num_experts", "num_shared_experts", "expert_capacity")
        share(self, "dropout_rate", "attention_dropout_rate")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of num_heads={self.num_heads} unless head_dim is given; "
                f"try num_heads={math.gcd(self.d_model, self.num_heads)}."
            )
        rest = dict(
            experts_per_token=min(2, max(self.num_experts, 1)),
            num_encoder_layers=self.num_layers,
            num_kv_heads=self.num_heads,
            head_dim=self.d_model // self.num_heads,
            d_ff=4 * self.d_model,
            qkv_bias=self.use_bias,
            encoder_windows=self.windows,
            scan_layers=self._is_deep(),
        )
        for name, value in rest.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_combinations()

    def _is_deep(self) -> bool:
        """Whether a stack is deep enough to loop over its layers, and all can be."""
        stacks = [(self.num_layers, self.windows)]
        if self.mode == "encoder-decoder":
            stacks.append((self.num_encoder_layers or self.num_layers, self.encoder_windows or self.windows))
        even = not any(layers % max(len(windows), 1) for layers, windows in stacks)
        return even and max(layers for layers, _ in stacks) > UNROLLED_LAYERS

    def _check_combinations(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; "
                f"try num_kv_heads={math.gcd(self.num_heads, self.num_kv_heads)}."
            )
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed num_experts={self.num_experts}."
            )
        if self.num_experts > 1 and self.experts_per_token == 1 and self.normalize_gates:
            raise ValueError(
                "experts_per_token=1 with normalize_gates=True makes every gate 1, so the router learns nothing; set "
                "normalize_gates=False, or experts_per_token=2."
            )
        if not self.num_experts and (self.num_shared_experts or self.expert_capacity):
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} and expert_capacity={self.expert_capacity} are for a "
                "mixture of experts; set num_experts too."
            )
        for name, sizes in (("num_layers", "windows"), ("num_encoder_layers", "encoder_windows")):
            windows = getattr(self, sizes)
            if not windows or min(windows) < 0:
                raise ValueError(f"{sizes}={windows} must be whole numbers of at least 0, one or more.")
            if self.scan_layers and getattr(self, name) % len(windows):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of the {len(windows)} {sizes} {windows} for "
                    "scan_layers, which loops over them."
                )
        if self.position.startswith("sinusoidal") and self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} must be even for position={self.position!r} (pairs of sine and cosine)."
            )
        if self.position_offset and self.position not in ("sinusoidal", "sinusoidal_t2t", "learned"):
            raise ValueError(f"position_offset={self.position_offset} is not for position={self.position!r}.")
        if self.parallel_residual and self.norm_placement == "post":
            raise ValueError("parallel_residual=True needs norm_placement pre or sandwich: its sums have no norm.")
        turning = self.head_dim * self.rope.fraction
        if self.position == "rope" and (abs(turning - round(turning)) > 1e-6 or round(turning) % 2):
            raise ValueError(
                f"head_dim={self.head_dim} times rope.fraction={self.rope.fraction} is {turning:g}; position='rope' "
                "turns pairs of features, so it must be even."
            )
        if self.cross_position == "same" and self.position not in ("rope", "alibi", "t5"):
            raise ValueError(
                f"cross_position='same' needs the position rope, alibi or t5; {self.position!r} is added to "
                "embeddings, so cross-attention has it already."
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance={self.relative_max_distance} must be above "
                f"relative_buckets={self.relative_buckets} / 2, the distances that have a bucket each."
            )
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(f"relative_buckets={self.relative_buckets} must be a multiple of 4.")
        for name in ("attention_softcap", "logits_softcap", "query_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")

    def of_window(self, window: int) -> Self:
        """The settings of a layer with this window: those of all layers, but for rope.local_base."""
        if not window or self.rope.local_base is None:
            return self
        return self._with(rope=dataclasses.replace(self.rope, base=self.rope.local_base, scaling="none"))

    def vocabulary_of(self, side: str) -> int:
        """Rows of the embedding table that the `source` or the `target` reads; vocab_size must be known."""
        assert self.vocab_size is not None
        return self.source_vocab_size or self.vocab_size if side == "source" else self.vocab_size

    def of_stack(self, stack: str) -> Self:
        """The settings of the `encoder`, with its layers as num_layers and windows, or of the `decoder`."""
        if stack == "decoder":
            return self
        return self._with(num_layers=self.num_encoder_layers, windows=self.encoder_windows)

    def _with(self, **changes: Any) -> Self:
        """The settings of a part of the model: nothing is derived anew, and nothing checked again."""
        part = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(part, name, value)
        return part

    def blocks_in_a_round(self) -> int:
        """Blocks of a stack that are compiled one by one; where layers are scanned over, a loop repeats them."""
        return len(self.windows) if self.scan_layers else self.num_layers

    def replace(self, **changes: Any) -> Self:
        """The same config with some fields changed and the derived fields derived anew."""
        return dataclasses.replace(self, **dict.fromkeys(vars(self)["_derived"]) | changes)


def add_attention_name(name: str) -> None:
    """Lets `ModelConfig.attention` be that name too, from now on; see `backends.add_attention`."""
    words = get_args(get_type_hints(ModelConfig)["attention"])
    ModelConfig.__annotations__["attention"] = Literal[(*words, name)]
