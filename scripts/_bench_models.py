"""Random models for benchmarks, drawn on the device that they are for: plain ones, and some whose exits often agree.

Time does not depend on the weights, but how many drafts are accepted does: late layers are damped until the first exit
says what the final layer says on a given share of tokens, at the true cost of every layer and head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import untrained_exits

TEXTS, LENGTH = 4, 128  # random text that agreement is counted on
HALVINGS = 10


def llama(layers: int, hidden: int, vocab: int, **more: Any) -> LlamaConfig:
    """The shape of a Llama of this depth and width: heads of 64, a quarter as many for keys and values."""
    heads = max(1, hidden // 64)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(sizes | more))


def write_model(folder: Path, config: LlamaConfig, device: str, dtype: torch.dtype) -> None:
    """A random model; on one CPU thread a billion numbers would take half a minute, on a GPU a moment."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)


@torch.no_grad()
def write_exits(folder: Path, plain: Path, layers: Sequence[int], agreement: float, device: str) -> dict[int, float]:
    """The model of `plain` with exits (mlp, low-rank heads) of which the first agrees with the final layer that often.

    Returns the share of random tokens on which each agrees.
    """
    config = LlamaConfig.from_pretrained(plain)
    model = untrained_exits(plain, exit_spec(config, layers, "mlp", "low_rank", 64), dtype="auto").to(device)
    late = [p for x in model.model.layers[layers[0] :] for p in (x.self_attn.o_proj.weight, x.mlp.down_proj.weight)]
    whole = [parameter.clone() for parameter in late]
    ids = torch.randint(config.vocab_size, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)

    def agreed(share: float) -> dict[int, float]:
        for parameter, value in zip(late, whole, strict=True):
            parameter.copy_(value * share)
        for k, head in model.exit_heads.items():  # copies of layers that are damped too
            head.body.load_state_dict(model.model.layers[int(k) - 1].mlp.state_dict())
        out = model(ids, use_cache=False)
        final = out.logits.argmax(-1)
        return {k: (logits.argmax(-1) == final).double().mean().item() for k, logits in out.exit_logits.items()}

    low, high = 0.0, 1.0  # the less late layers add, the more agree
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if agreed(middle)[layers[0]] < agreement else (middle, high)
    found = agreed(low)
    model.save_pretrained(folder)
    return found
