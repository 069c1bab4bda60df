"""Named runs. Each is a function that returns its config and says its command, what it needs and what to expect."""

import dataclasses
from collections.abc import Callable
from typing import Any

from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    Mode,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
)
from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError

RECIPES: dict[str, Callable[[], RunConfig]] = {}


def recipe(make: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Enters a function under its name, with dashes."""
    RECIPES[make.__name__.replace("_", "-")] = make
    return make


def find_recipe(name: str) -> RunConfig:
    """The config of a recipe.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"Unknown recipe {name!r}.{nearest(name, RECIPES)} The recipes are {', '.join(RECIPES)}.")
    return RECIPES[name]()


@recipe
def dates() -> RunConfig:
    """`python train.py`: dates in 26 languages -> ISO 8601, the embedded default, minutes on a laptop."""
    return RunConfig(
        recipe="dates",
        steps=300,
        batch_size=32,
        eval_every=50,
        eval_rows=128,
        max_new_tokens=16,
        model=ModelConfig(
            d_model=128,
            num_layers=3,
            num_encoder_layers=2,
            num_heads=4,
            d_ff=256,
            max_length=104,
            position="rope",
            norm="rmsnorm",
            activation="gelu",
            use_bias=False,
        ),
        data=DataConfig(embedded="dates", tokenizer="char", source_length=64, target_length=40),
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )


@recipe
def code() -> RunConfig:
    """`python train.py code`: the Python standard library on this machine, a decoder-only model of its text."""
    return RunConfig(
        recipe="code",
        steps=1000,
        batch_size=16,
        model=_small("decoder-only", max_length=256),
        data=DataConfig(embedded="code", tokenizer_size=4000),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1),
    )


def _small(mode: Mode, **changes: Any) -> ModelConfig:
    """A model for a laptop, of today's usual parts."""
    config = ModelConfig(
        mode=mode,
        d_model=256,
        num_layers=6,
        num_heads=4,
        d_ff=1024,
        position="rope",
        norm="rmsnorm",
        use_bias=False,
    )
    return config.replace(**changes)


@recipe
def text() -> RunConfig:
    """`python train.py text --data.train FILE...`: a decoder-only model of any plain text."""
    return RunConfig(
        recipe="text",
        steps=2000,
        batch_size=16,
        model=_small("decoder-only", max_length=256),
        data=DataConfig(tokenizer_size=4000),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1),
    )


@recipe
def pairs() -> RunConfig:
    """`python train.py pairs --data.train SOURCE TARGET`: an encoder-decoder that turns one text into another."""
    return RunConfig(
        recipe="pairs",
        steps=1000,
        batch_size=32,
        eval_every=250,
        model=_small("encoder-decoder", num_layers=3, max_length=128, d_model=128, d_ff=512, dropout_rate=0.1),
        data=DataConfig(tokenizer_size=8000),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loss=LossConfig(label_smoothing=0.1),
    )


@recipe
def shakespeare_char() -> RunConfig:
    """`python train.py shakespeare-char --data.train tinyshakespeare.txt`: nanoGPT's character model, its CPU settings.

    4 layers, 4 heads, d_model 128, context 64, batch 12, 2,000 steps, no dropout. Published: validation loss 1.88, an
    estimate over random batches; ours is over the whole validation split. About 2 minutes on 2 cores.
    """
    return RunConfig(
        recipe="shakespeare-char",
        steps=2000,
        batch_size=12,
        eval_every=500,
        eval_rows=512,
        model=ModelConfig(
            mode="decoder-only",
            d_model=128,
            num_layers=4,
            num_heads=4,
            max_length=64,
            position="learned",
            activation="gelu",
            use_bias=False,
            scale_embeddings=False,
        ),
        data=DataConfig(tokenizer="char"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.1, schedule="cosine", final_fraction=0.1
        ),
    )


@recipe
def shakespeare_char_gpu() -> RunConfig:
    """`python train.py shakespeare-char-gpu --data.train tinyshakespeare.txt`: nanoGPT's, its GPU settings.

    6 layers, 6 heads, d_model 384, context 256, batch 64, 5,000 steps, dropout 0.2. Published: best validation loss
    1.4697, an estimate over random batches. Not run here: hours on a CPU.
    """
    base = shakespeare_char()
    shape = dict(d_model=384, num_layers=6, num_heads=6, max_length=256)
    return dataclasses.replace(
        base,
        recipe="shakespeare-char-gpu",
        steps=5000,
        batch_size=64,
        eval_every=250,
        model=base.model.replace(**shape, dropout_rate=0.2, attention_dropout_rate=0.2),
    )


