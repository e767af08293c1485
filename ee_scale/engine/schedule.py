"""Schedules for a frozen backbone, made of DeepSpeed's own pipeline instructions and a few of ours."""

from collections.abc import Iterator, Sequence

from deepspeed.runtime.pipe.schedule import (
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    TrainSchedule,
)


class TrainExits(BufferOpInstruction):
    """Forward and backward of this stage's exits on one micro-batch; gradients end inside the exits."""


class ShareFinalHidden(BufferOpInstruction):
    """Broadcast the last stage's normed hidden state of one micro-batch to all stages (teacher of the KL term)."""


class ReadTaps(BufferOpInstruction):
    """What this stage's exits read of one micro-batch, from the disk instead of from the frozen layers."""


class FrozenSchedule(PipeSchedule):
    """Inference pipeline + local heads: receive, forward, send, train exits; then reduce over replicas and step.

    Nothing flows backwards, so a stage never waits for a later one and runs ahead into the next batch.
    With `share_final` (KL to the final layer) all forwards come first and the exits wait for the teacher.
    With `reads_taps` no frozen layer runs, the teacher's neither, and stages have nothing to do with each other.
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        *,
        has_exits: bool,
        share_final: bool = False,
        reads_taps: bool = False,
    ):
        super().__init__(micro_batches, stages, stage_id)
        self.has_exits = has_exits
        self.share_final = share_final and not reads_taps
        self.reads_taps = reads_taps

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one batch."""
        for micro_batch in range(self.micro_batches):
            buffer = self._buffer_idx(micro_batch)
            states = [LoadMicroBatch(buffer), ReadTaps(buffer)] if self.reads_taps else self._forward(buffer)
            yield states + ([] if self.share_final else self._exits(buffer))
        if self.share_final:
            for buffer in range(self.micro_batches):
                yield [ShareFinalHidden(buffer), *self._exits(buffer)]
        if self.has_exits:
            yield [ReduceGrads(), OptimizerStep()]

    def _forward(self, buffer: int) -> list[PipeInstruction]:
        commands: list[PipeInstruction] = [LoadMicroBatch(buffer)]
        if not self.is_first_stage:
            commands.append(RecvActivation(buffer))
        commands.append(ForwardPass(buffer))
        if not self.is_last_stage:
            commands.append(SendActivation(buffer))
        return commands

    def _exits(self, buffer: int) -> list[PipeInstruction]:
        return [TrainExits(buffer)] if self.has_exits else []

    def num_pipe_buffers(self) -> int:
        """One micro-batch at a time, unless the exits have to wait for the teacher."""
        return self.micro_batches if self.share_final else 1


class JointSchedule(TrainSchedule):
    """DeepSpeed's 1F1B in which every stage loads its micro-batch, before it receives: each has losses of its own."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one batch."""
        first = ForwardPass if self.is_first_stage else RecvActivation
        for commands in super().steps():
            kept = [command for command in commands if not isinstance(command, LoadMicroBatch)]
            load = {command: [LoadMicroBatch(command.buffer_id)] for command in kept if isinstance(command, first)}
            yield [new for command in kept for new in (*load.get(command, []), command)]


class Teach(PipeInstruction):
    """Forward of the frozen teacher on one micro-batch, with its receive and send."""


class SupernetSchedule(TrainSchedule):
    """The teacher's forwards, then DeepSpeed's 1F1B over all (micro-batch, subnet) pairs as one stream.

    A stage goes on to the pairs as soon as its own teacher forwards are done. `micro_batches` counts pairs; `teachers`
    are the micro-batches that the teacher has to look at.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, *, teachers: Sequence[int]):
        super().__init__(micro_batches, stages, stage_id)
        self.teachers = teachers

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Instructions of one batch. Every stage has its data already, and nothing is tied across stages."""
        for micro_batch in self.teachers:
            yield [Teach(micro_batch=micro_batch)]
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, LoadMicroBatch | ReduceTiedGrads)]
