"""Published models: what matters of the config.json that each has on the Hugging Face hub, and its parameters, as
`num_parameters()` of `transformers` counts them there (and the model's paper or card says, rounded)."""

from typing import Any

Json = dict[str, Any]


def gpt2(d: int, layers: int, heads: int) -> Json:
    return dict(
        model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=d, n_layer=layers, n_head=heads, n_ctx=1024
    )


def pythia(d: int, layers: int, heads: int, vocab: int = 50304) -> Json:
    return dict(
        model_type="gpt_neox",
        vocab_size=vocab,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        rotary_emb_base=10000,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )


def opt(d: int, layers: int, heads: int) -> Json:
    return dict(
        model_type="opt",
        vocab_size=50272,
        hidden_size=d,
        word_embed_proj_dim=d,
        ffn_dim=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        activation_function="relu",
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
    )


def llama(kind: str, vocab: int, d: int, ff: int, layers: int, heads: int, kv: int, **more: Any) -> Json:
    return (
        dict(
            model_type=kind,
            vocab_size=vocab,
            hidden_size=d,
            intermediate_size=ff,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            max_position_embeddings=4096,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
        )
        | more
    )


def t5(kind: str, vocab: int, d: int, kv: int, ff: int, layers: int, heads: int, new: bool) -> Json:
    return dict(
        model_type=kind,
        vocab_size=vocab,
        d_model=d,
        d_kv=kv,
        d_ff=ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu" if new else "relu",
        tie_word_embeddings=not new,
        relative_attention_num_buckets=32,
        layer_norm_epsilon=1e-6,
    )


def bart(kind: str, vocab: int, d: int, ff: int, layers: int, heads: int, length: int = 1024, **more: Any) -> Json:
    return (
        dict(
            model_type=kind,
            vocab_size=vocab,
            d_model=d,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=ff,
            decoder_ffn_dim=ff,
            max_position_embeddings=length,
            activation_function="gelu",
            scale_embedding=False,
        )
        | more
    )


TIED = dict(tie_word_embeddings=True)
LLAMA3 = dict(
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)
GEMMA = dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6)
GEMMA_2B = (256000, 2304, 9216, 26, 8, 4)
GEMMA2 = dict(
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=4096,
    head_dim=256,
    query_pre_attn_scalar=256,
)

