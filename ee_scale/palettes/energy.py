"""Energy between two readings of the machine's own counters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """Counters that only grow, and start again at zero behind their range.

    Attributes:
        name: what is measured. Whatever else runs on it counts too, and so does its idle power.
        unit: joules per count.
        counters: read one counter each.
        ranges: largest count of each; None: it never starts again.
    """

    name: str
    unit: float
    counters: tuple[Callable[[], int], ...]
    ranges: tuple[int | None, ...]

    def read(self) -> tuple[int, ...]:
        """Counts now."""
        return tuple(counter() for counter in self.counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy between two readings that are less than one range apart."""
        counts = zip(before, after, self.ranges, strict=True)
        return self.unit * sum(b - a if b >= a or top is None else b - a + top for a, b, top in counts)


def find_meter(device: str, powercap: Path = POWERCAP) -> tuple[EnergyMeter | None, str]:
    """(meter, its name) for 'cpu' (RAPL) or 'cuda' (NVML); (None, why nothing is measured) without a counter."""
    meter, missing = (_nvml(), "NVML counter") if device == "cuda" else (_rapl(powercap), "RAPL counter")
    return meter, meter.name if meter else f"not measured: no readable {missing}"


def _rapl(powercap: Path) -> EnergyMeter | None:
    """Running average power limit: microjoules of every processor package (cores, caches and, mostly, no memory)."""
    counters, ranges = [], []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            # Packages alone: 'core' and 'dram' are parts of one, and 'psys' holds them all.
            if not (domain / "name").read_text().startswith("package"):
                continue
            int((domain / "energy_uj").read_text())  # the kernel lets root alone read it, by default
            ranges.append(int((domain / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            continue
        counters.append(lambda path=domain / "energy_uj": int(path.read_text()))
    return EnergyMeter("RAPL packages", 1e-6, tuple(counters), tuple(ranges)) if counters else None


def _nvml() -> EnergyMeter | None:
    """Millijoules of the GPU that torch calls device 0."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # By identity: CUDA_VISIBLE_DEVICES renumbers the devices of torch and not those of NVML.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, an old card: all mean that there is no counter
        return None
    return EnergyMeter("NVML", 1e-3, (lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle),), (None,))