@recipe
def multi30k_tiny() -> RunConfig:
    """`python train.py multi30k-tiny --data.train train.en.gz train.de.gz --data.validation val.en.gz val.de.gz`.

    Transformer-Tiny of Wu et al. 2021 (Good for Misconceived Reasons, table 2): post-norm, 4 + 4 layers, d_model 128,
    d_ff 256, weights that start as fairseq's, 8,000 updates, inverse square root from 0.005 after 2,000 steps. An
    update sees about 7,100 tokens of each side, with next to no padding: theirs, of two batches of at most 4,096 with
    padding, saw 6,900. A checkpoint each epoch, of 61 updates, of which 10 are averaged; beside them stay the last that
    was evaluated and the run's last. `transformer-jax reproduce multi30k-tiny` does the rest.
    """
    return RunConfig(
        recipe="multi30k-tiny",
        steps=8000,
        batch_size=56,
        eval_every=1000,
        model=ModelConfig(
            d_model=128,
            num_layers=4,
            num_heads=4,
            d_ff=256,
            max_length=128,
            norm_placement="post",
            initializer="xavier",
            dropout_rate=0.3,
        ),
        data=DataConfig(tokenizer="bpe-words", tokenizer_size=10_000),
        optimizer=OptimizerConfig(
            learning_rate=5e-3, schedule="inverse-sqrt", warmup_steps=2000, b2=0.98, weight_decay=0.0, clip_norm=0.0
        ),
        loss=LossConfig(label_smoothing=0.1),
        checkpoint=CheckpointConfig(every=61, keep=12),
    )


def _vaswani(name: str, **changes: Any) -> RunConfig:
    # xavier is tensor2tensor's uniform_unit_scaling, but for queries, keys and values, which it does not halve
    model = ModelConfig(vocab_size=37_000, norm_placement="post", initializer="xavier", max_length=256)
    model = model.replace(**changes)
    rate = (model.d_model * 4000) ** -0.5  # the paper's formula at the end of its 4,000 steps of warm-up
    return RunConfig(
        recipe=name,
        steps=100_000 if model.d_model == 512 else 300_000,
        batch_size=128,
        eval_every=2000,
        model=model,
        data=DataConfig(tokenizer_size=37_000),
        optimizer=OptimizerConfig(
            learning_rate=rate, schedule="inverse-sqrt", warmup_steps=4000, eps=1e-9, weight_decay=0.0, clip_norm=0.0
        ),
        loss=LossConfig(label_smoothing=0.1),
    )


@recipe
def transformer_base() -> RunConfig:
    """`python train.py transformer-base --data.train SOURCE TARGET`: Vaswani et al. 2017, table 3, base.

    63,082,496 parameters; published 27.3 BLEU on WMT14 English-German after 100,000 steps of 25,000 + 25,000 tokens.
    Not run here: an accelerator's work.
    """
    return _vaswani("transformer-base", dropout_rate=0.1)


@recipe
def transformer_big() -> RunConfig:
    """`python train.py transformer-big --data.train SOURCE TARGET`: Vaswani et al. 2017, table 3, big.

    214,245,376 parameters; published 28.4 BLEU on WMT14 English-German after 300,000 steps. Not run here.
    """
    return _vaswani("transformer-big", d_model=1024, num_heads=16, d_ff=4096, dropout_rate=0.3)


@recipe
def gpt2_124m() -> RunConfig:
    """`python train.py gpt2-124m --data.train FILE...`: GPT-2 small (Radford et al. 2019) with nanoGPT's settings.

    124,439,808 parameters; published loss 2.85 on OpenWebText after 600,000 steps of 491,520 tokens. Not run here.
    """
    return RunConfig(
        recipe="gpt2-124m",
        steps=600_000,
        batch_size=480,
        eval_every=1000,
        model=ModelConfig(
            mode="decoder-only",
            vocab_size=50_257,
            d_model=768,
            num_layers=12,
            num_heads=12,
            max_length=1024,
            position="learned",
            activation="gelu_tanh",
            norm_eps=1e-5,
            scale_embeddings=False,
            dtype="bfloat16",
        ),
        data=DataConfig(tokenizer_size=50_257),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000, b2=0.95, weight_decay=0.1, accumulate=40),
    )


