"""Environment of every test process, which children of `helpers.spawn` inherit; what holds for all tests."""

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from helpers.deprecations import forbid_deprecated_calls
from helpers.hangs import HangWatch
from hypothesis import HealthCheck, settings

from ee_scale.libraries import prepare_libraries

pytest_plugins = ["helpers.runs"]

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and workers have the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall when tests run beside other work
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # what hangs is ended by a signal, and tells its stacks
prepare_libraries()

# Nothing depends on the clock, nor on luck.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def _no_launcher_stays() -> Generator[None, None, None]:
    """Whoever runs in this process next would take it for one of many."""
    before = {name: os.environ.get(name) for name in LAUNCHERS}
    yield
    after = {name: os.environ.get(name) for name in LAUNCHERS}
    assert after == before, "a test of this file left a launcher's variables behind"


def pytest_collection_finish() -> None:
    """What the imports have made stays; no collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, trylast=True)  # inside of pytest's own filters for warnings
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """Each test with its fixtures."""
    forbid_deprecated_calls()
    with HangWatch():
        return (yield)
