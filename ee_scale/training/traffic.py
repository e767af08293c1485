"""What crosses ranks in one optimizer step, and when: bytes by kind of group, and a replay of instruction streams."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.config.schema import TrainingConfig, TuneConfig
from ee_scale.config.supernet import SupernetConfig
from ee_scale.exits.joint import FULL, output_copies
from ee_scale.modeling.kinds import LAYER_BACKWARD, LAYER_FORWARD
from ee_scale.training.cost import drawn_specs, draws_per_micro_batch
from ee_scale.training.memory import supernet_parameters, tune_parameters
from ee_scale.training.plan import TunePlan
from ee_scale.training.supernet_plan import SupernetPlan


@dataclass(frozen=True)
class StageTraffic:
    """What one rank of a stage sends in one optimizer step, bytes; collectives as a ring does them.

    Attributes:
        stages: hidden states and gradients to the neighbouring stages, and gradients of a matrix with copies there.
        tensor: all-reduces of hidden states over the tensor group; `tensor_calls` of them.
        reduce: gradients over the replicas. gather: updated parameters over the replicas.
    """

    stages: float
    tensor: float
    tensor_calls: int
    reduce: float
    gather: float

    @property
    def total(self) -> float:
        return self.stages + self.tensor + self.reduce + self.gather


def ring(bytes_: float, ranks: int) -> float:
    """Bytes that each rank sends when a ring reduces or gathers `bytes_` (twice that for an all-reduce)."""
    return bytes_ * (ranks - 1) / ranks


def step_traffic(plan: TunePlan | SupernetPlan, config: TrainingConfig, *, bf16: bool) -> list[StageTraffic]:
    """Of each launched stage; of a supernet: of its last recipe stage."""
    size = 2 if bf16 else 4
    of_stage = _tune_traffic if isinstance(plan, TunePlan) else _supernet_traffic
    return [of_stage(plan, config, stage, size) for stage in range(plan.stages.launched)]


def _tune_traffic(plan: TunePlan, config: TuneConfig, stage: int, size: int) -> StageTraffic:
    state = config.train.micro_batch_size * config.data.seq_length * plan.shape.hidden_size * size
    joint, last = plan.backbone.mode != "frozen", stage == plan.stages.launched - 1
    layers, exits, count = len(plan.stages.layers(stage)), len(plan.stages.exits(stage)), plan.num_micro_batches
    crossing = state * ((not last) + (joint and stage > 0))
    teaches = config.exits.kl_weight > 0
    if teaches and plan.stages.launched > 1:
        crossing += state * last  # the teacher's states, from the last stage to all
    per_exit = plan.spec.exit_kind.all_reduces(joint)
    calls = layers * (LAYER_FORWARD + LAYER_BACKWARD * joint) + exits * (per_exit + 1) + (stage == 0) + joint * last
    trained = tune_parameters(plan, config, stage).trained
    traffic = _traffic(plan, count, crossing, calls, state, trained, size)
    copies = output_copies(plan.stages, plan.spec, plan.shape.tied_embeddings) if plan.backbone.mode == FULL else ()
    if stage not in copies:
        return traffic
    rows = padded_vocab(plan.shape.vocab_size, plan.layout.tp) // plan.layout.tp
    return replace(traffic, stages=traffic.stages + 2 * ring(4 * rows * plan.shape.hidden_size, len(copies)))


def _supernet_traffic(plan: SupernetPlan, config: SupernetConfig, stage: int, size: int) -> StageTraffic:
    index = len(plan.recipe.stages) - 1
    last, draws = stage == plan.stages.launched - 1, draws_per_micro_batch(plan, index)
    width = sum(spec.hidden * times for spec, times in drawn_specs(plan, index)) / draws
    state = config.train.micro_batch_size * config.data.seq_length * width * size
    crossing = state * (draws * ((not last) + (stage > 0)) + (draws > 1) * (not last))
    layers = len(plan.stages.layers(stage))
    calls = draws * (layers * (LAYER_FORWARD + LAYER_BACKWARD) + (stage == 0) + last) + layers * LAYER_FORWARD
    trained = supernet_parameters(plan, index, stage).trained
    return _traffic(plan, plan.num_micro_batches, crossing, calls, state, trained, size)


def _traffic(plan: Any, count: int, crossing: float, calls: int, state: float, trained: int, size: int) -> StageTraffic:
    tp, dp = plan.layout.tp, plan.layout.dp
    calls = count * calls * (tp > 1)
    # bf16 gradients are summed whole in fp32; ZeRO-1 in fp32 reduces each to the replica that owns it.
    reduce = ring(4 * trained, dp) * (2 if size == 2 else 1)
    return StageTraffic(count * crossing, calls * 2 * ring(state, tp), calls, reduce, ring(size * trained, dp))


# -- when --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One thing that a stage does.

    kind: 'compute' (`seconds` of a core per rank), 'send' and 'recv' (messages of a channel arrive in order; a send
    takes `seconds`), 'meet' (all stages wait for each other, then `seconds`), 'mark' (end of a step).
    """

    kind: str
    seconds: float = 0.0
    peer: int = -1
    channel: str = ""
    name: str = ""


# (stage, name of an instruction, how many of its name came before in this step) -> seconds
Seconds = Callable[[int, str, int], float]