@recipe
def t5_small() -> RunConfig:
    """`python train.py t5-small --data.train FILE...`: T5 small (Raffel et al. 2020), span corruption.

    60,506,624 parameters with its 32,128 entries. Published after 2^19 steps of 2^16 tokens. Not run here.
    """
    return RunConfig(
        recipe="t5-small",
        steps=524_288,
        batch_size=128,
        eval_every=5000,
        model=ModelConfig(
            vocab_size=32_128,
            d_model=512,
            num_layers=6,
            num_heads=8,
            d_ff=2048,
            max_length=512,
            position="t5",
            norm="rmsnorm",
            use_bias=False,
            query_scale=1.0,
            scale_embeddings=False,
            scale_logits=True,
        ),
        data=DataConfig(tokenizer="unigram", tokenizer_size=32_000, objective="span-corruption", target_length=128),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1e-2, schedule="inverse-sqrt", warmup_steps=10_000, weight_decay=0.0
        ),
    )


@recipe
def llama_1b() -> RunConfig:
    """`python train.py llama-1b --data.train FILE...`: the shape of Llama 3.2 1B, 1,235,814,400 parameters.

    Not run here: an accelerator's work.
    """
    return RunConfig(
        recipe="llama-1b",
        steps=100_000,
        batch_size=256,
        eval_every=1000,
        model=ModelConfig(
            mode="decoder-only",
            vocab_size=128_256,
            d_model=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            d_ff=8192,
            max_length=4096,
            position="rope",
            rope=RopeConfig(base=500_000.0, scaling="llama3", factor=32.0),
            norm="rmsnorm",
            norm_eps=1e-5,
            activation="silu",
            gated=True,
            use_bias=False,
            scale_embeddings=False,
            dtype="bfloat16",
        ),
        data=DataConfig(tokenizer_size=128_256),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, b2=0.95, weight_decay=0.1, accumulate=8),
    )


def gpt2_1_5b() -> RunConfig:
    """`python train.py gpt2-1.5b --data.train FILE...`: the shape of GPT-2 1.5B (Radford et al. 2019, table 2).

    1,557,611,200 parameters; batch and learning rate of about GPT-3 XL's (Brown et al. 2020, table 2.1). Not run here:
    `transformer-jax describe gpt2-1.5b --devices 8 --parallel.mesh fsdp=8` plans it.
    """
    base = gpt2_124m()
    shape = dict(d_model=1600, num_layers=48, num_heads=25, scan_layers=True, remat="full")
    return dataclasses.replace(
        base,
        recipe="gpt2-1.5b",
        steps=300_000,
        batch_size=512,
        model=base.model.replace(**shape),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-4, accumulate=1),
    )


RECIPES["gpt2-1.5b"] = gpt2_1_5b  # no function can have that name


def _llama(name: str, learning_rate: float, **shape: Any) -> RunConfig:
    """Llama 3.1 (Llama Team 2024, table 3), with 4 million tokens in rows of 8,192, as its training began."""
    base = llama_1b()
    rope = RopeConfig(base=500_000.0, scaling="llama3", factor=8.0)
    common = dict(num_kv_heads=8, head_dim=128, max_length=8192, rope=rope, tie_embeddings=False)
    return dataclasses.replace(
        base,
        recipe=name,
        steps=1_000_000,
        batch_size=512,
        model=base.model.replace(**common, scan_layers=True, remat="full", **shape),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=learning_rate, warmup_steps=8000, accumulate=1),
    )


@recipe
def llama_8b() -> RunConfig:
    """`python train.py llama-8b --data.train FILE...`: the shape of Llama 3.1 8B, 8,030,261,248 parameters.

    Not run here: `transformer-jax describe llama-8b --devices 64 --parallel.mesh fsdp=64` plans it.
    """
    return _llama("llama-8b", 3e-4, d_model=4096, num_layers=32, num_heads=32, d_ff=14_336)


@recipe
def llama_70b() -> RunConfig:
    """`python train.py llama-70b --data.train FILE...`: the shape of Llama 3.1 70B, 70,553,706,496 parameters.

    Not run here: `transformer-jax describe llama-70b --devices 512 --parallel.mesh fsdp=64,tensor=8` plans it.
    """
    return _llama("llama-70b", 1.5e-4, d_model=8192, num_layers=80, num_heads=64, d_ff=28_672)


@recipe
def t5_11b() -> RunConfig:
    """`python train.py t5-11b --data.train FILE...`: the shape of T5-11B (Raffel et al. 2020, section 3.7).

    11,307,321,344 parameters with its 32,128 entries. Not run here:
    `transformer-jax describe t5-11b --devices 64 --parallel.mesh fsdp=8,tensor=8` plans it.
    """
    base = t5_small()
    shape = dict(d_model=1024, num_layers=24, num_heads=128, head_dim=128, d_ff=65_536)
    model = base.model.replace(**shape, dtype="bfloat16", scan_layers=True, remat="full")
    return dataclasses.replace(base, recipe="t5-11b", model=model)
