"""Shapes in an exported graph: numbers where they are fixed, and one name for each length that is free.

torch.export gives every axis of every input a symbol of its own, also to those that the model makes equal or fixes.
"""

import re
from collections.abc import Iterator

import onnx_ir

BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {LENGTH}"
# Axes of the inputs, by name; of the cache those that are no sizes of the model.
AXES = {
    "input_ids": {0: BATCH, 1: LENGTH},
    "position_ids": {0: BATCH, 1: LENGTH},
    "token_type_ids": {0: BATCH, 1: LENGTH},
}
CACHE = {0: BATCH, 2: PAST}


def declare_shapes(graph: onnx_ir.Graph) -> None:
    """Give all values of an `onnx_ir.Graph` shapes of numbers and of these names; inputs are called as they will be."""
    decoder = any(map(_is_cache, graph.inputs))
    mask = {0: BATCH, 1: TOTAL if decoder else LENGTH}
    names: dict[str, str] = {}
    for value in graph.inputs:
        cache = CACHE if _is_cache(value) else {}
        for axis, name in (AXES | {"attention_mask": mask}).get(value.name or "", cache).items():
            symbol = _symbol(value.shape[axis]) if value.shape is not None else None
            if isinstance(symbol, str) and not symbol.isdigit():
                names[symbol] = name
    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_dimension(size, names) for size in value.shape])


def _is_cache(value: onnx_ir.Value) -> bool:
    return (value.name or "").startswith("past_key_values.")


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _symbol(size: int | onnx_ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value


def _dimension(size: int | onnx_ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    """'4' -> 4, 's53' -> 'batch_size', 's70 + s85' -> 'past_sequence_length + sequence_length'."""
    symbol = _symbol(size)
    if not isinstance(symbol, str):
        return symbol
    if symbol.isdigit():
        return int(symbol)
    named = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), symbol)
    return TOTAL if sorted(named.split(" + ")) == sorted((LENGTH, PAST)) else named
