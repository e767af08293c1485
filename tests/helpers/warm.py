"""What every fork of the server would do first, done once; the server imports it last (see `helpers.spawn`).

Nothing here starts a thread, which no fork would have.
"""

import gc
import importlib
from contextlib import suppress

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ee_scale.config.compose import compose_config
from ee_scale.config.schema import VERBS
from ee_scale.errors import UserError

# Which DeepSpeed imports when it makes an engine.
for name in ("module_inject.auto_ep_layer", "moe.ep_repack", "ops.op_builder.all_ops", "runtime.zero.muon"):
    importlib.import_module(f"deepspeed.{name}")
for verb in VERBS:  # Hydra's plugins, its grammar and every schema
    with suppress(UserError):  # settings are missing
        compose_config(verb)
get_checkpoint_conversion_mapping("llama")  # a thousand patterns of all families

gc.collect()
gc.freeze()  # or each fork copies all of it when it collects
