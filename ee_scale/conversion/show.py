"""A conversion in words: what would be read, and what every new tensor is made of."""

from collections.abc import Iterator, Sequence

from ee_scale.conversion.execute import Conversion
from ee_scale.conversion.tensors import Span

SHOWN = 4  # spans of a tensor


def summary(conversion: Conversion) -> str:
    """One line."""
    opened, tensors = conversion.opened, sum(len(file.pieces) for file in conversion.files)
    model = opened.model
    exits = f", exits at {', '.join(map(str, model.exits.layers))}" if model.exits else ""
    known = model.config and f"{model.config.model_type}, {model.map.shape.num_layers} layers"
    return (
        f"{opened.format}: {known or 'no config'}{exits}, "
        f"{len(opened.stored)} stored tensors -> {tensors} in {len(conversion.files)} files, "
        f"{conversion.nbytes / 1e9:.3f} GB"
    )


def plan_lines(conversion: Conversion) -> Iterator[str]:
    """Every file with its tensors: name, shape, type, and the model's tensors in it."""
    yield summary(conversion)
    for file in conversion.files:
        yield f"{file.name}  {sum(piece.nbytes for piece in file.pieces) / 1e6:.1f} MB"
        for piece in file.pieces:
            shape, dtype = list(piece.stored_shape), str(piece.dtype).removeprefix("torch.")
            yield f"  {piece.key}  {shape} {dtype}  <- {made_of(piece.spans, piece.dim)}"
    yield from conversion.notes


def made_of(spans: Sequence[Span], dim: int) -> str:
    """`model.layers.0.self_attn.q_proj.weight[0:64] + ...`, joined along rows or columns."""
    axis = ":, " if dim else ""
    told = [f"{span.name}[{axis}{span.start}:{span.stop}]" if span.name else f"{len(span)} zeros" for span in spans]
    told = [text + (" + update" if span.update else "") for text, span in zip(told, spans, strict=True)]
    more = f" + {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return " + ".join(told[:SHOWN]) + more
