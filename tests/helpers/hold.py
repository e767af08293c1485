"""A rank that stands still after a given step until it is told to stop, to go on, or is gone."""

import os
import time
from pathlib import Path

SITE = """
import os, sys
if "RANK" in os.environ and "HOLD" in os.environ:
    sys.path.append({tests!r})
    from helpers.hold import arm
    arm()
"""


def setup(folder: Path, rank: int, steps: dict[str, int]) -> list[str]:
    """Lines of bash that make real commands hold.

    steps: by attempt, '<times the job was queued again>.<times its ranks were started again>'.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(tests=str(Path(__file__).parents[1])))
    at = ",".join(f"{attempt}:{step}" for attempt, step in steps.items())
    return [f"export PYTHONPATH={folder} HOLD={at} HOLD_RANK={rank}"]


def attempt() -> str:
    return f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def arm() -> None:
    """In a rank, before its command begins."""
    steps = dict(word.split(":") for word in os.environ["HOLD"].split(","))
    if os.environ["RANK"] != os.environ["HOLD_RANK"] or attempt() not in steps:
        return
    from ee_scale.training.loop import Loop

    original = Loop.end

    def end(self: Loop, *args, **options) -> None:
        original(self, *args, **options)
        if self.run.step == int(steps[attempt()]):
            (self.out / f"held_{attempt()}").write_text(str(os.getpid()))
            while not self.signals.number and not (self.out / "go").exists():
                time.sleep(0.02)

    Loop.end = end
