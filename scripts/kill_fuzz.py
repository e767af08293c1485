"""Kill a training run at random places and give the same command again, until it is done: the losses must not change.

    python scripts/kill_fuzz.py
    python scripts/kill_fuzz.py --kills 20 --seed 7 -- tune +debug=cpu parallel.dp=2

A place is an event, not a time: the n-th thing that the main thread of a random rank does (an instruction of the
schedule, a batch, a vote, a save), or its n-th file operation in the output folder (checkpoints are written by another
thread). There the rank, or the whole command with all its ranks, gets SIGKILL. The losses of every step are compared
with those of a run that nobody disturbed, to the last bit.
"""

import argparse
import atexit
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

COMMAND = "tune +debug=cpu train.steps=12 train.save_every=3 logging.every=1"
PLACE = "KILL_FUZZ"  # in the environment of ranks
SITE = """
import os, sys
if "RANK" in os.environ and "KILL_FUZZ" in os.environ:
    sys.path.append({folder!r})
    from kill_fuzz import arm
    arm(os.environ["KILL_FUZZ"])
"""
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True)
class Place:
    """Event number `count` of rank `rank`; kind: 'step' for what the main thread does, 'file' for file operations."""

    rank: int
    kind: str
    count: int
    whole: bool

    def __str__(self) -> str:
        whom = "the whole command" if self.whole else "that rank"
        return f"{self.kind} event {self.count} of rank {self.rank}, {whom}"


# -- in the ranks ------------------------------------------------------------------------------------------------------


class Counter:
    """Counts the events of this rank; at the chosen one it kills, or at the end it notes how many there were."""

    def __init__(self, place: Place | None, note: Path):
        self._place, self._note = place, note
        self._counts = {"step": 0, "file": 0}

    def event(self, kind: str) -> None:
        self._counts[kind] += 1
        if self._place is not None and (kind, self._counts[kind]) == (self._place.kind, self._place.count):
            kill(self._place.whole)

    def note(self) -> None:
        self._note.write_text(json.dumps(self._counts))


def kill(whole: bool) -> NoReturn:
    """This rank; before it the command that started it and all other ranks, if wanted."""
    if whole:
        agent = psutil.Process(os.getppid())
        for process in [agent, *(rank for rank in agent.children() if rank.pid != os.getpid())]:
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def arm(text: str) -> None:
    """Count this rank's events, from the environment's words. The first attempt alone is killed."""
    wanted = json.loads(text)
    rank, out = int(os.environ["RANK"]), str(wanted["out"])
    place = Place(**wanted["place"]) if wanted["place"] else None
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or (place and place.rank != rank):
        place = None
    from ee_scale.training.loop import Loop
    from ee_scale.training.watchdog import Watchdog

    counter = Counter(place, Path(wanted["notes"]) / f"rank_{rank}.json")
    move, running = Watchdog._move, Loop.__post_init__

    def counted_move(self: Watchdog, *args: Any) -> None:
        move(self, *args)
        counter.event("step")

    def counted_running(self: Loop) -> None:
        running(self)
        counting.append(True)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        writes = name in WRITES or (name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and counting and str(args[0]).startswith(out):
            counter.event("file")

    counting: list[bool] = []
    Watchdog._move, Loop.__post_init__ = counted_move, counted_running
    sys.addaudithook(audit)
    atexit.register(counter.note)


# -- the driver --------------------------------------------------------------------------------------------------------


class Runs:
    """Runs of one command below a folder."""

    def __init__(self, words: Sequence[str], folder: Path):
        self._words, self._folder = list(words), folder
        (folder / "site").mkdir(parents=True)
        (folder / "site/sitecustomize.py").write_text(SITE.format(folder=str(Path(__file__).resolve().parent)))

    def start(self, name: str, place: Place | None = None) -> tuple[int, str]:
        """Exit code and output of the command with `out=<folder>/<name>`, killed there."""
        wanted = {"place": vars(place) if place else None, "out": str(self._folder / name), "notes": str(self._folder)}
        path = os.pathsep.join([str(self._folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, PLACE: json.dumps(wanted)}
        command = [sys.executable, "-m", "ee_scale", *self._words, f"out={self._folder / name}"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        wait_for_ranks(str(self._folder / name))
        return ended.returncode, ended.stdout + ended.stderr

    def counts(self) -> dict[int, dict[str, int]]:
        """Events of an undisturbed run by rank."""
        found = {}
        for path in self._folder.glob("rank_*.json"):
            found[int(re.sub(r"\D", "", path.name))] = json.loads(path.read_text())
        return found

    def losses(self, name: str) -> list[dict[str, Any]]:
        """What metrics.jsonl says of every step, but for times."""
        lines = [json.loads(line) for line in (self._folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in ("step", "tokens", "learning_rate", "loss")} for line in lines]


def wait_for_ranks(out: str) -> None:
    """A command that was killed leaves no rank behind; those that are about to go are waited for, others end here."""
    left = [process for process in psutil.process_iter(["cmdline"]) if f"out={out}" in (process.info["cmdline"] or [])]
    for process in psutil.wait_procs(left, timeout=60)[1]:
        process.kill()


def pick_place(pick: random.Random, counts: dict[int, dict[str, int]]) -> Place:
    """Anywhere in an undisturbed run."""
    rank = pick.choice(sorted(counts))
    kinds = [kind for kind, count in sorted(counts[rank].items()) if count]
    kind = pick.choice(kinds)
    return Place(rank, kind, pick.randint(1, counts[rank][kind]), whole=pick.random() < 0.5)


def fuzz(words: Sequence[str], folder: Path, kills: int, seed: int, say: Callable[[str], object]) -> list[str]:
    """Kill `kills` times, spread over runs of one command; returns what was wrong, a line each.

    Every run is killed again and again until it ends by itself, so later kills hit runs that were resumed.
    """
    runs, pick, wrong = Runs(words, folder), random.Random(seed), []
    code, output = runs.start("undisturbed")
    if code:
        return [f"the undisturbed run ended with code {code}:\n{output}"]
    expected, counts = runs.losses("undisturbed"), runs.counts()
    killed, run, attempt = 0, 0, 0
    while killed < kills or attempt:
        place = pick_place(pick, counts) if killed < kills else None
        code, output = runs.start(f"run_{run}", place)
        attempt += 1
        if code == 0:
            same = runs.losses(f"run_{run}") == expected
            say(f"run {run}: done after {attempt} attempts, losses {'equal' if same else 'DIFFER'}")
            if not same:
                wrong.append(f"run {run}: losses differ; see {folder / f'run_{run}'}")
            run, attempt = run + 1, 0
        elif place is None or "Traceback" in output:
            return [*wrong, f"run {run}: ended with code {code} at {place or 'no kill'}:\n{output}"]
        else:
            killed += 1
            say(f"run {run}: kill {killed} of {kills}: {place}; code {code}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (0)")
    parser.add_argument("--folder", type=Path, help="for the runs; kept (none: a temporary one)")
    told = f"after --: what ee-scale gets ({COMMAND})"
    parser.add_argument("command", nargs="*", default=shlex.split(COMMAND), help=told)
    given = parser.parse_args()
    if given.folder and given.folder.exists():
        parser.error(f"--folder {given.folder}: is there already")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary) / "runs").resolve()
        wrong = fuzz(given.command, folder, given.kills, given.seed, lambda line: sys.stdout.write(f"{line}\n"))
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    verdict = "every loss equal to the undisturbed run's" if not wrong else f"{len(wrong)} wrong"
    sys.stdout.write(f"{given.kills} kills, seed {given.seed}: {verdict}\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
