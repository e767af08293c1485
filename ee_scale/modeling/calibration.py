"""What `ee-scale calibrate` stores beside a model, and what is made sure of before it is believed."""

from collections.abc import Mapping

from .policy_names import SCORED

LARGEST_LIMIT, LARGEST_ID = 1e30, 1 << 31
CALIBRATION_KEY = "early_exit_calibration"  # in generation_config.json


def check_calibration(calibration: object, vocab_size: int | None = None) -> None:
    """Raise ValueError for what `ee-scale calibrate` does not write: whoever edits a folder may have put it there."""
    if not isinstance(calibration, Mapping) or calibration.get("policy") not in SCORED:
        raise ValueError(f"{CALIBRATION_KEY}: not an object with a policy of {', '.join(SCORED)}")
    by_tag = calibration.get("tags")
    if not isinstance(by_tag, Mapping | None):
        raise ValueError(f"{CALIBRATION_KEY}: tags is not an object")
    for table in (calibration, *(by_tag or {}).values()):
        limits = table.get("thresholds") if isinstance(table, Mapping) else None
        if not isinstance(limits, Mapping):
            raise ValueError(f"{CALIBRATION_KEY}: no thresholds by layer in it")
        for layer, limit in limits.items():
            if limit is not None and (type(limit) not in (int, float) or not abs(limit) <= LARGEST_LIMIT):
                raise ValueError(f"{CALIBRATION_KEY}: the threshold of layer {str(layer)[:20]!r} is not a number")
    ids = calibration.get("shortlist")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i < LARGEST_ID for i in ids)):
        raise ValueError(f"{CALIBRATION_KEY}: shortlist is not a list of token ids")
    if ids and (len(set(ids)) < len(ids) or (vocab_size is not None and max(ids) >= vocab_size)):
        raise ValueError(f"{CALIBRATION_KEY}: shortlist has an id twice, or one that the model's vocabulary has not")
