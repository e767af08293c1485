"""Learning rate and loss weights as functions of the step, so that a resumed run needs no schedule state."""

from types import SimpleNamespace

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ee_scale.config.groups import OptimConfig
from ee_scale.config.tune import ExitsConfig
from ee_scale.exits.losses import loss_weight


class LearningRate:
    """Megatron's warm-up and decay; step 0 has the first rung of the warm-up, the last step min_lr."""

    def __init__(self, optim: OptimConfig, steps: int):
        """`optim`: the config group of that name."""
        self._scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=int(optim.warmup_fraction * steps),
            lr_decay_steps=steps,
            lr_decay_style=optim.decay,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def at(self, step: int) -> float:
        """Learning rate of the update that `step` (0-based) makes."""
        self._scheduler.num_steps = step + 1
        return self._scheduler.get_lr({})


def loss_weights_at(step: int, final: dict[int, float], exits: ExitsConfig) -> dict[int, float]:
    """Loss weight of each exit at `step`; `exits`: the config group of that name."""
    return {
        k: loss_weight(
            weight, exits.loss_weight_init, step, exits.loss_weight_warmup_steps, exits.loss_weight_warmup_style
        )
        for k, weight in final.items()
    }
