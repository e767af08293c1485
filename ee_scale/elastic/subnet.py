"""A subnet as plain numbers, and the space it is drawn from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from math import inf
from random import Random
from typing import Any

from ee_scale.config.supernet import SpaceConfig
from ee_scale.errors import UserError
from ee_scale.reading import whole

AXES = ("hidden", "heads", "ffn", "depth")
MULTIPLE = 16  # fractions of widths are rounded to this many units: matrix kernels like it


@whole
@dataclass(frozen=True, order=True)
class SubnetSpec:
    """One subnet, the same in every layer, so that a stock config can describe it.

    Attributes:
        hidden: width of the residual stream.
        groups: attention head groups of a layer: a KV head with its query heads.
        ffn: units of a layer's MLP.
        layers: kept layers, counted from 0, increasing.
    """

    hidden: int
    groups: int
    ffn: int
    layers: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def name(self) -> str:
        """For folders and tables: 'h384-g12-f1536-l6'."""
        return f"h{self.hidden}-g{self.groups}-f{self.ffn}-l{self.depth}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class ElasticShape:
    """The full sizes that subnets are cut from.

    Attributes:
        head_dim_is_derived: hidden = heads x head_dim in every subnet.
        heads_divide_hidden: hidden must be a multiple of the query heads in every subnet.
        first_layer_stays: every subnet has layer 0.
    """

    hidden: int
    groups: int
    ffn: int
    num_layers: int
    head_dim: int
    queries_per_group: int
    head_dim_is_derived: bool
    heads_divide_hidden: bool = False
    first_layer_stays: bool = False

    @property
    def full(self) -> SubnetSpec:
        return SubnetSpec(self.hidden, self.groups, self.ffn, tuple(range(self.num_layers)))

    def sizes(self, spec: SubnetSpec) -> dict[str, int]:
        """Length of each elastic axis in a subnet."""
        return {
            "hidden": spec.hidden,
            "heads": spec.groups * self.queries_per_group * self.head_dim,
            "kv": spec.groups * self.head_dim,
            "ffn": spec.ffn,
        }

    def layer_weights(self, spec: SubnetSpec) -> int:
        """What orders subnets by size: width x what each layer's matrices map it to."""
        sizes = self.sizes(spec)
        return spec.depth * spec.hidden * (sizes["heads"] + sizes["kv"] + spec.ffn)

    def block(self, axis: str) -> int:
        """Rows that belong to one unit of an axis."""
        return {"heads": self.queries_per_group * self.head_dim, "kv": self.head_dim}.get(axis, 1)


