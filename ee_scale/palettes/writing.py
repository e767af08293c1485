"""What models write behind prompts, in batches."""

import torch
from transformers import GenerationConfig, PreTrainedModel

ROWS = 16  # texts that are written together

End = int | list[int] | None


@torch.no_grad()
def write_on(
    model: PreTrainedModel, prompts: torch.Tensor, new: int, end: End, *, sampled: bool, seed: int
) -> list[torch.Tensor]:
    """int64 [B, at most new] for each ROWS of the prompts [N, P], filled up behind an end token.

    Greedy, or sampled from the whole distribution; the model's own generation settings have no part in it.
    """
    pad = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    chosen = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=new, eos_token_id=end, pad_token_id=pad, **chosen)
    device, found = model.device, []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for rows in prompts.to(device).split(ROWS):
            ids = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
            found.append(ids[:, rows.shape[1] :])
    return found
