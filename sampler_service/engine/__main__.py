"""`python -m sampler_service.engine FD`: serves the front at the other end of the pipe until it is
gone.
"""

import logging
import time

from mint_core.engine_host.pipe import EnginePipe, Heartbeat, Hello, connect
from sampler_service.config import SamplerConfig
from sampler_service.engine.engine import Engine
from sampler_service.engine.memory import LOOK_S

HEARTBEAT_S = 1.0
ACCEPTING_S = 0.01  # about, between two passes: what goes on waits for no flood of what comes


class Pulse:
    """Tells the front that the engine gets on, at most once in HEARTBEAT_S."""

    def __init__(self, pipe: EnginePipe) -> None:
        self._pipe = pipe
        self._last = time.monotonic()

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_S:
            self._last = now
            self._pipe.send(Heartbeat())


def main() -> None:
    pipe, config = connect()
    assert isinstance(config, SamplerConfig)
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        engine = Engine(config, Pulse(pipe).beat)
    except Exception as error:
        pipe.fail(0, error)
        return
    pipe.send(
        Hello(
            engine.description,
            engine.max_batch_tokens,
            engine.adapter_ranks,
            engine.kv_cache_tokens,
            memory_limits=engine.memory_limits,
        )
    )
    _serve(pipe, engine)


def _serve(pipe: EnginePipe, engine: Engine) -> None:
    while True:
        spent_s = 0.0
        while spent_s < ACCEPTING_S and pipe.waiting(0 if engine.busy else LOOK_S):
            call = pipe.receive()
            if call is None:
                return
            started_s = time.monotonic()
            try:
                answer = engine.accept(call.number, call.job)
                if call.number and answer is not None:
                    pipe.send(answer)
            except Exception as error:
                pipe.fail(call.number, error)
            spent_s += time.monotonic() - started_s
        engine.spare()
        # An exception that is no request's ends the engine: the front starts another.
        if engine.busy:
            pipe.send_all(engine.step())


if __name__ == "__main__":
    main()
