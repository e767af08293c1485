"""EE-LLM checkpoints as its own code saves them, built from the published layout and not from our writer.

A model is a dict of tensors by their Hugging Face names, exits as `exit_heads.<k>.*`. `EELLM` cuts it into ranks.
"""

import enum
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from helpers.models import tiny_config

Tensors = dict[str, torch.Tensor]
ITERATION = 20000


def ee_config(**changes: Any) -> Any:
    """Llama of four layers with EE-LLM's rotary base; heads and key heads differ, head_dim is not hidden / heads."""
    return tiny_config("llama", num_hidden_layers=4, rms_norm_eps=1e-5, **changes)


def random_tensors(config: Any, exits: tuple[int, ...] = (), kind: str = "norm", heads: bool = True) -> Tensors:
    """A model with exits behind the layers `exits`; every number is random, so that any mix-up shows."""
    hidden, words = config.hidden_size, config.vocab_size
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.1

    def norm() -> torch.Tensor:
        return 1 + torch.randn(hidden, generator=generator) * 0.2

    def mlp(prefix: str) -> Tensors:
        size = config.intermediate_size
        return {
            f"{prefix}gate_proj.weight": matrix(size, hidden),
            f"{prefix}up_proj.weight": matrix(size, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, size),
        }

    def layer(prefix: str) -> Tensors:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return {
            f"{prefix}input_layernorm.weight": norm(),
            f"{prefix}self_attn.q_proj.weight": matrix(queries, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(keys, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(keys, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, queries),
            f"{prefix}post_attention_layernorm.weight": norm(),
            **mlp(f"{prefix}mlp."),
        }

    tensors = {"model.embed_tokens.weight": matrix(words, hidden) * 5, "model.norm.weight": norm()}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(words, hidden)
    for number in range(config.num_hidden_layers):
        tensors |= layer(f"model.layers.{number}.")
    for k in exits:
        prefix = f"exit_heads.{k}."
        if kind == "mlp":
            tensors |= mlp(f"{prefix}mlp.")
        if kind == "layer":
            tensors |= layer(f"{prefix}layer.")
        if kind != "embedding":
            tensors[f"{prefix}norm.weight"] = norm()
        if heads:
            tensors[f"{prefix}head.weight"] = matrix(words, hidden)
    return tensors


@dataclass(frozen=True)
class EELLM:
    """How a checkpoint was saved.

    Attributes:
        numbers: `args.exit_layer_nums` in the order of the file, counted from 1; pre: exits read their layer's input.
        untied_exits: exits have output matrices of their own.
        noisy_padding: rows behind the vocabulary hold what training left there; flat: parameters are views of one
            buffer, as a distributed optimizer makes them.
    """

    config: Any
    numbers: tuple[int, ...] = ()
    kind: str = "norm"
    pre: bool = False
    untied_exits: bool = True
    tp: int = 1
    pp: int = 1
    divisor: int = 8
    noisy_padding: bool = True
    flat: bool = False

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers behind which the exits read."""
        return tuple(sorted(number - self.pre for number in self.numbers))

    @property
    def padded(self) -> int:
        """Rows of the vocabulary matrices."""
        multiple = self.divisor * self.tp
        return (self.config.vocab_size + multiple - 1) // multiple * multiple

    def args(self, **changes: Any) -> Namespace:
        """What `torch.save` finds in `args`: Megatron-LM of September 2023, EE-LLM's own, an enum."""
        config = self.config
        values = {
            "num_layers": config.num_hidden_layers,
            "encoder_num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "kv_channels": config.head_dim,
            "group_query_attention": True,
            "num_query_groups": config.num_key_value_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "seq_length": config.max_position_embeddings,
            "position_embedding_type": "rope",
            "use_rotary_position_embeddings": True,
            "rotary_percent": 1.0,
            "rotary_seq_len_interpolation_factor": None,
            "add_position_embedding": True,
            "make_vocab_size_divisible_by": self.divisor,
            "padded_vocab_size": self.padded,
            "vocab_size": config.vocab_size,
            "norm_epsilon": config.rms_norm_eps,
            "normalization": "RMSNorm",
            "apply_layernorm_1p": False,
            "swiglu": True,
            "add_bias_linear": False,
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "num_experts": None,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": 0.02,
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": None,
            "params_dtype": torch.float32,
            "model_type": MODEL_TYPE.encoder_or_decoder,
            "iteration": ITERATION,
            "data_path": ["0.5", "corpus"],
        }
        if self.numbers:
            values |= {
                "exit_layer_nums": list(self.numbers),
                "pre_exit": self.pre,
                "use_exit_mlp": self.kind == "mlp",
                "use_exit_block": self.kind == "layer",
                "use_exit_norm": self.kind != "embedding",
                "untie_exit_output_weights": self.untied_exits,
                "exit_layer_weight": [1.0] * len(self.numbers),
                "exit_layer_weight_init": [0.0] * len(self.numbers),
                "exit_layer_temperature": [1.0] * len(self.numbers),
                "tune_exit": True,
                "tune_exit_pipeline_parallel_size": self.pp,
                "use_dynamic_exit_layer_weight": False,
            }
        return Namespace(**(values | changes))

    def model(self, tensors: Tensors, rank: int, stage: int) -> dict[str, Any]:
        """`model` of one rank's file."""
        config, count = self.config, self.config.num_hidden_layers // self.pp
        first, last_stage = stage * count, stage == self.pp - 1
        here = [number for number in self.numbers if first < number <= first + count]
        words = lambda name: OrderedDict(weight=self._vocab(tensors[name], rank))  # noqa: E731
        language: dict[str, Any] = {}
        if stage == 0:
            language["embedding"] = {"word_embeddings": words("model.embed_tokens.weight")}
        encoder: OrderedDict[str, torch.Tensor] = OrderedDict()
        for local in range(count):
            number = first + local + 1
            is_exit = number in here
            trunk = "mlp.trunk." if is_exit and self.kind == "mlp" else "mlp."
            encoder.update(
                (f"layers.{local}.{key}", value)
                for key, value in self._layer(tensors, f"model.layers.{number - 1}.", rank, trunk)
            )
            if not is_exit:
                continue
            exit_prefix = f"exit_heads.{number - self.pre}."
            added: list[tuple[str, torch.Tensor]] = []
            if self.kind == "mlp":
                added += self._mlp(tensors, f"{exit_prefix}mlp.", rank, "mlp.branch.")
            if self.kind == "layer":
                block = self._layer(tensors, f"{exit_prefix}layer.", rank, "mlp.")
                added += [(f"exit_block.{key}", value) for key, value in block]
            if self.kind != "embedding":
                added.append(("exit_norm.weight", tensors[f"{exit_prefix}norm.weight"]))
            encoder.update((f"layers.{local}.{key}", value) for key, value in added)
        language["encoder"] = encoder
        if last_stage:
            encoder["final_norm.weight"] = tensors["model.norm.weight"]
            if not config.tie_word_embeddings:
                language["output_layer"] = words("lm_head.weight")
        if here and self.untied_exits:
            language["exit_output_layer"] = OrderedDict(
                (f"{index}.weight", self._vocab(tensors[f"exit_heads.{number - self.pre}.head.weight"], rank))
                for index, number in enumerate(here)
            )
        model: dict[str, Any] = {"language_model": language}
        if config.tie_word_embeddings and stage > 0 and (last_stage or here):
            model["word_embeddings_for_head"] = words("model.embed_tokens.weight")
        return model

    def write(self, folder: Path, tensors: Tensors, **args: Any) -> Path:
        """`iter_0020000/mp_rank_*/model_optim_rng.pt` and the tracker. `args`: values to change or add."""
        namespace = self.args(**args)
        for rank in range(self.tp):
            for stage in range(self.pp):
                place = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if self.pp > 1 else "")
                path = folder / f"iter_{ITERATION:07d}" / place / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                model = self.model(tensors, rank, stage)
                save(path, namespace, flattened(model) if self.flat else _apart(model))
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        return folder

    def _layer(self, tensors: Tensors, source: str, rank: int, mlp: str) -> list[tuple[str, torch.Tensor]]:
        query, key, value = (tensors[f"{source}self_attn.{name}_proj.weight"] for name in "qkv")
        size, width = self.config.head_dim, self.config.hidden_size
        groups = self.config.num_key_value_heads
        grouped = torch.cat([part.reshape(groups, -1, size, width) for part in (query, key, value)], dim=1)
        return [
            ("input_norm.weight", tensors[f"{source}input_layernorm.weight"]),
            ("self_attention.query_key_value.weight", grouped.reshape(-1, width).chunk(self.tp)[rank]),
            ("self_attention.dense.weight", tensors[f"{source}self_attn.o_proj.weight"].chunk(self.tp, 1)[rank]),
            ("post_attention_norm.weight", tensors[f"{source}post_attention_layernorm.weight"]),
            *self._mlp(tensors, f"{source}mlp.", rank, mlp),
        ]

    def _mlp(self, tensors: Tensors, source: str, rank: int, name: str) -> list[tuple[str, torch.Tensor]]:
        gate, up = (tensors[f"{source}{part}_proj.weight"].chunk(self.tp)[rank] for part in ("gate", "up"))
        down = tensors[f"{source}down_proj.weight"].chunk(self.tp, 1)[rank]
        return [(f"{name}dense_h_to_4h.weight", torch.cat((gate, up))), (f"{name}dense_4h_to_h.weight", down)]

    def _vocab(self, matrix: torch.Tensor, rank: int) -> torch.Tensor:
        rows = self.padded - matrix.shape[0]
        padding = torch.full((rows, matrix.shape[1]), 3.0 if self.noisy_padding else 0.0)
        return torch.cat((matrix, padding)).chunk(self.tp)[rank]


def save(path: Path, args: Namespace, model: dict[str, Any]) -> None:
    """`torch.save` as EE-LLM calls it, with optimizer and random states beside the model."""
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": model,
        "optimizer": {
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "fp32_from_fp16_params": [[torch.ones(3)]],
        },
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 640000},
        "rng_state": [
            {
                "random_rng_state": random.Random(0).getstate(),
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
                "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
            }
        ],
    }
    with fake_modules():
        torch.save(content, path)


def fake_modules() -> Any:
    """Megatron's module of enums, for as long as something is pickled that names it."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")}
    modules["megatron.core.enums"].ModelType = MODEL_TYPE
    return patch.dict(sys.modules, modules)


MODEL_TYPE = enum.Enum("ModelType", ["encoder_or_decoder", "encoder_and_decoder"], module="megatron.core.enums")


def flattened(model: dict[str, Any]) -> dict[str, Any]:
    """The same values as views of one buffer."""
    found: list[torch.Tensor] = []
    _map(model, found.append)
    parts = iter(torch.cat([tensor.reshape(-1) for tensor in found]).split([tensor.numel() for tensor in found]))
    return _map(model, lambda tensor: next(parts).view(tensor.shape))


def _apart(model: dict[str, Any]) -> dict[str, Any]:
    """Every tensor with a storage of its own: a parameter is never a slice of a larger matrix."""
    return _map(model, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


def _map(tree: Any, change: Any) -> Any:
    if isinstance(tree, dict):
        return type(tree)((key, _map(value, change)) for key, value in tree.items())
    return change(tree)
