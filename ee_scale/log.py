"""Logging: one logger for the package; ranks other than 0 are silent below WARNING."""

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger("ee_scale")


def configure_logging(rank: int = 0, level: str = "info") -> None:
    """Send records to stderr, once per process: in colour on a terminal, as plain lines into a file or pipe."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper() if rank == 0 else logging.WARNING)
    for noisy in ("DeepSpeed", "megatron", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
