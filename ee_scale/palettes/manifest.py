"""manifest.json of a palette: which subnets it holds, what each costs by measurement and how good it is."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ee_scale.data.provenance import TextSource
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.palettes.drafts import Drafts
from ee_scale.palettes.overlap import Overlap
from ee_scale.reading import checked, read_json, whole, write_json

MANIFEST = "manifest.json"
VERSION = 1
HIGHER_IS_BETTER = ("accuracy", "f1")  # every other metric is loss-like


@whole
@dataclass(frozen=True)
class Device:
    """Where the members were measured."""

    cpu: str
    threads: int
    torch: str

    @classmethod
    def here(cls, threads: int | None = None) -> "Device":
        """This machine; `threads` are those of this process by default."""
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return cls(names[0] if names else "unknown CPU", threads or torch.get_num_threads(), torch.__version__)


@whole
@dataclass(frozen=True)
class Member:
    """One subnet and its figures, measured on its own folder unless said otherwise.

    Attributes:
        folder: relative to the manifest's folder; of the full model any path.
        params, layer_params: with and without embeddings and heads.
        flops: of the prefill that is timed.
        token_ms: None where nothing is generated.
        memory_mb: peak of the process; file_mb: of the weights.
        joules_per_token: a number, or 'not measured: <why>'.
        quality: metric -> value, on held-out data. interval: 95% of the metric that decides, from the number of texts.
        difference: 95% of it minus the full model's, on the same texts. None: of the full model itself, or not known.
        estimated_ms: what the search took for the latency that `Manifest.latency` names; None if nothing.
        before: quality before it was polished; empty: it was not.
        onnx: variant ('fp32', 'int8') -> {'file_mb', 'latency_ms'}.
        verify_ms: (rows, milliseconds) of forwards over several tokens behind the prompt; empty: not measured.
    """

    folder: str
    spec: SubnetSpec
    params: int
    layer_params: int
    flops: int
    prefill_ms: float
    token_ms: float | None
    memory_mb: float
    file_mb: float
    joules_per_token: float | str
    quality: dict[str, float]
    estimated_ms: float | None = None
    onnx: dict[str, dict[str, float]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    difference: tuple[float, float] | None = None
    verify_ms: list[tuple[int, float]] = field(default_factory=list)


@whole
@dataclass(frozen=True)
class Tried:
    """A subnet that the search looked at: quality by metric, estimated costs by name ('params', 'latency_ms')."""

    spec: SubnetSpec
    quality: dict[str, float]
    estimates: dict[str, float]


@whole
@dataclass(frozen=True)
class Polished:
    """Training of each size by itself: steps of each, seconds of all."""

    steps: int
    seconds: float


@whole
@dataclass(frozen=True)
class Manifest:
    """A palette.

    Attributes:
        base_model, base_fingerprint: what the subnets were cut from; run: the folder that trained them.
        task: 'causal_lm' or 'classify'.
        limits: 'params', 'latency_ms', ... -> largest allowed value; objective: the cost that the palette spans.
        latency: the field of `Member` that latency_ms stands for, 'prefill_ms' or 'token_ms'.
        metric: the entry of `Member.quality` that decides.
        full: the whole model, measured in the same way; its folder is the base model's.
        members: cheapest first.
        tried: all that the search evaluated; may be empty.
        sources: text that the supernet was trained on; teacher: what taught, by its fingerprint; empty: not known.
        polish: what sizes were trained by themselves behind the supernet; None: not at all.
        audit: what each size and the teacher gave back of it verbatim, by folder.
        drafts: small sizes as draft models of large ones; None: not asked for.
        texts: held-out texts that quality was judged on; 0: a version that did not say.
    """

    base_model: str
    base_fingerprint: str
    run: str
    task: str
    device: Device
    limits: dict[str, float]
    objective: str
    latency: str
    metric: str
    full: Member
    members: list[Member]
    tried: list[Tried] = field(default_factory=list)
    texts: int = 0
    sources: list[TextSource] = field(default_factory=list)
    teacher: str = ""
    polish: Polished | None = None
    audit: dict[str, Overlap] = field(default_factory=dict)
    drafts: Drafts | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.metric in HIGHER_IS_BETTER

    def latency_of(self, member: Member) -> float:
        """Milliseconds."""
        return getattr(member, self.latency)

    def quality_of(self, member: Member) -> float:
        """By the metric that decides."""
        return member.quality[self.metric]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"version": VERSION, **asdict(self)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with its digest into a palette's folder."""
    write_json(folder / MANIFEST, manifest.to_dict())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a palette. Raises `UserError` if there is none, it is damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it; give the output folder of ee-scale palette")
    values = read_json(path)
    if values.get("version") != VERSION:
        raise UserError(f"{path}: version {values.get('version')} of the manifest; this ee-scale reads {VERSION}")
    del values["version"]
    return checked(Manifest, values, path)
