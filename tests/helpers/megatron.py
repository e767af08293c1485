"""Megatron-Core's own GPTModel on CPU ranks, built from a checkpoint's `args` the way Megatron-LM builds it."""

import dataclasses
import itertools
import math
import queue
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import moe_utils
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Grid = tuple[int, int]  # tensor ranks, stages
Signature = dict[str, tuple[int, ...] | None]  # by key: a tensor's shape, None for an empty entry


@dataclasses.dataclass(frozen=True)
class RankFiles:
    """A checkpoint of `mp_rank_*` files to be taken by Megatron. `again`: where Megatron's own state dict is saved."""

    name: str
    grid: Grid
    iteration: Path
    again: Path


@dataclasses.dataclass
class Taken:
    """What one rank made of its file.

    Attributes:
        place: tensor rank, stage; asked, found: what GPTModel has and what the file has; error: of strict loading.
        state: its tensors after loading; logits: of the last stage.
    """

    place: Grid
    asked: Signature
    found: Signature
    error: str = ""
    state: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    logits: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A `torch_dist` checkpoint to be loaded at `grid`. `again`: saved from there, by name of the variant.

    `changes`: of its args, before the model is built.
    """

    name: str
    grid: Grid
    iteration: Path
    chunks: int = 1
    again: dict[str, Path] = dataclasses.field(default_factory=dict)
    by_rank: Path | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Loaded:
    """What one rank has: its part of the index (main copies), and its tensors after loading."""

    place: Grid
    index: dict[str, tuple]
    state: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


# What `sharded_state_dict(metadata)` gets for the layouts that Megatron-Core can write.
VARIANTS = {
    "stacked": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    "by_layer": {"non_homogeneous_layers": True},
    "halves": {"singleton_local_shards": True},
}


def take_rank_files(rank: int, jobs: list[RankFiles], ids: torch.Tensor) -> dict[tuple[str, Grid], Taken]:
    """Load each rank's file strictly, run the model, and save its state dict as Megatron-LM does."""
    found = {}
    for grid, group in itertools.groupby(jobs, lambda job: job.grid):
        with model_parallel(*grid) as copy:
            for job in group:
                taken = None if copy else _take(job)
                if _all_well(not taken or not taken.error) and taken:
                    model = taken.model
                    taken.logits = compute_logits(model, ids)
                    _save_rank(job.again, [model.state_dict()], _load(job.iteration)["args"])
                if taken:
                    del taken.model
                    found[job.name, grid] = taken
    return found


def take_sharded(rank: int, jobs: list[Sharded]) -> dict[tuple[str, Grid], Loaded]:
    """Load by Megatron-Core's distributed checkpointing, strict as by default, and save again in its layouts."""
    found = {}
    grids = itertools.groupby(jobs, lambda job: (*job.grid, job.chunks))
    for (tp, pp, chunks), group in grids:
        with model_parallel(tp, pp, chunks) as copy:
            for job in group:
                args = dist_checkpointing.load_common_state_dict(str(job.iteration))["args"]
                vars(args).update(job.changes)
                models = build_chunks(args, chunks)
                loaded = Loaded(place(), index_of(sharded(models)))
                try:
                    states = dist_checkpointing.load(sharded(models), str(job.iteration))
                except Exception as error:  # goes on to the parent at once: the other ranks would wait for this one
                    error.add_note(f"loading {job.name} at {job.grid}")
                    raise
                for name, model in models.items():
                    model.load_state_dict(states[name], strict=True)
                    loaded.state |= {f"{name}.{key}": tensor for key, tensor in tensors(model)}
                for variant, folder in job.again.items():
                    save_sharded(folder, models, args, VARIANTS[variant])
                if job.by_rank and not copy:
                    _save_rank(job.by_rank, [model.state_dict() for model in models.values()], args)
                if not copy:
                    found[job.name, job.grid] = loaded
    return found


@contextmanager
def model_parallel(tp: int, pp: int, chunks: int = 1, ep: int = 1) -> Iterator[int]:
    """Megatron's groups over the ranks that are there; yields this rank's number among those with the same part."""
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=ep,
    )
    try:
        with without_cuda():
            yield parallel_state.get_expert_data_parallel_rank()
    finally:
        parallel_state.destroy_model_parallel()


