"""Limits that follow the text: they rise where exits no longer agree with the full model, and come down again.

follow = FollowedLimits(agreement=0.98)
model.generate(..., exit_policy="threshold", exit_follow=follow, exit_audit=0.05, exit_tags=["sql"])

Audited tokens drive them by adaptive conformal inference (Gibbs and Candès, arXiv 2106.00170), each tag by itself. A
level of 0 leaves limits as they are, 1 and above takes no exit. A token that differs raises the level by a step, every
token lowers it a little. So whatever the text does, of any `settles()` audited tokens in a row at least the wanted
share agrees; a token of the full model counts as one that agrees, by the share of tokens that are audited.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

from transformers.utils import logging

from .policy_names import SCORED

AIM = 0.5  # of the disagreement that is allowed: where levels settle, so that the bound is kept and not just met
RAISED, OFF = 0.25, 1.0  # levels at which something is told
STATES = ("usual", "raised", "off")
MOST_NATS = 16.0  # no entropy is larger: a limit above it is as good
FINE = 1000  # limits that lag behind a level that comes down are stricter than they have to be, and need no transfer
MOST_TAGS = 1000  # with a level of their own; requests may name any number, and the others share one
logger = logging.get_logger(__name__)


@dataclass
class Followed:
    """What is known of one tag.

    Attributes:
        level: 0: limits as they are; 1 and above: no exit is taken.
        state: what was told last, of STATES.
        audited, agreed: early tokens that were compared with the full model, and those that were the same.
    """

    level: float = 0.0
    state: str = "usual"
    audited: int = 0
    agreed: int = 0


def change_words(tag: str | None, known: Followed) -> str:
    """The state of a tag, in one line."""
    where = "" if tag is None else f" of tag {tag!r}"
    words = {
        "usual": "are as they were given again",
        "raised": "were raised: too many early tokens differ from the full model's",
        "off": "take no exit any more: raising them did not help",
    }
    rate = f"{known.agreed} of {known.audited} compared tokens agreed so far"
    return f"limits{where} {words[known.state]} (level {known.level:.2f}; {rate})"


def _log(tag: str | None, known: Followed) -> None:
    logger.warning(f"exit_follow: {change_words(tag, known)}")


class FollowedLimits:
    """Levels by tag; whoever decodes tells it of audited tokens and asks it for limits. Calls of `generate` share it.

    Attributes:
        tags: what is known of each tag (None: of tokens without one, and of tags beyond MOST_TAGS).
        changes: grows when a level rises, and whenever one has come down by another 1 / FINE.
    """

    def __init__(
        self,
        agreement: float = 0.98,
        step: float = 0.05,
        tell: Callable[[str | None, Followed], None] = _log,
    ):
        """agreement: smallest share of all tokens that are the full model's; step: by how much a token that differs
        raises the level: a larger one follows sooner and is less calm; tell: called with a tag whose state changed.

        Raises ValueError for numbers that mean nothing.
        """
        for name, value in (("agreement", agreement), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(f"{name}={value!r}: must be above 0 and below 1")
        self.agreement, self.step, self.tell = agreement, step, tell
        self.tags: dict[str | None, Followed] = {}
        self.changes = 0

    def settles(self, late: int = 1) -> int:
        """Audited tokens, the full model's counted by their share, of which the wanted share agrees wherever one begins
        to count; `late`: how many of them may be under way when exits are switched off.
        """
        return ceil((1 + late * self.step) / (self.step * (1 - AIM) * (1 - self.agreement)))

    def saw(self, tag: str | None, agrees: bool) -> None:
        """An early token was compared with the full model's."""
        known = self._of(tag)
        known.audited, known.agreed = known.audited + 1, known.agreed + agrees
        self._move(tag, known, (not agrees) - self._aim)

    def saw_full(self, tag: str | None, share: float) -> None:
        """A token came from the full model, where this share of the others is audited."""
        self._move(tag, self._of(tag), -self._aim * share)

    def off(self, tag: str | None) -> bool:
        """Whether no exit is taken."""
        return self._of(tag).level >= OFF

    def limits(self, policy: str, given: Sequence[float], tag: str | None) -> tuple[float, ...]:
        """Limits of a policy (of `SCORED`) by exit, as strict as the tag's level wants them."""
        level = self._of(tag).level
        if level <= 0:
            return tuple(given)
        if policy == "entropy":
            return tuple(-inf if level >= OFF else min(limit, MOST_NATS) * (1 - level) for limit in given)
        return tuple(inf if level >= OFF or limit > 1 else limit + level * (1 - limit) for limit in given)

    @property
    def _aim(self) -> float:
        return AIM * (1 - self.agreement)

    def _of(self, tag: str | None) -> Followed:
        if tag not in self.tags and len(self.tags) >= MOST_TAGS:
            tag = None
        return self.tags.setdefault(tag, Followed())

    def _move(self, tag: str | None, known: Followed, by: float) -> None:
        level = max(0.0, known.level + self.step * by)
        if level == known.level:
            return
        self.changes += level > known.level or ceil(FINE * level) < ceil(FINE * known.level)
        known.level = level
        state = _state(known.state, level)
        if state != known.state:
            known.state = state
            self.tell(tag, known)


def _state(before: str, level: float) -> str:
    """What is to be told; it changes back late, so that a level beside a border does not tell again and again."""
    if level >= OFF or (before == "off" and level > (RAISED + OFF) / 2):
        return "off"
    return "raised" if level >= RAISED or (before != "usual" and level > 0) else "usual"


def check_following(follow: object, policy: str, share: float) -> None:
    """Raise ValueError, in one line, where limits cannot follow."""
    if not isinstance(follow, FollowedLimits) and not hasattr(follow, "saw_full"):
        raise ValueError(f"exit_follow={follow!r:.60}: give a FollowedLimits")
    if policy not in SCORED:
        raise ValueError(f"exit_follow: exit_policy={policy} has no limits that could follow; use {', '.join(SCORED)}")
    if not share:
        raise ValueError("exit_follow: nothing is compared with the full model; give exit_audit, the share that is")
