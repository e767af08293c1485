"""The GPUs of this machine: what they and their driver are, and what cannot work on them."""

from contextlib import suppress

import torch

from ee_scale.errors import UserError

GIB = 2**30


def check_capability(index: int) -> None:
    """Refuse (`UserError`) a GPU that torch has no kernels for; it would fail in the first one, with no word on why."""
    if not (built := torch.cuda.get_arch_list()):  # a build that does not say
        return
    major, minor = torch.cuda.get_device_capability(index)
    if not any(_runs(name, major, minor) for name in built):
        raise UserError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and this torch "
            f"({torch.__version__}) is built for {', '.join(built)}: install a build of torch that has it, "
            "or use device=cpu"
        )


def _runs(name: str, major: int, minor: int) -> bool:
    """Whether code of this name does: binary code (sm_*) within its generation, PTX (compute_*) on all later ones."""
    kind, _, number = name.partition("_")
    number = number.rstrip("af")  # of one generation alone
    if not number.isdecimal():
        return False
    built = divmod(int(number), 10)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def check_training(*, bf16: bool) -> None:
    """Refuse (`UserError`) what a training run needs of the build and of the GPUs here and does not find."""
    if not torch.distributed.is_nccl_available():
        raise UserError(f"this torch ({torch.__version__}) has no NCCL, over which GPUs meet: use parallel.device=cpu")
    for index in range(torch.cuda.device_count()):
        check_capability(index)
        major, minor = torch.cuda.get_device_capability(index)
        if bf16 and major < 8:  # torch would emulate it, many times slower
            raise UserError(
                f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor}) has no bf16, which came "
                "with 8.0: use train.precision=fp32"
            )


def gpu_facts() -> dict[str, str]:
    """What a person should know of the GPUs before a run, by name; nothing where torch sees none."""
    if not torch.cuda.is_available():
        return {}
    cards: dict[str, list[str]] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor}, {total / GIB:.1f} GiB)"
        cards.setdefault(name, []).append(f"{free / GIB:.1f}")
    nccl = "missing"
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "GPUs": "; ".join(f"{len(free)} x {name}, free: {', '.join(free)} GiB" for name, free in cards.items()),
        "driver": f"{driver_version()}; torch {torch.__version__} is built for CUDA {torch.version.cuda}",
        "NCCL": nccl,
    }


def driver_version() -> str:
    """Of the driver, and the newest CUDA that it can run."""
    with suppress(Exception):  # no package, no library of the driver: all mean that nobody says
        import pynvml

        pynvml.nvmlInit()
        version, newest = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
        return f"{version}, for CUDA up to {newest // 1000}.{newest % 1000 // 10}"
    return "version unknown (NVML does not answer)"
