"""The model's own continuations of the corpus, written once and kept: what exits draft is what the model would say.

Half of them are greedy, half are sampled from the model's own distribution (temperature 1, nothing cut off). A document
is a prompt, tokens of the corpus from a random place, and its continuation up to the end mark or `data.seq_length`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ee_scale.backbone.digest import named_generator, named_seed
from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.data.corpora import num_tokens, open_tokens, read_tokens
from ee_scale.data.dataset import check_tokens
from ee_scale.data.inputs import load_tokenizer, run_prefixes
from ee_scale.data.text import cache_root
from ee_scale.errors import UserError, one_line
from ee_scale.files import published, remove_folder, sync
from ee_scale.grid import launch_info, pick_device
from ee_scale.log import log
from ee_scale.modeling.wrapped import opening
from ee_scale.planning.estimates import uses_bf16
from ee_scale.planning.tune import TunePlan
from ee_scale.progress import shares

FORMAT = 1
ROWS = 16  # documents that are written at once

# Prompts int64 [rows, P], whether tokens are sampled, seed -> the continuations int64 [rows, at most new]
Continue = Callable[[Tensor, bool, int], Tensor]


def prepare_own_text(plan: TunePlan, data: Mapping[str, Any], *, progress: bool) -> tuple[str, str]:
    """The Megatron prefix of the text, written now by this process's device if it is not there, and its digest.

    data: which corpus it is. What was written before a stop is kept, and a restart gives the same text. Raises
    `UserError`.
    """
    config = plan.config
    identity = {
        "format": FORMAT,
        "model": fingerprint(plan.model_dir),
        "tokens": plan.own_text_tokens,
        "prompt": config.data.own_text_prompt,
        "seq_length": config.data.seq_length,
        "seed": config.data.seed,
        "precision": config.train.precision,
        "corpus": data,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root(config.data.cache_dir) / f"own-{digest}"
    prefix = str(folder / "tokens")
    if not IndexedDataset.exists(prefix):
        end = load_tokenizer(plan.model_dir).eos_token_id
        corpora = run_prefixes(config.data, plan.model_dir)
        write_own_text(plan, folder, corpora, end, _opened(plan, end), progress=progress)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # ranks that this process starts may use the same device
    (found,) = check_tokens([prefix], plan.shape.vocab_size, config.data.seq_length)
    return prefix, found


def write_own_text(
    plan: TunePlan, folder: Path, corpora: list[str], end: int, writer: Continue, *, progress: bool = False
) -> None:
    """Chunks of ROWS documents, greedy and sampled in turn, until there are enough tokens; then all as one dataset.

    corpora: Megatron prefixes of the prompts; end: the id that ends a document.
    """
    data, wanted = plan.config.data, plan.own_text_tokens
    parts = folder.with_name(f"{folder.name}.parts")
    prompts, written = _prompts(corpora, data.own_text_prompt, data.seed), 0
    chunks: list[list[Tensor]] = []
    bar = shares(f"writing {wanted:,} tokens of own text") if progress else nullcontext(lambda share: None)
    with bar as show:
        while written < wanted or len(chunks) % 2:
            path, rows = parts / f"{len(chunks):06d}.safetensors", next(prompts)
            documents = _read_chunk(path)
            if documents is None:
                seed = named_seed(f"own text {len(chunks)}", data.seed)
                documents = _documents(rows, writer(rows, len(chunks) % 2 == 1, seed), end)
                _write_chunk(path, documents)
            chunks.append(documents)
            written += sum(map(len, documents))
            show(min(1.0, written / wanted))
    with published(folder) as temporary:
        prefix = temporary / "tokens"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(plan.shape.vocab_size + 1))
        for document in (document for documents in chunks for document in documents):
            builder.add_item(document)
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    remove_folder(parts)
    log.info("own text: %d documents, %d tokens", ROWS * len(chunks), written)


def _prompts(corpora: list[str], length: int, seed: int) -> Iterator[Tensor]:
    """int64 [ROWS, length] after another: from random places, every token of the corpora as likely as any other."""
    datasets = [open_tokens(prefix) for prefix in corpora]
    ends = np.cumsum([num_tokens(dataset) - length + 1 for dataset in datasets])
    generator = named_generator("prompts", seed)
    while True:
        rows = []
        for place in torch.randint(int(ends[-1]), (ROWS,), generator=generator).tolist():
            number = int(np.searchsorted(ends, place, side="right"))
            start = place - (int(ends[number - 1]) if number else 0)
            rows.append(torch.from_numpy(read_tokens(datasets[number], start, length)))
        yield torch.stack(rows)


def _documents(prompts: Tensor, continued: Tensor, end: int) -> list[Tensor]:
    """Prompt, continuation and one end mark, of each row."""
    documents = []
    for prompt, ids in zip(prompts, continued.cpu(), strict=True):
        ends = (ids == end).nonzero()
        kept = ids[: int(ends[0])] if len(ends) else ids
        documents.append(torch.cat([prompt, kept, torch.tensor([end])]))
    return documents


def _write_chunk(path: Path, documents: list[Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    lengths = torch.tensor([len(document) for document in documents])
    try:
        path.parent.mkdir(exist_ok=True)  # another run may have finished the same text, and removed it
        save_file({"ids": torch.cat(documents), "lengths": lengths}, temporary)
        sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"data.own_text: cannot write {path} ({one_line(error)})") from error


def _read_chunk(path: Path) -> list[Tensor] | None:
    """None where it is not there, or not whole."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return list(found["ids"].split(found["lengths"].tolist()))


def _opened(plan: TunePlan, end: int) -> Continue:
    """The whole model on one device of this process."""
    config, launched = plan.config, launch_info()
    device = pick_device(config.parallel.device, launched.local_rank if launched else 0)
    dtype = torch.bfloat16 if uses_bf16(config.train.precision, device) else torch.float32
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of tensors that are left out: the run has said so
    try:
        opener = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(plan.model_config)])
        opened = opener.from_pretrained(plan.model_dir, **opening(plan.model_config), dtype=dtype)
    except Exception as error:  # a folder that is damaged or was made up fails in many ways
        raise UserError(f"{plan.model_dir}: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    model = nn.Module.to(opened, device).eval()
    new = config.data.seq_length - config.data.own_text_prompt
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)  # not what its makers decode with

    @torch.inference_mode()
    def write(prompts: Tensor, sampled: bool, seed: int) -> Tensor:
        plain = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {}
        settings = GenerationConfig(max_new_tokens=new, do_sample=sampled, eos_token_id=end, pad_token_id=end, **plain)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = prompts.to(device)
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return found[:, prompts.shape[1] :]

    return write
