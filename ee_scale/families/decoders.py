"""Decoders. A family is added here: one entry, where it differs from Llama. The tests run over all of them."""

from ee_scale.families.experts import ExpertNames
from ee_scale.families.family import FFN, HEAD_DIM, HEADS, HIDDEN, KV, VOCAB, Elastic, Family
from ee_scale.families.llama_cpp import CAPS, LLAMA_CPP, MULTIPLIERS, LlamaCpp
from ee_scale.families.megatron import BEHIND, MegatronNames

MATRICES = {
    "model.embed_tokens": (VOCAB, HIDDEN),
    "model.layers.*.self_attn.q_proj": (HEADS, HIDDEN),
    "model.layers.*.self_attn.k_proj": (KV, HIDDEN),
    "model.layers.*.self_attn.v_proj": (KV, HIDDEN),
    "model.layers.*.self_attn.o_proj": (HIDDEN, HEADS),
    "model.layers.*.mlp.gate_proj": (FFN, HIDDEN),
    "model.layers.*.mlp.up_proj": (FFN, HIDDEN),
    "model.layers.*.mlp.down_proj": (HIDDEN, FFN),
    "model.norm": (HIDDEN,),
    "lm_head": (VOCAB, HIDDEN),
}
Q_NORM, K_NORM = "model.layers.*.self_attn.q_norm", "model.layers.*.self_attn.k_norm"


def _norms(*names: str) -> dict[str, tuple[str, ...]]:
    return {f"model.layers.*.{name}": (HIDDEN,) for name in names}


LLAMA = MATRICES | _norms("input_layernorm", "post_attention_layernorm")

DECODERS = (
    Family(
        "llama",
        LLAMA,
        gguf=True,
        llama_cpp=LLAMA_CPP,
        megatron=MegatronNames(),
        elastic=Elastic(heads_divide_hidden=True),
    ),
    Family(
        "mistral",
        LLAMA,
        gguf=True,
        llama_cpp=LLAMA_CPP,
        megatron=MegatronNames(windowed=True),
        elastic=Elastic(),
    ),
    Family(
        "qwen2",
        LLAMA,
        gguf=True,
        llama_cpp=LlamaCpp("qwen2", wide=True),
        megatron=MegatronNames(qkv_bias=True, head_dim=False),
        elastic=Elastic(),
    ),
    Family(
        "qwen3",
        LLAMA | {Q_NORM: (HEAD_DIM,), K_NORM: (HEAD_DIM,)},
        gguf=True,
        llama_cpp=LlamaCpp("qwen3"),
        megatron=MegatronNames(qk_norms=True),
        elastic=Elastic(),
    ),
    Family(
        "gemma2",
        LLAMA | _norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        embedding_scale="scalar_embed_scale",
        neutral_norm=0.0,
        gguf=True,
        llama_cpp=LlamaCpp("gemma2", settings=CAPS, window_every=2, head_scale=46, own_head=False),
        beyond_megatron=f"{BEHIND}, caps of scores and logits, a factor of the embedding",
    ),
    Family(
        "olmo2",
        MATRICES | {Q_NORM: (HEADS,), K_NORM: (KV,)} | _norms("post_attention_layernorm", "post_feedforward_layernorm"),
        mlp_input_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
        llama_cpp=LlamaCpp("olmo2", wide=True),
        beyond_megatron=f"{BEHIND} and none in front of them",
    ),
    Family(
        "gemma",
        embedding_scale="scalar_embed_scale",
        neutral_norm=0.0,
        llama_cpp=LlamaCpp("gemma", own_head=False),
        beyond_megatron="a factor of the embedding",
    ),
    Family(
        "gemma3_text",
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        embedding_scale="scalar_embed_scale",
        neutral_norm=0.0,
        llama_cpp=LlamaCpp("gemma3", window_every=6, head_scale=62, local_theta=10_000.0),
        beyond_megatron=f"{BEHIND}, another rotary base in layers with a window, a factor of the embedding",
    ),
    Family(
        "vaultgemma",
        mlp_input_norm="pre_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        embedding_scale="scalar_embed_scale",
        neutral_norm=0.0,
    ),
    Family(
        "olmo3",
        mlp_input_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
        beyond_megatron=f"{BEHIND} and none in front of them",
    ),
    Family("exaone4", mlp_input_norm=None, mlp_output_norm="post_feedforward_layernorm"),
    Family("glm4", mlp_output_norm="post_mlp_layernorm"),
    Family(
        "granite",
        logit_divisor="logits_scaling",
        residual_multiplier="residual_multiplier",
        llama_cpp=LlamaCpp("granite", pairs=True, settings=MULTIPLIERS),
    ),
    Family("cohere", logit_scale="logit_scale", parallel=True),
    Family("cohere2", logit_scale="logit_scale", parallel=True),
    Family("arcee", gated=False),
    Family("jais2", gated=False),
    Family("starcoder2", gated=False),
    # Experts in the place of the MLP.
    Family(
        "mixtral",
        megatron=MegatronNames(
            windowed=True, experts=ExpertNames("block_sparse_moe", ("w1", "w3", "w2"), normalised=None)
        ),
    ),
    Family("qwen2_moe"),
    Family("qwen3_moe", megatron=MegatronNames(qk_norms=True, experts=ExpertNames(width="moe_intermediate_size"))),
    Family("olmoe", megatron=MegatronNames(qk_norms=True, wide_norms=True, head_dim=False, experts=ExpertNames())),
    # Like Llama in all that is said here; so is every family that has no entry, until a proof finds otherwise.
    *map(Family, ("ministral", "ministral3")),
    Family("smollm3", llama_cpp=LlamaCpp("smollm3", pairs=True, no_rope_every=4, wide=True)),
    *map(Family, ("seed_oss", "ernie4_5", "helium", "cwm", "olmo", "phi3", "glm")),
)
