"""What the heads of a model read, without any logits: they are made chunk by chunk by whoever needs them."""

import torch
from transformers import PreTrainedModel

from ee_scale.modeling.heads import ExitTaps, run_single_layer


def exit_states(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Ids [B, S] on the model's device -> {exit layer: [B, S, D]} in order of depth; 0 is the final layer.

    A model without exits gives the final layer alone.
    """
    base = model.base_model
    if not hasattr(model, "exit_spec"):
        return {0: base(ids, use_cache=False).last_hidden_state}
    spec = model.exit_spec
    taps = ExitTaps(spec, {k: base.layers[k - 1] for k in spec.layers})
    try:
        found = {0: base(ids, use_cache=False).last_hidden_state}
    finally:
        taps.remove()
    read = taps.pop()
    for k in spec.layers:
        norm = spec.output_norm(base.layers[k - 1])
        found[k] = model.exit_heads[str(k)].hidden(read[k], norm, lambda layer, x: run_single_layer(base, layer, x))
    return found
