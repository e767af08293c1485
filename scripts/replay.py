"""When what crosses ranks: a replay of instruction streams on paper, for `simulate.py`."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any


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