@dataclass(frozen=True)
class SearchSpace:
    """The choices of each axis, full size first, and which layers a depth keeps.

    Attributes:
        hidden, groups, ffn, depth: decreasing; the first is the full size. `groups` is empty where the config has no
            head_dim of its own: then hidden decides.
        kept: depth -> layers that stay (nested: a smaller depth keeps a subset of a larger one's).
        exits: depths k that are members as well with the first k layers at full width: early exits.
        palette: (hidden, groups, ffn, depth) of the sizes that will be shipped.
    """

    shape: ElasticShape
    hidden: tuple[int, ...]
    groups: tuple[int, ...]
    ffn: tuple[int, ...]
    depth: tuple[int, ...]
    kept: Mapping[int, tuple[int, ...]]
    exits: tuple[int, ...] = ()
    palette: tuple[tuple[int, int | None, int, int], ...] = ()

    def member(self, hidden: int, groups: int | None, ffn: int, depth: int) -> SubnetSpec:
        """The subnet of these sizes."""
        return SubnetSpec(hidden, groups or hidden // self.shape.head_dim, ffn, self.kept[depth])

    def members(self, axes: Sequence[str] = AXES) -> Iterator[SubnetSpec]:
        """Every subnet when only `axes` may shrink, the full one first; exits last."""
        seen = dict.fromkeys(self.member(*sizes) for sizes in product(*self.choices(axes)))
        yield from seen
        if "depth" in axes:
            yield from (spec for spec in self.exit_members() if spec not in seen)

    def exit_members(self) -> tuple[SubnetSpec, ...]:
        """The early exits: the first k layers at full width."""
        return tuple(
            SubnetSpec(self.shape.hidden, self.shape.groups, self.shape.ffn, tuple(range(k))) for k in self.exits
        )

    def palette_members(self, axes: Sequence[str] = AXES) -> tuple[SubnetSpec, ...]:
        """The sizes that will be shipped; axes that are not in `axes` stay whole."""
        whole = [choices[0] for choices in self.choices(())]
        cut = [
            [n if axis in axes else full for axis, n, full in zip(AXES, s, whole, strict=True)] for s in self.palette
        ]
        return tuple(dict.fromkeys(self.member(*sizes) for sizes in cut))

    def smallest(self, axes: Sequence[str] = AXES) -> SubnetSpec:
        """The smallest choice of every axis in `axes`."""
        return self.member(*(choices[-1] for choices in self.choices(axes)))

    def draw(self, random: Random, axes: Sequence[str] = AXES) -> SubnetSpec:
        """A subnet with every axis in `axes` drawn uniformly; an exit is as likely as a depth."""
        if "depth" in axes and self.exits:
            choice = random.randrange(len(self.depth) + len(self.exits))
            if choice >= len(self.depth):
                return self.exit_members()[choice - len(self.depth)]
        return self.member(*(random.choice(choices) for choices in self.choices(axes)))

    def choices(self, axes: Sequence[str] = AXES) -> list[tuple[Any, ...]]:
        """Of each axis; those that are not in `axes` are whole."""
        all_choices = (
            ("hidden", self.hidden),
            ("heads", self.groups or (None,)),
            ("ffn", self.ffn),
            ("depth", self.depth),
        )
        return [choices if axis in axes else choices[:1] for axis, choices in all_choices]


def resolve_space(config: SpaceConfig, shape: ElasticShape, drop_order: Sequence[int], tp: int) -> SearchSpace:
    """The config group `space` for a model. Numbers are sizes, fractions (0.5, 1.0) parts of the full one.

    drop_order: layers in the order in which they are dropped. Raises `UserError` naming field, value and numbers.
    """
    hidden = _sizes("hidden", config.hidden, shape.hidden, shape.head_dim if shape.head_dim_is_derived else MULTIPLE)
    ffn = _sizes("ffn", config.ffn, shape.ffn, MULTIPLE)
    depth = _sizes("depth", config.depth, shape.num_layers, 1)
    groups = _derived_groups(config, shape, hidden, tp) if shape.head_dim_is_derived else _groups(config, shape, tp)
    if shape.heads_divide_hidden:
        _check_divides(hidden, tuple(size * shape.queries_per_group for size in groups))
    _check_tp("space.ffn", ffn, tp)
    for k in config.exits or ():
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < shape.num_layers:
            raise UserError(f"space.exits={list(config.exits)}: give layers from 1 to {shape.num_layers - 1}")
    exits = tuple(sorted(set(config.exits or ())))
    kept = {size: tuple(sorted(drop_order[shape.num_layers - size :])) for size in depth}
    space = SearchSpace(shape, hidden, groups, ffn, depth, kept, exits)
    return replace(space, palette=tuple(_shipped(config, i, space, drop_order, tp) for i in range(len(config.palette))))


def _shipped(
    config: SpaceConfig, number: int, space: SearchSpace, drop_order: Sequence[int], tp: int
) -> tuple[int, int | None, int, int]:
    """An entry of space.palette in numbers. Raises `UserError` unless each is a choice of its axis."""
    size = config.palette[number]
    heads = None if size.heads is None else [size.heads]
    alone = SpaceConfig([size.hidden], heads, [size.ffn], [size.depth])
    smallest = [choices[-1] for choices in resolve_space(alone, space.shape, drop_order, tp).choices()]
    for axis, found, choices in zip(AXES, smallest, space.choices(), strict=True):
        if found not in choices:
            words = f"{getattr(size, axis)} is {found}, which is none of space.{axis} ({', '.join(map(str, choices))})"
            raise UserError(f"space.palette[{number}].{axis}: {words}")
    return tuple(smallest)


def drop_order(importance: Sequence[float], parts: int, *, first_stays: bool = False) -> list[int]:
    """Layers in the order in which they are dropped: the least important first, in turn from `parts` equal runs; with
    `first_stays` layer 0 is the last of all."""
    worth = dict(enumerate(importance)) | ({0: inf} if first_stays else {})
    return drop_in_turn(len(importance), parts, lambda _, __: worth)


def drop_in_turn(
    count: int, parts: int, importance: Callable[[Sequence[int], Sequence[int]], Mapping[int, float]]
) -> list[int]:
    """All layers; the next is the least important of the longest runs, when those before it are gone.

    importance: (layers dropped so far, layers that may go next) -> of each of these. Taking the next layer from one of
    the longest runs keeps pipeline stages equally deep (+-1) for every depth.
    """
    bounds = [round(part * count / parts) for part in range(parts + 1)]
    runs = [list(range(a, b)) for a, b in pairwise(bounds)]
    order: list[int] = []
    while any(runs):
        longest = [run for run in runs if len(run) == max(map(len, runs))]
        candidates = [i for run in longest for i in run]
        worth = importance(order, candidates)
        order.append(min(candidates, key=lambda i: (worth[i], i)))
        next(run for run in longest if order[-1] in run).remove(order[-1])
    return order


def _sizes(name: str, given: Sequence[Any], full: int, multiple: int) -> tuple[int, ...]:
    if not given:
        raise UserError(f"space.{name}={given}: no size; give at least [1.0]")
    sizes = {full}
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"space.{name}: {value!r} is no number")
        if isinstance(value, float):
            if not 0 < value <= 1:
                raise UserError(
                    f"space.{name}: {value} is no fraction of the full {full}; give 0 < x <= 1.0, or a whole number"
                )
            value = full if value == 1 else min(full, max(multiple, round(full * value / multiple) * multiple))
        if not 1 <= value <= full:
            raise UserError(f"space.{name}: {value} is not between 1 and the model's {full}")
        sizes.add(value)
    return tuple(sorted(sizes, reverse=True))


