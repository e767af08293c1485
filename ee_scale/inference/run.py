"""Run a checked `generate` command: on one device, or as one rank of a grid."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.schema import GenerateConfig
from ee_scale.data.encode import token_with_row
from ee_scale.data.inputs import load_tokenizer
from ee_scale.grid import Grid, Layout, join_grid
from ee_scale.inference.model import open_model
from ee_scale.inference.number_type import fastest_dtype
from ee_scale.inference.pipeline import PipelineDecoder
from ee_scale.inference.pipeline_model import load_decoding_stage, plan_decoding
from ee_scale.inference.pipeline_rows import row_seed
from ee_scale.inference.request import Request, followed_limits, plain_words, policy_options
from ee_scale.inference.settings import end_marks, new_lengths, stop_criterion
from ee_scale.modeling.decision_log import DecisionLog
from ee_scale.modeling.decode import check_request
from ee_scale.modeling.heads import ModelWithExits
from ee_scale.modeling.layer_runner import check_model
from ee_scale.modeling.packing import packed_linears
from ee_scale.modeling.row_queue import QueuedRow, RowQueue
from ee_scale.modeling.trail import request_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Answers:
    """What was generated, prompt by prompt: token ids, the layer of each, and numbers of the whole run."""

    tokens: list[list[int]] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)

    def add(self, tokens: Sequence[list[int]], layers: Sequence[list[int]], stats: dict[str, Any]) -> None:
        """The answers of a batch."""
        self.tokens += tokens
        self.layers += layers
        for name in ("drafted", "accepted", "audited", "agreed"):
            if name in stats:
                self.stats[name] = self.stats.get(name, 0) + stats[name]


def answer_rows(request: Request, answers: Answers) -> list[dict[str, Any]]:
    """What is said of each prompt: the prompt, text and number of tokens; with a policy, the layer of each token."""
    rows = []
    for text, tokens, layers in zip(request.texts, answers.tokens, answers.layers, strict=True):
        said = request.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        row = {"prompt": text, "text": said, "tokens": len(tokens)}
        rows.append(row if request.config.policy == "off" else row | {"exit_layers": layers})
    return rows


def answer_lines(rows: Sequence[dict[str, Any]]) -> str:
    """A JSON object in each line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def open_decoder(request: Request, device: torch.device) -> PreTrainedModel:
    """The model of a request, in its number type. Raises `UserError`."""
    config = request.config
    dtype = DTYPES.get(config.dtype) or fastest_dtype(request.folder.config, device, config.pack_weights)
    model = open_model(request.folder.path, dtype=dtype).to(device).eval()
    model.pack_weights = config.pack_weights  # models with exits look at it
    return model


def decode_here(
    request: Request,
    device: torch.device,
    streamer: BaseStreamer | None = None,
    model: PreTrainedModel | None = None,
) -> Answers:
    """All prompts in this process: where there are more than a batch, a batch that stays full.

    model: what `open_decoder` opened, for whoever goes on with it.
    """
    config, model = request.config, model or open_decoder(request, device)
    ends = end_marks(model.generation_config)
    settings = {
        **request.sampling(),
        "tokenizer": request.tokenizer,
        "pad_token_id": token_with_row(request.folder.config.vocab_size, request.tokenizer.pad_token_id, *sorted(ends)),
    }
    options: dict[str, Any] = {}
    if request.folder.exits is not None:
        options = {f"exit_{name}": value for name, value in policy_options(config).items()}
        options |= {"exit_policy": config.policy} | ({"exit_graphs": True} if config.graphs else {})
    if config.audit is not None:
        options["exit_audit"] = config.audit
    if (follow := followed_limits(config, [config.policy])) is not None:
        options["exit_follow"] = follow
    log = DecisionLog(Path(config.log).expanduser()) if config.log else None
    if log is not None:
        options["exit_log"] = log
    torch.manual_seed(config.seed)
    decode, start = (_decode_queue if _stays_full(request, model) else _decode_batches), time.perf_counter()
    with plain_words(), packed_linears(model) if config.pack_weights else nullcontext():
        answers = decode(request, model, settings, options, streamer)
    answers.seconds = time.perf_counter() - start
    if log is not None:
        log.close()
    return answers


def _stays_full(request: Request, model: ModelWithExits) -> bool:
    """Whether prompts take the places of those that end; else transformers' `generate` gets one batch after another."""
    config, generation_config = request.config, model.generation_config
    if len(request.prompts) <= config.batch_size or request.folder.exits is None:
        return False
    if config.policy == "lossless":  # a watermark may remember what it was asked before: then rows keep step
        return generation_config.watermarking_config is None
    if config.policy == "off":
        try:  # without exits transformers can do more
            check_model(model)
            check_request(generation_config, {})
        except ValueError:
            return False
    return True


