"""Logging: one logger for the package; ranks other than 0 are silent below WARNING."""

import logging

log = logging.getLogger("ee_scale")


def configure_logging(rank: int = 0, level: str = "info") -> None:
    """Send records to the terminal through rich, once per process."""
    from rich.logging import RichHandler  # the console is only needed in processes that log

    log.handlers[:] = [RichHandler(show_path=False, show_time=True, markup=False)]
    log.propagate = False
    log.setLevel(level.upper() if rank == 0 else logging.WARNING)
    for noisy in ("DeepSpeed", "megatron", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