def _derived_groups(config: SpaceConfig, shape: ElasticShape, hidden: Sequence[int], tp: int) -> tuple[int, ...]:
    """Empty: the width decides."""
    if config.heads is not None:
        raise UserError(
            f"space.heads={list(config.heads)}: this architecture's config has no head_dim, so the heads follow "
            f"from the width (hidden / {shape.head_dim}); leave space.heads=null"
        )
    for size in hidden:
        if size % shape.head_dim:
            raise UserError(
                f"space.hidden: {size} is not a multiple of head_dim={shape.head_dim}; no stock config has that shape"
            )
    _check_tp("space.hidden (as heads)", tuple(size // shape.head_dim for size in hidden), tp)
    return ()


def _groups(config: SpaceConfig, shape: ElasticShape, tp: int) -> tuple[int, ...]:
    """Head groups from numbers of query heads."""
    heads_full = shape.groups * shape.queries_per_group
    heads = _sizes("heads", config.heads or [1.0], heads_full, shape.queries_per_group)
    for size in heads:
        if size % shape.queries_per_group:
            raise UserError(
                f"space.heads: {size} is not a multiple of the {shape.queries_per_group} query heads "
                "that share a KV head"
            )
    groups = tuple(size // shape.queries_per_group for size in heads)
    _check_tp("space.heads (as KV heads)", groups, tp)
    return groups


def _check_divides(hidden: Sequence[int], heads: Sequence[int]) -> None:
    for width, count in product(hidden, heads):
        if width % count:
            raise UserError(
                f"space.hidden: {width} is not a multiple of the {count} heads of space.heads; this architecture's "
                "stock config refuses that shape"
            )


def _check_tp(name: str, sizes: Sequence[int], tp: int) -> None:
    for size in sizes:
        if size % tp:
            raise UserError(f"{name}: {size} is not divisible by parallel.tp={tp}")
