"""How many layers each pipeline stage has."""

from ee_scale.errors import UserError


def deal_layers(num_layers: int, pp: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers of each stage: even, but for a number that the first or last one was given (as Megatron-Core does).

    Raises `UserError` naming the numbers that do not fit.
    """
    for name, count in (("first_stage_layers", first), ("last_stage_layers", last)):
        if count is not None and (pp == 1 or not 1 <= count < num_layers):
            raise UserError(f"{name}={count}: does not fit pp={pp} stages of num_hidden_layers={num_layers} layers")
    left = num_layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    told = ", ".join(
        f"{name}_stage_layers={count}" for name, count in (("first", first), ("last", last)) if count is not None
    )
    if told and (left < 0 or (not stages and left)):
        raise UserError(f"{told}: not the num_hidden_layers={num_layers} layers of pp={pp} stages")
    if stages and (left % stages or not left):
        rest = f" in the {stages} stages that {told} leaves" if told else ""
        way_out = "" if told else "; first_stage_layers and last_stage_layers make stages of another size"
        raise UserError(f"pp={pp}: does not divide num_hidden_layers={left}{rest}{way_out}")
    middle = [left // stages] * stages if stages else []
    return (*([first] if first is not None else []), *middle, *([last] if last is not None else []))
