"""uvicorn around the application: the address, the two threads, and an end that leaves no request half answered."""

import logging
import os
import socket
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from ee_scale.config.serve import ServeConfig
from ee_scale.errors import UserError
from ee_scale.log import log
from ee_scale.modeling.decision_log import DecisionLog
from ee_scale.serving.app import make_app
from ee_scale.serving.engine import Engine
from ee_scale.serving.following import Following
from ee_scale.serving.metrics import Metrics
from ee_scale.serving.served import Served

API_KEY = "EE_SCALE_API_KEY"


def serve(config: ServeConfig, device: torch.device) -> None:
    """Until a signal. The first lets what is under way end, the second does not. Raises `UserError`."""
    served = Served.find(config)
    if config.log is not None and not Path(config.log).expanduser().parent.is_dir():
        raise UserError(f"log={config.log}: no such folder")
    following = Following.find(config, served.policies, served.name)
    listener = listen(config.host, config.port)
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{listener.getsockname()[1]}"
    api_key = config.api_key or os.environ.get(API_KEY) or None
    if api_key is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning(f"host={config.host} without a key: whoever reaches {address} may ask (api_key, {API_KEY})")
    metrics = Metrics(served.name)
    decisions = DecisionLog(Path(config.log).expanduser()) if config.log is not None else None
    if served.deferral is not None:
        served.deferral.open(metrics, decisions)
    logged: dict[str, object] = {"exit_audit": config.audit or None, "exit_log": decisions}
    if following is not None:
        logged["exit_follow"] = following.limits
        metrics.registry.register(following)
    longest = min(served.context, (config.max_prompt_tokens or served.context) + config.max_new_tokens)
    engine = Engine(config, partial(served.open, device), longest, served.settings, logged, metrics)
    app = make_app(served, engine, metrics, api_key)
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off"), engine)
    engine.on_ready = partial(log.info, f"serving {served.name} on {address} (Ctrl+C ends it)")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that has left
    log.info(f"loading {served.name}; {address}/health says when it is there")
    engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()
        if decisions is not None:
            decisions.close()
        if following is not None:
            following.save()
    if engine.failure is not None:
        raise engine.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"host={host} port={port}: {error.strerror or error}") from error


class Server(uvicorn.Server):
    """Ends when the decoding thread has."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine
        engine.on_idle = self._stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets what is under way end; the second, and one while the model loads, does not."""
        if self.engine.draining or not self.engine.ready:
            self.engine.close()
            self.force_exit = self.should_exit
            self.config.timeout_graceful_shutdown = 1  # seconds in which clients have to read that
            self._stop()
        else:
            log.info("stopping: what is under way is answered to its end")
            self.engine.drain()

    def _stop(self) -> None:
        self.should_exit = True
