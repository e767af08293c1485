"""A Hugging Face model run layer by layer, each layer read, used and dropped."""

from collections.abc import Iterator

import torch
from torch import nn

from ee_scale.conversion.copying import Source
from ee_scale.conversion.model import Model
from ee_scale.families.experts import STACK
from ee_scale.families.registry import experts_of
from ee_scale.modeling.heads import ExitTaps, build_exit_heads, run_single_layer
from ee_scale.modeling.modeling_early_exit import PREFIX

Step = tuple[str, torch.Tensor]


class HuggingFaceRun:
    """transformers' own modules, in fp32 on the CPU."""

    def __init__(self, model: Model, source: Source):
        """`source` has the model's tensors by their Hugging Face names."""
        from transformers import AutoModelForCausalLM

        self.model, self.source = model, source
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            self.whole = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        self.base = self.whole.base_model
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config)
        self.heads = nn.ModuleDict()
        if model.exits:
            with torch.device("meta"):
                self.heads = build_exit_heads(model.exits, self.base.layers, self.base.norm, config.vocab_size)

    @torch.no_grad()
    def steps(self, ids: torch.Tensor) -> Iterator[Step]:
        """[1, S] ids -> ("embedding", [1, S, D]), ("layer 1", ...), ("exit 1", [1, S, V]), ..., ("logits", ...)."""
        yield "embedding", (hidden := self._loaded(self.base.embed_tokens, "model.embed_tokens")(ids))
        for number, layer in enumerate(self.base.layers, 1):
            spec = self.model.exits
            here = spec is not None and number in spec.layers
            taps = ExitTaps(spec, {number: layer}) if here else None
            hidden = run_single_layer(self.base, self._loaded(layer, f"model.layers.{number - 1}"), hidden)
            yield f"layer {number}", hidden
            if taps is not None:
                tap = taps.pop()[number]
                taps.remove()
                yield f"exit {number}", self._exit_logits(number, tap)
            layer.to("meta")
        hidden = self._loaded(self.base.norm, "model.norm")(hidden)
        yield "logits", self._lm_head()(hidden)

    def _exit_logits(self, number: int, tap: object) -> torch.Tensor:
        head = self._loaded(self.heads[str(number)], f"{PREFIX}{number}")
        # No family with a norm behind its MLP has a map to Megatron.
        hidden = head.hidden(tap, None, lambda layer, x: run_single_layer(self.base, layer, x))
        logits = head.scored_logits(hidden, self._lm_head() if self.model.exits.reads_lm_head else None)
        head.to("meta")
        return logits

    def _lm_head(self) -> nn.Module:
        tied = self.model.config.tie_word_embeddings
        head = nn.Linear(1, 1, bias=False, device="meta")
        head.weight = nn.Parameter(self.source.read("model.embed_tokens.weight" if tied else "lm_head.weight").float())
        return head

    def _loaded(self, module: nn.Module, prefix: str) -> nn.Module:
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            self._fill(parameter, f"{prefix}.{name}")
        return module

    def _fill(self, parameter: torch.Tensor, name: str) -> None:
        experts = experts_of(self.model.config)
        if experts is None or not (stack := STACK.fullmatch(name)):
            parameter.copy_(self.source.read(name if experts is None else experts.renamed(name)))
            return
        for number, one in enumerate(parameter):
            gate, up, down = (self.source.read(stack[1] + own) for own in experts.names(number))
            one.copy_(torch.cat((gate, up)) if stack[2] == "gate_up_proj" else down)