def _decode_queue(
    request: Request,
    model: ModelWithExits,
    settings: dict[str, Any],
    options: dict[str, Any],
    streamer: BaseStreamer | None,
) -> Answers:
    """Each prompt with random numbers of its own, as on a grid."""
    config, prompts, answers = request.config, request.prompts, Answers()
    tags = request.tags or [None] * len(prompts)
    names = request_names(len(prompts)) if config.audit else [None] * len(prompts)
    rows = [
        QueuedRow(prompt, tag=tag, request=name, seed=row_seed(config.seed, number), streamer=streamer)
        for number, (prompt, tag, name) in enumerate(zip(prompts, tags, names, strict=True))
    ]
    longest = max(map(len, prompts)) + config.max_new_tokens
    with RowQueue(model, options, config.batch_size, longest, settings, request.tags) as queue:
        for row in rows:
            queue.add(row)
        while queue.busy:
            queue.step()
        answers.add([row.tokens for row in rows], [row.layers for row in rows], queue.stats())
    return answers


def _decode_batches(
    request: Request,
    model: PreTrainedModel,
    settings: dict[str, Any],
    options: dict[str, Any],
    streamer: BaseStreamer | None,
) -> Answers:
    """All prompts, batch by batch, through the model's own `generate`."""
    config, device, answers, pad = request.config, model.device, Answers(), settings["pad_token_id"]
    stop = stop_criterion(model.generation_config, request.tokenizer)
    for prompts, tags in request.batches():
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        extra: dict[str, Any] = {} if tags is None else {"exit_tags": tags}
        if config.audit:  # the seed is that of sampling: commands of one seed do not all audit the same places
            extra["exit_requests"] = request_names(len(prompts))
        extra |= {"streamer": streamer, "return_dict_in_generate": True}
        output = model.generate(ids, attention_mask=mask, **settings, **options, **extra)
        lengths = new_lengths(output.sequences, width, model.generation_config, stop)
        tokens = [row[width : width + n].tolist() for row, n in zip(output.sequences, lengths, strict=True)]
        layers = getattr(output, "exit_layers", None)
        layers = [[request.num_layers] * len(row) for row in tokens] if layers is None else layers.tolist()
        layers = [own[: len(row)] for own, row in zip(layers, tokens, strict=True)]
        answers.add(tokens, layers, getattr(output, "exit_stats", None) or {})
    return answers


def decode_on_grid(
    config: GenerateConfig,
    folder: ModelFolder,
    request: Request | None,
    layout: Layout,
    device: torch.device,
    streamer: BaseStreamer | None = None,
) -> Answers:
    """All batches, as one rank of the grid; rank 0 has the request and gets the answers."""
    grid = join_grid(layout, device, config.parallel.timeout_minutes)
    prompts, tags = grid.from_rank_0((request.prompts, request.tags) if request else None)
    request = request or Request(config, folder, None, [], prompts, tags, streams=False)  # type: ignore[arg-type]
    decoder = _decoder(request, grid)
    tokenizer = load_tokenizer(folder.base, "model") if folder.generation_config().stop_strings else None
    log = DecisionLog(Path(config.log).expanduser()) if config.log and grid.rank == 0 else None
    answers, start = Answers(), time.perf_counter()
    for number, (rows, tags) in enumerate(request.batches()):
        first, policy = number * config.batch_size, request.policy(tags, len(rows))
        decoded = decoder.generate(
            rows,
            policy,
            seed=config.seed,
            first_row=first,
            streamer=streamer,
            tokenizer=tokenizer,
            **request.sampling(),
        )
        if decoded is None:
            continue
        answers.add(decoded.tokens, decoded.exit_layers, decoded.stats)
        if log is not None:
            log.describe(request.num_layers, policy.layers, policy.name)
            names = request_names(len(rows))
            for row, layers in enumerate(decoded.exit_layers):
                for index, layer in enumerate(layers):
                    score = decoded.exit_confidences[row][index]
                    log.add(names[row], index, layer, score, tags[row] if tags else None)
    answers.seconds = time.perf_counter() - start
    if log is not None:
        log.close()
    return answers


def _decoder(request: Request, grid: Grid) -> PipelineDecoder:
    config, folder, parallel = request.config, request.folder, request.config.parallel
    # All exits that some prompt may take.
    layers = {k for rows, tags in request.batches() for k in request.policy(tags, len(rows)).layers}
    drafts = config.policy == "lossless"
    plan = plan_decoding(folder, parallel.tp, parallel.pp, sorted(layers), parallel.stages, drafts=drafts)
    dtype = DTYPES.get(config.dtype) or getattr(folder.config, "dtype", None) or torch.float32
    stage = load_decoding_stage(folder, plan, grid, dtype)
    return PipelineDecoder(stage, plan, grid, folder.generation_config())