class _OnCpu(TorchFunctionMode):
    """What asks for CUDA gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def without_cuda() -> Iterator[None]:
    """Megatron-Core as it is, but for its device, and for writers that are threads (a rank may have no children)."""
    threads = SimpleNamespace(Process=threading.Thread, Queue=queue.Queue, JoinableQueue=queue.Queue)
    threads.Manager = lambda: threads
    initialize_rng_tracker(inference_rng_tracker=True)  # the one that draws nothing
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        # Without Transformer Engine release 0.16 asks for a name that it has not defined.
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(
            mock.patch.object(filesystem_async, "mp", SimpleNamespace(get_context=lambda kind: threads))
        )
        stack.enter_context(_OnCpu())
        yield


def place() -> Grid:
    """This rank's tensor rank and stage."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def build(args: Namespace, chunk: int | None = None, fused_names: bool = False) -> GPTModel:
    """This rank's GPTModel. Sizes of the grid and the padding follow the groups that are there, not `args`.

    `fused_names`: a norm in front of a router keeps its name on disk, as with Transformer Engine's layers.
    """
    tp, pp, virtual = _sizes()
    names = [field.name for field in dataclasses.fields(TransformerConfig) if hasattr(args, field.name)]
    values = {name: getattr(args, name) for name in names} | {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_dtype": args.params_dtype,
        "layernorm_epsilon": args.norm_epsilon,
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "gated_linear_unit": args.swiglu,
        "activation_func": functional.silu if args.swiglu else functional.gelu,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "num_moe_experts": args.num_experts,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "moe_token_dispatcher_type": "allgather",  # the others make streams of CUDA
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
    }
    multiple = args.make_vocab_size_divisible_by * tp
    spec = get_gpt_layer_local_spec(
        num_experts=args.num_experts, qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
    if fused_names:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    model = GPTModel(
        config=TransformerConfig(**values),
        transformer_layer_spec=spec,
        vocab_size=math.ceil(args.vocab_size / multiple) * multiple,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=chunk,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what loading leaves out shows
    return model.eval()


def build_chunks(args: Namespace, chunks: int) -> dict[str, GPTModel]:
    """The model or its virtual stages, by the names that Megatron-LM's state dicts have for them."""
    if chunks == 1:
        return {"model": build(args)}
    return {f"model{chunk}": build(args, chunk) for chunk in range(chunks)}


@torch.no_grad()
def compute_logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor | None:
    """[B, S, padded words] on the last stage, None elsewhere."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not first:
        hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    out = model(ids, torch.arange(ids.shape[1])[None].expand_as(ids), None)
    if last:
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def tensors(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict without empty entries."""
    yield from ((key, value.clone()) for key, value in model.state_dict().items() if value is not None)


def signature(state: dict[str, Any]) -> Signature:
    """Keys and shapes."""
    return {key: None if value is None else tuple(value.shape) for key, value in state.items()}


def sharded(models: dict[str, GPTModel], metadata: dict[str, bool] | None = None) -> dict[str, Any]:
    """What Megatron-LM hands to distributed checkpointing."""
    metadata = metadata or VARIANTS["stacked"]
    # A copy each: Megatron puts the groups of the moment into what it gets.
    return {name: model.sharded_state_dict(metadata=dict(metadata)) for name, model in models.items()}


def index_of(state: dict[str, Any]) -> dict[str, tuple]:
    """key@offsets -> (whole shape, shape, dtype) of every tensor that this rank writes; objects by their key."""
    apply_factories(state)
    found = {}
    for item in nested_values(state):
        if not is_main_replica(item.replica_id):
            continue
        if isinstance(item, ShardedTensor):
            shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
            found[f"{item.key}@{list(item.global_offset)}"] = (tuple(item.global_shape), shape, item.dtype)
        elif isinstance(item, ShardedObject):
            found[item.unique_key] = ()
    return found


def index_on_disk(folder: Path) -> dict[str, tuple]:
    """Of a `torch_dist` checkpoint, told as `index_of` tells it."""
    found: dict[str, tuple] = {}
    for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            found[key] = ()
            continue
        for chunk in entry.chunks:
            found[f"{key}@{list(chunk.offsets)}"] = (tuple(entry.size), tuple(chunk.sizes), entry.properties.dtype)
    return found


def megatron_lm_args(args: Namespace) -> Namespace:
    """With values of the kinds that Megatron-LM's arguments have, which ours do not."""
    tp, pp, chunks = _sizes()
    multiple = args.make_vocab_size_divisible_by * tp
    extra = {
        "model_type": ModelType.encoder_or_decoder,
        "attention_backend": AttnBackend.auto,
        "exit_signal": signal.SIGTERM,
        "save": Path("/checkpoints"),
        "data_path": None,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": chunks,
        "padded_vocab_size": math.ceil(args.vocab_size / multiple) * multiple,
    }
    return Namespace(**(vars(args) | extra))


def _sizes() -> tuple[int, int, int | None]:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    return tp, pp, parallel_state.get_virtual_pipeline_model_parallel_world_size()


def _take(job: RankFiles) -> Taken:
    content = _load(job.iteration)
    model = build(content["args"])
    taken = Taken(place(), signature(model.state_dict()), signature(content["model"]))
    try:
        model.load_state_dict(content["model"], strict=True)
    except RuntimeError as error:
        taken.error = str(error)
    taken.state = dict(tensors(model))
    taken.model = model
    return taken


def _rank_folder() -> str:
    rank, stage = place()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def _load(iteration: Path) -> dict[str, Any]:
    return torch.load(iteration / _rank_folder() / "model_optim_rng.pt", weights_only=False)


def _save_rank(iteration: Path, states: list[dict[str, Any]], args: Namespace) -> None:
    names = ["model"] if len(states) == 1 else [f"model{number}" for number in range(len(states))]
    random_state = {"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}
    content = {
        "args": megatron_lm_args(args),
        "checkpoint_version": 3.0,
        "iteration": 10,
        **dict(zip(names, states, strict=True)),
        "optimizer": {"optimizer": {"param_groups": [{"lr": 1e-4}]}, "exp_avg": torch.ones(3)},
        "opt_param_scheduler": {"max_lr": 1e-4},
        "rng_state": [random_state],
    }
    path = iteration / _rank_folder() / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def save_sharded(folder: Path, models: dict[str, GPTModel], args: Namespace, metadata: dict[str, bool]) -> None:
    """By Megatron-Core, with what else lies in such a checkpoint: counters, random states, an optimizer's tensor."""
    rank, stage = place()
    tp, pp, _ = _sizes()
    copy = parallel_state.get_data_parallel_rank()
    state = sharded(models, metadata) | {
        "args": megatron_lm_args(args),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (pp, tp), (stage, rank), replica_id=copy),
        "optimizer": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(4), replica_id=dist.get_rank()
        ),
    }
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=dict(metadata))


def _all_well(well: bool) -> bool:
    """Whether it is so on every rank: no rank goes on to talk to one that failed."""
    flag = torch.tensor(int(well))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
