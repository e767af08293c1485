"""One pipeline stage of joint training: exits, and the backbone or adapters on it, with gradients across stages."""

import torch
from torch import nn

from ee_scale.backbone.adapters import add_adapters
from ee_scale.backbone.digest import bit_digest
from ee_scale.backbone.parallel import sum_partial_gradients
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan
from ee_scale.config.tune import BackboneConfig
from ee_scale.exits.stage import TuningStage
from ee_scale.grid import Grid
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import Tap

FROZEN, LOW_RANK, FULL = "frozen", "low_rank", "full"


class JointStage(TuningStage):
    """A stage whose backbone is reached by gradients. It is built by `build_stage(..., own_logits=True)`.

    Attributes:
        trained: parameters beside the exits, by their names in the whole model ('model.layers.3.mlp.up_proj.weight',
            '....up_proj.lora_A.weight').
        copies: stages that hold the output matrix, where it trains and there are several.
        copied: its name, if this stage is one of them.
        is_original: whether this stage's copy is the one that is saved and counted in norms.
    """

    def train_backbone(self, config: BackboneConfig, copies: tuple[int, ...], grid: Grid, seed: int) -> None:
        """Choose what trains; called once, before the engine sees the stage."""
        self.copies = copies if config.mode == FULL and len(copies) > 1 else ()
        self.copied = self._output_name() if grid.stage in self.copies else None
        tied = self.backbone.model_config.tie_word_embeddings
        self.is_original = self.copied is None or grid.stage == (copies[0] if tied else copies[-1])
        self.trained = (
            add_adapters(self.backbone, config.rank, config.targets, grid, seed)
            if config.mode == LOW_RANK
            else self._open_all(grid)
        )
        for name, parameter in self.trained.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        if config.activation_checkpointing:
            self._checkpoint_layers()

    def _open_all(self, grid: Grid) -> dict[str, nn.Parameter]:
        backbone = self.backbone.requires_grad_(True)
        axis = tensor_plan(backbone.model_config, grid.layout.tp)
        for layer in backbone.base.layers:
            sum_partial_gradients(layer, axis, "", grid.tp_group)
        return {self._full_name(name): parameter for name, parameter in backbone.named_parameters()}

    def _full_name(self, name: str) -> str:
        return self._output_name() if name == "lm_head.weight" else self.backbone.full_name(name)

    def _output_name(self) -> str:
        tied = self.backbone.model_config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def _checkpoint_layers(self) -> None:
        # transformers' own switch; it looks at each layer's `training`, which children and dropout must not see.
        base = self.backbone.base
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable  # < 5.23
        enable({"use_reentrant": False})
        for layer in self.backbone.base.layers:
            layer.training = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, Tap]]:
        """Ids [B, S] or hidden states [B, S, D] -> (hidden states [B, S, D], what each exit reads), with their graph.

        The last stage's hidden states are normed: what the lm_head reads.
        """
        hidden = self.backbone(x)
        return hidden, self._taps[0].pop()

    @property
    def dtype(self) -> torch.dtype:
        """Number type of hidden states."""
        return next(self.backbone.parameters()).dtype

    def forget(self) -> None:
        """Drop what recomputed layers left in the taps."""
        self._taps[0].pop()

    def frozen_digest(self) -> str:
        """Changes if any bit of a frozen tensor of this rank flips."""
        frozen = [(name, p) for name, p in self.backbone.named_parameters() if not p.requires_grad]
        return bit_digest(frozen)


def output_copies(plan: StagePlan, spec: ExitSpec, tied: bool) -> tuple[int, ...]:
    """Stages that hold the output matrix: the last one, those whose exits read it, and the first one if it is tied."""
    last = plan.launched - 1
    readers = {stage for stage in range(plan.launched) if spec.reads_lm_head and plan.exits(stage)}
    return tuple(sorted(readers | {last} | ({0} if tied else set())))