PUBLISHED: dict[str, tuple[int, Json]] = {
    # Radford et al. 2019
    "gpt2": (124_439_808, gpt2(768, 12, 12)),
    "gpt2-medium": (354_823_168, gpt2(1024, 24, 16)),
    "gpt2-large": (774_030_080, gpt2(1280, 36, 20)),
    "gpt2-xl": (1_557_611_200, gpt2(1600, 48, 25)),
    # Biderman et al. 2023, table 1
    "pythia-70m": (70_426_624, pythia(512, 6, 8)),
    "pythia-160m": (162_322_944, pythia(768, 12, 12)),
    "pythia-410m": (405_334_016, pythia(1024, 24, 16)),
    "pythia-1b": (1_011_781_632, pythia(2048, 16, 8)),
    "pythia-1.4b": (1_414_647_808, pythia(2048, 24, 16)),
    "pythia-2.8b": (2_775_208_960, pythia(2560, 32, 32)),
    "pythia-6.9b": (6_857_302_016, pythia(4096, 32, 32, 50432)),
    "pythia-12b": (11_846_072_320, pythia(5120, 36, 40, 50688)),
    # Zhang et al. 2022, table 1
    "opt-125m": (125_239_296, opt(768, 12, 12)),
    "opt-1.3b": (1_315_758_080, opt(2048, 24, 32)),
    "opt-2.7b": (2_651_596_800, opt(2560, 32, 32)),
    "opt-6.7b": (6_658_473_984, opt(4096, 32, 32)),
    # Touvron et al. 2023; Grattafiori et al. 2024
    "llama-2-7b": (6_738_415_616, llama("llama", 32000, 4096, 11008, 32, 32, 32)),
    "llama-2-13b": (13_015_864_320, llama("llama", 32000, 5120, 13824, 40, 40, 40)),
    "llama-2-70b": (68_976_648_192, llama("llama", 32000, 8192, 28672, 80, 64, 8)),
    "llama-3-8b": (8_030_261_248, llama("llama", 128256, 4096, 14336, 32, 32, 8)),
    "llama-3-70b": (70_553_706_496, llama("llama", 128256, 8192, 28672, 80, 64, 8)),
    "llama-3.2-1b": (1_235_814_400, llama("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED, **LLAMA3)),
    "llama-3.2-3b": (3_212_749_824, llama("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128, **TIED, **LLAMA3)),
    # Ben Allal et al. 2024
    "smollm-135m": (134_515_008, llama("llama", 49152, 576, 1536, 30, 9, 3, **TIED)),
    "smollm-360m": (361_821_120, llama("llama", 49152, 960, 2560, 32, 15, 5, **TIED)),
    "smollm-1.7b": (1_711_376_384, llama("llama", 49152, 2048, 8192, 24, 32, 32, **TIED)),
    # Jiang et al. 2023, 2024
    "mistral-7b": (7_241_732_096, llama("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096)),
    "mixtral-8x7b": (
        46_702_792_704,
        llama("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2),
    ),
    # Yang et al. 2024, 2025
    "qwen2-0.5b": (494_032_768, llama("qwen2", 151936, 896, 4864, 24, 14, 2, **TIED)),
    "qwen2-1.5b": (1_543_714_304, llama("qwen2", 151936, 1536, 8960, 28, 12, 2, **TIED)),
    "qwen2-7b": (7_615_616_512, llama("qwen2", 152064, 3584, 18944, 28, 28, 4)),
    "qwen3-0.6b": (596_049_920, llama("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED)),
    "qwen3-1.7b": (1_720_574_976, llama("qwen3", 151936, 2048, 6144, 28, 16, 8, head_dim=128, **TIED)),
    "qwen3-4b": (4_022_468_096, llama("qwen3", 151936, 2560, 9728, 36, 32, 8, head_dim=128, **TIED)),
    "qwen3-8b": (8_190_735_360, llama("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128)),
    "qwen3-30b-a3b": (
        30_532_122_624,
        llama("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, head_dim=128)
        | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True)
        | dict(decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    # Gemma Team 2024, 2024, 2025
    "gemma-2b": (2_506_172_416, llama("gemma", 256000, 2048, 16384, 18, 8, 1, head_dim=256, **GEMMA)),
    "gemma-7b": (8_537_680_896, llama("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256, **GEMMA)),
    "gemma-2-2b": (2_614_341_888, llama("gemma2", *GEMMA_2B, **GEMMA2)),
    "gemma-2-9b": (9_241_705_984, llama("gemma2", 256000, 3584, 14336, 42, 16, 8, **GEMMA2)),
    "gemma-2-27b": (
        27_227_128_320,
        llama("gemma2", 256000, 4608, 36864, 46, 32, 16, **GEMMA2 | dict(head_dim=128, query_pre_attn_scalar=144)),
    ),
    "gemma-3-1b": (
        999_885_952,
        llama("gemma3_text", 262144, 1152, 6912, 26, 4, 1, head_dim=256, rope_theta=1_000_000)
        | dict(hidden_activation="gelu_pytorch_tanh", sliding_window=512, sliding_window_pattern=6)
        | dict(rope_local_base_freq=10000, query_pre_attn_scalar=256, hidden_act=None),
    ),
    # Abdin et al. 2024
    "phi-3-mini-4k": (
        3_821_079_552,
        llama("phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=2047, original_max_position_embeddings=4096),
    ),
    # Raffel et al. 2020, Chung et al. 2022, Xue et al. 2021, 2022
    "t5-small": (60_506_624, t5("t5", 32128, 512, 64, 2048, 6, 8, new=False)),
    "t5-base": (222_903_552, t5("t5", 32128, 768, 64, 3072, 12, 12, new=False)),
    "t5-large": (737_668_096, t5("t5", 32128, 1024, 64, 4096, 24, 16, new=False)),
    "t5-3b": (2_851_598_336, t5("t5", 32128, 1024, 128, 16384, 24, 32, new=False)),
    "t5-11b": (11_307_321_344, t5("t5", 32128, 1024, 128, 65536, 24, 128, new=False)),
    "flan-t5-small": (76_961_152, t5("t5", 32128, 512, 64, 1024, 8, 6, new=True)),
    "flan-t5-base": (247_577_856, t5("t5", 32128, 768, 64, 2048, 12, 12, new=True)),
    "flan-t5-large": (783_150_080, t5("t5", 32128, 1024, 64, 2816, 24, 16, new=True)),
    "mt5-small": (300_176_768, t5("mt5", 250112, 512, 64, 1024, 8, 6, new=True)),
    # Lewis et al. 2020, Tang et al. 2020, Fan et al. 2021, Tiedemann and Thottingal 2020, Zhang et al. 2020
    "bart-base": (139_420_416, bart("bart", 50265, 768, 3072, 6, 12)),
    "bart-large": (406_291_456, bart("bart", 50265, 1024, 4096, 12, 16)),
    "mbart-large-50": (610_879_488, bart("mbart", 250054, 1024, 4096, 12, 16, scale_embedding=True)),
    "m2m100-418m": (
        483_905_536,
        bart("m2m_100", 128112, 1024, 4096, 12, 16, scale_embedding=True, activation_function="relu"),
    ),
    # Zhang et al. 2025
    "t5gemma-2b-2b": (
        5_596_853_760,
        dict(model_type="t5gemma")
        | {side: llama("t5_gemma_module", *GEMMA_2B, **GEMMA2) for side in ("encoder", "decoder")},
    ),
    "nllb-200-distilled-600m": (
        615_073_792,
        bart("m2m_100", 256206, 1024, 4096, 12, 16, scale_embedding=True, activation_function="relu"),
    ),
}
