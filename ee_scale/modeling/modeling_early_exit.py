"""A Hugging Face causal language model with early exits.

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model(input_ids).exit_logits    # {layer: [B, S, V]}
"""

from .versions import CACHE, name_cache  # before all that an old transformers lacks

# isort: split
import inspect
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .decode import LOG_OPTIONS, ExitDecoding, settle_cache, take_options, take_stop_strings
from .heads import ExitSpec, ExitTaps, build_exit_heads, run_single_layer
from .kinds import ExitKind, Tap
from .packing import packed_linears
from .wrapped import MARK, is_wrapped, language_config, opening

PREFIX = "exit_heads."
AUTO_MAP = {"AutoModelForCausalLM": "modeling_early_exit.EarlyExitForCausalLM"}


@dataclass
class EarlyExitOutput(CausalLMOutputWithPast):
    """The base model's output, and `exit_logits`: exit layer -> logits [B, S, V] (None when not asked for)."""

    exit_logits: dict[int, torch.Tensor] | None = None


OUTPUTS = {field.name for field in fields(CausalLMOutputWithPast)}


class EarlyExitMixin:
    """Goes in front of a `...ForCausalLM` class: its logits stay exactly as they are, exits come on top.

    Attributes:
        pack_weights: whether `generate` packs the linear layers on a CPU (see `packing`).
    """

    pack_weights = True

    def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object):
        super().__init__(config, *args, **kwargs)
        self.exit_spec = ExitSpec.from_dict(config.early_exit)
        self.exit_heads = build_exit_heads(
            self.exit_spec, self.base_model.layers, self.base_model.norm, config.vocab_size
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_exit_logits: bool = True,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> EarlyExitOutput:
        """As the base model's forward; `output_exit_logits=False` leaves the exits out (and costs nothing).

        `past_key_values` is the older name of `cache`; both work, whatever transformers is installed.
        Raises ValueError if an exit with a layer of its own is asked to continue a cache.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        name_cache(inputs)
        if not output_exit_logits:
            return super().forward(**inputs)
        filled = inputs.get(CACHE)
        if self.exit_spec.exit_kind.attends and filled is not None and filled.get_seq_length() > 0:
            raise ValueError(f"exits of kind '{self.exit_spec.kind}' need the whole sequence: pass no filled cache")
        layers = self.base_model.layers
        taps = ExitTaps(self.exit_spec, {k: layers[k - 1] for k in self.exit_spec.layers})
        try:
            output = super().forward(**{**inputs, "return_dict": True})
        finally:
            taps.remove()
        masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        exit_logits = {k: self._exit_logits(k, tap, masks, logits_to_keep) for k, tap in taps.pop().items()}
        known = {name: value for name, value in output.items() if name in OUTPUTS}  # others also give routers' logits
        return EarlyExitOutput(**known, exit_logits=exit_logits)

    def _exit_logits(self, k: int, tap: Tap, masks: dict[str, Any], logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        def run_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            return run_single_layer(self.base_model, layer, hidden, **masks)

        head, output_norm = self.exit_heads[str(k)], self.exit_spec.output_norm(self.base_model.layers[k - 1])
        hidden = slice_logits_to_keep(head.hidden(tap, output_norm, run_layer), logits_to_keep)
        return head.logits(hidden, self.get_output_embeddings())

    def save_pretrained(self, save_directory: str | PathLike[str], *args: object, **kwargs: object) -> None:
        """As the base class, plus the code that `trust_remote_code=True` needs, less what is logged and where."""
        for key in LOG_OPTIONS:
            if hasattr(self.generation_config, key):
                delattr(self.generation_config, key)
        if is_wrapped(self.config):  # from now on a language model, by the names of one
            self._weight_conversions: list[object] = []
            delattr(self.config, MARK)
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map(self.exit_spec)}
        super().save_pretrained(save_directory, *args, **kwargs)
        copy_code(self.exit_spec, Path(save_directory))

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; with `exit_policy` tokens may leave at an exit, or be drafted by one.

        exit_policy: 'threshold' (max probability), 'entropy' (nats), 'margin' (p1 - p2), 'patience', 'fixed' (see
            `policies`), 'lossless' (see `speculate`); None or 'off': plain generation, the exits are not used.
        exit_threshold: a number, one per exit, one list per row, or {layer: value}; None: as calibrated.
        exit_min_layer: no exit before this layer. exit_patience: exits in a row that must agree.
        exit_layer: the exit of 'fixed', or the drafting exit of 'lossless' (None: chosen by measured cost).
        exit_max_pending: tokens whose deeper keys and values may wait to be computed.
        exit_draft_length: 'lossless': drafts per pass, None: decided draft by draft, where they pay. An exit whose
            drafts are rejected again and again rests for growing spells, in which every pass makes one token as plain
            decoding does.
        exit_shortlist: 'lossless': draft among this many tokens (as calibrated; with shortlist heads: of theirs), or
            among these token ids.
        exit_draft_weights: 'lossless': 'int8': the early layers of drafts are int8 copies, or the model's own where
            these are faster as measured (with `exit_draft_length` always copies); 'model': always the model's own.
        exit_graphs: True: steps with static shapes, whose parts are recorded as CUDA graphs on a GPU (on a CPU they
            run as they are, which gains nothing).
        exit_log: path or `DecisionLog`; exit_requests, exit_tags: a name and a tag per row, for the log;
            exit_audit: share of early tokens that are compared with the full model when its layers catch up.
        exit_follow: a `FollowedLimits` (see `following`), which raises limits where audited tokens no longer agree.

        On a CPU the linear layers are packed first (see `packing`), unless the model's `pack_weights` is false.
        With `return_dict_in_generate=True` the output is an `EarlyExitGenerateOutput`. With 'lossless' and sampling,
        a seed gives the same text every time only if `exit_layer` and `exit_draft_length` are fixed too.
        Raises ValueError, in one line, for options that do not fit the model or one another.
        """
        with packed_linears(self) if self.pack_weights else nullcontext():
            return self._generate(inputs, kwargs)

    def _generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
        name_cache(kwargs)
        options = take_options(kwargs, kwargs.get("generation_config"), self.generation_config)
        if options.get("exit_policy", "off") == "off":
            return super().generate(inputs, **kwargs)
        if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
            raise ValueError("exit_policy: leave custom_generate and assistant_model out")
        settle_cache(kwargs, kwargs.get("generation_config"), self.generation_config)
        take_stop_strings(kwargs, kwargs.get("generation_config"), self.generation_config)
        decoding = ExitDecoding(options, kwargs.get("streamer"))
        return super().generate(inputs, custom_generate=decoding, **kwargs)

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> dict[str, Any]:
        """Plain generation reads the final layer only."""
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "output_exit_logits": False}