def operations(instructions: Iterable[Any], stage: int, stages: int, seconds: Seconds) -> list[Op]:
    """One step of a stage: DeepSpeed's instructions (or lists of them, as schedules yield) as ops, and a mark."""
    ops, seen = [], defaultdict(int)
    for command in _flat(instructions):
        name = type(command).__name__
        index, seen[name] = seen[name], seen[name] + 1
        time = seconds(stage, name, index)
        if name == "Teach":
            ops += [Op("recv", 0.0, stage - 1, "teach")] * (stage > 0)
            ops.append(Op("compute", time, name=name))
            ops += [Op("send", seconds(stage, "SendActivation", index), stage + 1, "teach")] * (stage < stages - 1)
        elif name in _MESSAGES:
            kind, channel, step = _MESSAGES[name]
            ops.append(Op(kind, time, stage + step, channel, name))
        elif name == "ShareFinalHidden":
            ops.append(Op("meet", time, name=name))
        elif name not in ("LoadMicroBatch", "ReduceTiedGrads"):
            ops.append(Op("compute", time, name=name))
    return [*ops, Op("mark")]


_MESSAGES = {
    "SendActivation": ("send", "activation", 1),
    "RecvActivation": ("recv", "activation", -1),
    "SendGrad": ("send", "gradient", -1),
    "RecvGrad": ("recv", "gradient", 1),
}


def _flat(instructions: Iterable[Any]) -> Iterable[Any]:
    for item in instructions:
        yield from item if isinstance(item, list) else [item]


@dataclass(frozen=True)
class Replay:
    """marks[stage]: when each step ended there. spans[stage]: (from, to, name) of all that ran, waiting left out."""

    marks: list[list[float]]
    spans: list[list[tuple[float, float, str]]]

    def step_seconds(self, warm_up: int = 1) -> float:
        """Mean time of a step after the first ones, at the stage that is slowest."""
        return max((ends[-1] - ends[warm_up - 1]) / (len(ends) - warm_up) for ends in self.marks)

    def idle(self, warm_up: int = 0) -> list[float]:
        """Share of each stage's time, after the first steps, in which nothing ran there."""
        shares = []
        for ends, spans in zip(self.marks, self.spans, strict=True):
            start = ends[warm_up - 1] if warm_up else 0.0
            busy = sum(max(0.0, end - max(begin, start)) for begin, end, _ in spans)
            shares.append(1 - busy / (ends[-1] - start))
        return shares


class _Stage:
    """One stage in the replay: `left` seconds of the op at the head of `ops`, None while it waits."""

    def __init__(self, ops: Sequence[Op]):
        self.ops = deque(ops)
        self.left: float | None = None
        self.began = 0.0
        self.marks: list[float] = []
        self.spans: list[tuple[float, float, str]] = []

    def head(self, kind: str) -> bool:
        """Whether it waits in front of such an op."""
        return self.left is None and bool(self.ops) and self.ops[0].kind == kind


class _Clock:
    """Time, the stages and the messages on their way."""

    def __init__(self, streams: Sequence[Sequence[Op]], rendezvous: bool):
        self.now, self.rendezvous = 0.0, rendezvous
        self.stages = [_Stage(ops) for ops in streams]
        self.mail: dict[tuple[int, int, str], int] = defaultdict(int)

    def begin(self) -> None:
        """Start on every free stage what can start."""
        while any(self._begin(number) for number in range(len(self.stages))):
            pass

    def _begin(self, number: int) -> bool:
        stage = self.stages[number]
        if stage.left is not None or not stage.ops:
            return False
        op, started = stage.ops[0], [stage]
        if op.kind == "mark":
            stage.marks.append(self.now)
            stage.ops.popleft()
            return True
        if op.kind == "meet":
            started = self.stages if all(other.head("meet") for other in self.stages) else []
        elif op.kind == "recv" and self.rendezvous:
            sender = self.stages[op.peer]
            fits = sender.head("send") and (sender.ops[0].peer, sender.ops[0].channel) == (number, op.channel)
            started = [stage, sender] if fits else []
        elif op.kind == "recv":
            waiting = (op.peer, number, op.channel)
            started = [stage] if self.mail[waiting] else []
            self.mail[waiting] -= bool(started)
        elif op.kind == "send" and self.rendezvous:
            started = []  # the receiver starts both
        longest = max((other.ops[0].seconds for other in started), default=0.0)
        for other in started:
            other.left, other.began = longest, self.now
        return bool(started)

    def advance(self, cores: float, ranks: int) -> None:
        """Go on to when the next running op ends. Raises RuntimeError if all stages wait."""
        running = [stage for stage in self.stages if stage.left is not None]
        if not running:
            raise RuntimeError(f"all stages wait: {[stage.ops[0] for stage in self.stages if stage.ops]}")
        rate = min(1.0, cores / (len(running) * ranks))
        shortest = min(stage.left for stage in running)
        self.now += shortest / rate
        for number, stage in enumerate(self.stages):
            if stage.left is None:
                continue
            stage.left -= shortest
            if stage.left <= 1e-12:
                op, stage.left = stage.ops.popleft(), None
                stage.spans.append((stage.began, self.now, op.name))
                if op.kind == "send" and not self.rendezvous:
                    self.mail[number, op.peer, op.channel] += 1


def replay(streams: Sequence[Sequence[Op]], cores: float = inf, ranks: int = 1, rendezvous: bool = False) -> Replay:
    """Run the stages' ops against each other.

    cores: of the machine that all share, one per rank that computes; ranks: processes of each stage (tensor ranks and
    replicas, which move in step). rendezvous: a send waits until the other side receives (NCCL); else it leaves the
    message and goes on (gloo, as long as the sockets' buffers hold it). Raises RuntimeError if all wait for each other.
    """
    clock = _Clock(streams, rendezvous)
    while True:
        clock.begin()
        if not any(stage.ops for stage in clock.stages):
            return Replay([s.marks for s in clock.stages], [s.spans for s in clock.stages])
        clock.advance(cores, ranks)
