"""A third recipe in a file of its own: `norms` trains the norms of the backbone on the model's loss, without exits."""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from ee_scale.config.schema import RECIPES, VERBS
from ee_scale.config.tune import BackboneConfig, TuneConfig
from ee_scale.data.inputs import run_dataset
from ee_scale.exits.joint import JointStage
from ee_scale.grid import Grid
from ee_scale.planning.estimates import Parameters
from ee_scale.planning.passes import count, local_model
from ee_scale.planning.tune import TunePlan, plan_tune
from ee_scale.training.tune import Tune, TuneRun, start_run


class NormStage(JointStage):
    """Gradients reach all of the backbone, and only norms keep theirs."""

    def train_backbone(self, config: BackboneConfig, copies: tuple[int, ...], grid: Grid, seed: int) -> None:
        super().train_backbone(config, (), grid, seed)  # the output matrix does not train, so no copies of it meet

    def _open_all(self, grid: Grid) -> dict[str, nn.Parameter]:
        opened = super()._open_all(grid)
        for name, parameter in opened.items():
            parameter.requires_grad_("norm" in name)
        return {name: parameter for name, parameter in opened.items() if parameter.requires_grad}


class NormPlan(TunePlan):
    """A plan without exits."""

    @classmethod
    def of(cls, plan: TunePlan) -> "NormPlan":
        """The same cut of the model."""
        values = {field.name: getattr(plan, field.name) for field in fields(plan)}
        none = {
            "spec": replace(plan.spec, layers=()),
            "stages": replace(plan.stages, exit_layers=()),
            "loss_weights": {},
        }
        return cls(**values | none)

    def with_config(self, config: TuneConfig) -> "NormPlan":
        return self.of(plan_tune(config, self.model_dir, self.model_config))

    def parameters(self, stage: int) -> Parameters:
        base = local_model(self.model_config, self.layout.tp, torch.float32).base_model
        norms = [module for name, module in base.layers[0].named_modules() if name.endswith("norm")]
        trained = len(self.stages.layers(stage)) * sum(map(count, norms))
        trained += count(base.norm) * (stage == self.stages.launched - 1)
        held = super().parameters(stage).held
        return Parameters(held - trained, trained, self.shape.hidden_size)


class Norms(Tune):
    """The recipe; what is prepared, stepped, saved and resumed is what `tune` does with a backbone that trains."""

    verb, next_verb = "norms", "export"

    @classmethod
    def of(cls, config: TuneConfig) -> "Norms":
        return cls(NormPlan.of(super().of(config).plan))

    def build(self, grid: Grid, out: Path, scratch: Path | None = None) -> TuneRun:
        samples = self.plan.total_steps * self.config.train.global_batch_size
        dataset = run_dataset(self.config.data, self.plan.model_dir, self.plan.shape.vocab_size, samples)
        return start_run(self.plan, grid, dataset, NormStage)


VERBS[Norms.verb], RECIPES[Norms.verb] = TuneConfig, f"{__name__}.{Norms.__name__}"