def code_files() -> list[Path]:
    """What goes into every exported folder: all that lies beside this file."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")


def auto_map(spec: ExitSpec) -> dict[str, str]:
    """Of a folder with these exits; a kind from a file of its own is registered by opening that file."""
    home = kind_file(spec)
    return AUTO_MAP if home == kind_file() else {"AutoModelForCausalLM": f"{home.stem}.{EarlyExitForCausalLM.__name__}"}


def kind_file(spec: ExitSpec | None = None) -> Path:
    """Where the kind of these exits is written; of None: the kinds that are always there."""
    return Path(inspect.getfile(ExitKind if spec is None else type(spec.exit_kind)))


def copy_code(spec: ExitSpec, folder: Path) -> None:
    """Put the code of these exits into a folder whose config has their `auto_map`.

    Raises ValueError if their kind comes from a file that is called like one of those that are always there, or lies in
    this folder itself.
    """
    home, always = kind_file(spec), code_files()
    own = folder / home.name
    if home not in always:
        if home.name in {path.name for path in always}:
            raise ValueError(f"{home}: exported folders have a file of this name; give this one another")
        if own.exists() and own.samefile(home):
            raise ValueError(f"{home}: would be written over by the copy that goes with the model; save it elsewhere")
    for path in always:
        shutil.copyfile(path, folder / path.name)
    if home in always:
        return
    text = re.sub(r"^from ee_scale\.modeling\.", "from .", home.read_text(encoding="utf-8"), flags=re.MULTILINE)
    opener = f"from .modeling_early_exit import {EarlyExitForCausalLM.__name__}  # noqa: E402, F401\n"
    own.write_text(f"{text}\n{opener}", encoding="utf-8")


def early_exit_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The early-exit version of the stock class for this config. Raises ValueError if transformers has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no causal language model for '{config.model_type}'")
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # The stock name: `architectures` in a saved config then still says what the folder is without exits.
    return type(stock.__name__, (EarlyExitMixin, stock), {"__module__": __name__})


class EarlyExitForCausalLM:
    """Opens an exported folder; what comes back is the stock class with exits on top."""

    _auto_class: str | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Called by transformers' AutoModel."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *args: object, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`. Raises ValueError if the folder has no exits, or not exactly those
        that its config names: a missing exit head is never filled with random numbers.

        pack_weights: see `EarlyExitMixin`.
        """
        pack_weights = kwargs.pop("pack_weights", True)
        kwargs.pop("trust_remote_code", None)
        kwargs.pop("adapter_kwargs", None)
        wants_info = kwargs.pop("output_loading_info", False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False) if config is None else config
        config = language_config(config)
        if getattr(config, "early_exit", None) is None:
            raise ValueError(f"{path}: its config.json has no 'early_exit'; it is not a model with exits")
        model_class = early_exit_class(config)
        model, info = model_class.from_pretrained(path, *args, **opening(config), output_loading_info=True, **kwargs)
        check_exit_keys(path, info)
        model.pack_weights = pack_weights
        return (model, info) if wants_info else model


def check_exit_keys(path: str | PathLike[str], info: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError if exit heads are missing from the files, or in them without being in the config."""
    for what in ("missing", "unexpected"):
        keys = sorted(key for key in info[f"{what}_keys"] if key.startswith(PREFIX))
        if keys:
            raise ValueError(
                f"{path}: {what} exit heads: {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} "
                f"({len(keys)} tensors); the files and config.json's early_exit do not belong together"
            )
