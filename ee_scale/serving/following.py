"""Limits that follow the text (`follow`): which requests they hold for, what is told of them, and where they are kept.

One object for all queues: the level of a tag counts for every policy that has limits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import Field

from ee_scale.config.serve import ServeConfig
from ee_scale.errors import UserError
from ee_scale.inference.request import followed_limits, tell_change
from ee_scale.log import log
from ee_scale.modeling.following import MOST_TAGS, STATES, Followed, FollowedLimits
from ee_scale.modeling.policy_names import SCORED
from ee_scale.reading import Count, check_fields, checked, read_json, whole, write_json
from ee_scale.serving.metrics import PREFIX

MOST_SHOWN = 100  # tags in /metrics: those of the highest levels


def watched(policy: str, logged: dict[str, object]) -> dict[str, object]:
    """Of `exit_log`, `exit_audit` and `exit_follow` those that a policy can have."""
    if policy == "off":
        return {}
    return {name: value for name, value in logged.items() if name != "exit_follow" or policy in SCORED}


@whole
@dataclass
class Kept:
    """A tag in the file; see `Followed`."""

    tag: Annotated[str, Field(min_length=1)] | None
    level: Annotated[float, Field(ge=0, le=100)]
    state: Literal[STATES]  # type: ignore[valid-type]
    audited: Count
    agreed: Count


class Following(Collector):
    """What a server knows of its limits.

    Attributes:
        limits: for `exit_follow`.
    """

    def __init__(self, limits: FollowedLimits, model: str, path: Path | None):
        """model: its name; path: of the file that keeps the levels, read if it is there. Raises `UserError`."""
        self.limits, self.model, self.path = limits, model, path
        limits.tell = self._tell
        if path is not None and path.exists():
            self._read(path)

    @classmethod
    def find(cls, config: ServeConfig, policies: Sequence[str], model: str) -> "Following | None":
        """As the operator's settings want it. Raises `UserError`."""
        limits, path = followed_limits(config, policies), None
        if config.levels is not None:
            path = Path(config.levels).expanduser()
            if limits is None:
                raise UserError(f"levels={config.levels}: there are none without follow; give follow, or leave it out")
            if not path.parent.is_dir():
                raise UserError(f"levels={config.levels}: no such folder")
        return None if limits is None else cls(limits, model, path)

    def known(self) -> list[tuple[str | None, Followed]]:
        """Tags and what is known of them, the highest level first; from any thread."""
        return sorted(self.limits.tags.items(), key=lambda item: -item[1].level)

    def collect(self) -> Iterator[Metric]:
        """For /metrics. Tokens without a tag have an empty one there."""
        labels, known = ["model_name", "tag"], self.known()[:MOST_SHOWN]
        level = GaugeMetricFamily(
            f"{PREFIX}exit_follow_level", "0: limits as given, 1 and above: no exit is taken", labels=labels
        )
        state = GaugeMetricFamily(f"{PREFIX}exit_follow_state", "0: usual, 1: raised, 2: off", labels=labels)
        audited = CounterMetricFamily(f"{PREFIX}exit_follow_audited_tokens", "as exit_audited_tokens", labels=labels)
        agreed = CounterMetricFamily(f"{PREFIX}exit_follow_agreed_tokens", "as exit_agreed_tokens", labels=labels)
        for tag, found in known:
            values = (level, found.level), (state, STATES.index(found.state)), (audited, found.audited)
            for family, value in (*values, (agreed, found.agreed)):
                family.add_metric([self.model, tag or ""], value)
        yield from (level, state, audited, agreed)

    def save(self) -> None:
        """Write the file, as a whole; where that fails the log has a line, and requests go on."""
        if self.path is None:
            return
        tags = [{"tag": tag, **asdict(known)} for tag, known in self.known()]
        try:
            write_json(self.path, {"model": self.model, "tags": tags})
        except OSError as error:
            log.error(f"levels={self.path}: cannot write ({error.strerror or error})")

    def _tell(self, tag: str | None, known: Followed) -> None:
        tell_change(tag, known)
        self.save()

    def _read(self, path: Path) -> None:
        found = read_json(path)
        check_fields(found, path, model=str, tags=list[Kept])
        if found["model"] != self.model:
            raise UserError(f"levels={path}: of model {found['model']!r}, not {self.model!r}; give another file")
        kept: list[Kept] = checked(list[Kept], found["tags"], path)
        if len(kept) > MOST_TAGS + 1 or len({one.tag for one in kept}) < len(kept):
            raise UserError(f"levels={path}: {len(kept)} tags, some of them twice, or more than {MOST_TAGS}")
        for one in kept:
            self.limits.tags[one.tag] = Followed(one.level, one.state, one.audited, one.agreed)
        log.info(f"levels of {len(kept)} tags are those of {path}")
