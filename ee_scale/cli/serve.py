"""`ee-scale serve`: OpenAI's API on this machine."""

from collections.abc import Sequence

from ee_scale.config.serve import ServeConfig
from ee_scale.errors import UserError
from ee_scale.grid import launch_info, pick_device
from ee_scale.log import configure_logging

try:
    from ee_scale.serving.server import serve
except ModuleNotFoundError as error:
    raise UserError(f"serve needs the package {error.name}: pip install 'ee-scale[serve]'") from error


def run(config: ServeConfig, overrides: Sequence[str]) -> int:
    """Serve until a signal."""
    configure_logging()
    if launch_info() is not None:
        raise UserError("serve runs in one process: start it without torchrun")
    if (hook := config.defer.redact) is not None and overrides[0] == "--config":
        raise UserError(f"defer.redact={hook}: names code to run; give it on the command line, in no file")
    serve(config, pick_device(config.device))
    return 0
