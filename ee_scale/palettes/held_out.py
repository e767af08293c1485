"""The held-out data that a palette's sizes are judged on."""

import torch

from ee_scale.config.supernet import PaletteConfig
from ee_scale.data.dataset import check_tokens
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.data.labelled import check_labels, evaluation_batches, read_labelled
from ee_scale.data.loader import windows
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.planning.supernet import SupernetPlan
from ee_scale.training.supernet_data import encode_labelled


def held_out(config: PaletteConfig, plan: SupernetPlan) -> list[dict[str, torch.Tensor]]:
    """Batches to judge quality on. Raises `UserError`."""
    stored, given = plan.config.data, config.data if config.data is not None else plan.config.data.valid
    if given is None:
        raise UserError("data: the run has no data.valid; give data=<held-out file>")
    tokenizer, names = load_tokenizer(plan.model_dir), sources(given)
    limit = config.samples or None
    if plan.task == "classify":
        if len(names) != 1:
            raise UserError(f"data={names}: labelled data is one file")
        keys = (stored.text_key, stored.label_key, stored.pair_key)
        examples = read_labelled(names[0], *keys, fields="", errors=stored.errors)
        check_labels(plan.labels, examples, names[0], fields="")
        if limit is not None and limit < len(examples):
            keep = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed))[:limit]
            examples = [examples[i] for i in keep.tolist()]
        data = encode_labelled(plan, examples, tokenizer, "")
        return list(evaluation_batches(data, config.batch_size))
    given = (tokenizer, plan.model_dir, config.cache_dir, stored.text_key, True)
    prefixes = prepare_text(names, *given, fields="", errors=stored.errors)
    check_tokens(prefixes, plan.map.config.vocab_size, 1, names=names, fields="", tokenizer=tokenizer)
    found = windows(prefixes, stored.seq_length, config.batch_size, (limit or 0) * stored.seq_length)
    batches = [{"tokens": rows[:, :-1], "labels": rows[:, 1:], "loss_mask": learned} for rows, learned in found]
    if not any(bool(batch["loss_mask"].any()) for batch in batches):
        raise UserError(f"data={names}: nothing in what is read is the assistant's; give more text, or samples=0")
    return batches
