"""A few steps of training for one size alone, from where the supernet left it: a low-rank pair of its own, merged."""

import time

import torch

from ee_scale.config.supernet import PhaseConfig, SupernetConfig
from ee_scale.elastic.sampling import RANDOM, Draw
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.elastic.teacher import TeacherCache
from ee_scale.errors import UserError
from ee_scale.planning.phase_costs import kept_teacher
from ee_scale.training.supernet import SupernetRun, open_phases
from ee_scale.training.supernet_data import Data

POLISH = "polish"


def polish_stage(config: SupernetConfig, phases: int, steps: int) -> PhaseConfig:
    """One more stage behind those of a run that has come to `phases` of them. Raises `UserError`."""
    if config.distill.teacher == "live":
        raise UserError(f"polish={steps}: the run has no frozen teacher (distill.teacher=live)")
    if phases < len(config.stages):
        raise UserError(
            f"polish={steps}: the checkpoint is of stage {phases} of {len(config.stages)}; train to the end"
        )
    last = config.stages[-1]
    if not last.axes:
        raise UserError(f"polish={steps}: the run has only made a teacher; no stage of it has axes")
    return PhaseConfig(POLISH, list(last.axes), steps, last.lr, last.rank)


class Polish:
    """Trains sizes one after another in the live supernet, each from the supernet's own state."""

    def __init__(self, run: SupernetRun):
        """run: in one process, with what was trained; its plan has the stage of `polish_stage` last."""
        self.run, self.seconds = run, 0.0
        open_phases(run, len(run.plan.phases) - 1)
        self.named = run.factors[-1].named
        self._start = {name: parameter.detach().clone() for name, parameter in self.named.items()}
        self._data = Data(run.plan, run.grid)
        run.cache = TeacherCache(kept_teacher(run.plan, run.stage.dtype.itemsize).most_tokens)  # the same texts for all

    def train(self, spec: SubnetSpec) -> dict[str, torch.Tensor]:
        """What a size's own steps trained, by name as in checkpoints; the live supernet has it until `restore`."""
        self.restore()
        run, began = self.run, time.perf_counter()
        run.step = run.plan.phases.start(run.index)
        run.start_engine()
        micro_batches, count = self._data.micro_batches(run.consumed_samples), run.plan.num_micro_batches
        engine = run.ready()
        for step in range(run.plan.phases[run.index].steps):
            engine.set_lr(run.rate.at(step))
            engine.train_step(micro_batches, [Draw(m, RANDOM, spec, 1 / count) for m in range(count)])
        run.close_engine()
        self.seconds += time.perf_counter() - began
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """The supernet as it was."""
        for name, parameter in self.named.items():
            parameter.copy_(self._start[name])
