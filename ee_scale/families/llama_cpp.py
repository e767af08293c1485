"""What llama.cpp computes of a family beyond what a GGUF file says: each is proved against it (tests/parity)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

WORDS, PIECES = "gpt2", "llama"  # its tokenizers: byte-level BPE, and that of sentencepiece
DIGIT = r"\p{N}"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2, LLAMA3 = rf"{_LETTERS}\p{{N}}{_SIGNS}", rf"{_LETTERS}\p{{N}}{{1,3}}{_SIGNS}"
# What splits a text before the byte-level step, which splits as GPT-2's where nothing named does, and whether a word
# that is a token is taken as it is -> llama.cpp's name of the rule.
SPLITS = {
    ((), False): "gpt-2",
    ((DIGIT,), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
}
COMPOSING = "qwen2"  # its tokenizers compose accents first; llama.cpp does not, and its own converter leaves it at that


@dataclass(frozen=True)
class LlamaCpp:
    """How it runs a family.

    Attributes:
        name: its architecture.
        pairs: its files hold the two rows of a rotary pair side by side, transformers half a head apart.
        settings: of the config -> method of gguf's writer that adds it.
        window_every: each layer of this number reads everything, the others a window; 0: all read everything.
        head_scale: attention is scaled by the head size, but in models of so many layers; None: no config says else.
        local_theta: rotary base of layers with a window, if it is one of their own.
        no_rope_every: each layer of this number is without positions; 0: none.
        own_head: an output matrix of its own is read.
        wide: queries are as wide as the model.
    """

    name: str
    pairs: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    window_every: int = 0
    head_scale: int | None = None
    local_theta: float | None = None
    no_rope_every: int = 0
    own_head: bool = True
    wide: bool = False


LLAMA_CPP = LlamaCpp("llama", pairs=True)  # Mistral as well
CAPS = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}
MULTIPLIERS = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
