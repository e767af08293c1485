"""Whether the kernel that a run wants for its loss can compute it."""

from importlib.util import find_spec

from ee_scale.config.groups import LIGER
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import UserError
from ee_scale.planning.fits import device_type


def check_loss_kernel(config: TrainingConfig) -> None:
    """Raises `UserError` for one that cannot."""
    if config.train.loss_kernel != LIGER:
        return
    parallel, given = config.parallel, f"train.loss_kernel={LIGER}"
    device = f"parallel.device={parallel.device}"
    way_out = "or train.loss_kernel=torch"
    if parallel.tp > 1:
        raise UserError(f"{given} with parallel.tp={parallel.tp}: it reads whole logits; use parallel.tp=1, {way_out}")
    if device_type(config) != "cuda":
        raise UserError(f"{given} with {device}: it needs a GPU; use parallel.device=cuda, {way_out}")
    if find_spec("liger_kernel") is None:
        raise UserError(f"{given}: the package is not installed; pip install 'ee-scale[liger]', {way_out}")
