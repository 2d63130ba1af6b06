"""`python -m sampler_service.engine FD`: serves the front at the other end of the pipe until it is
gone.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

from mint_core.engine_host.pipe import EnginePipe, Failure, Heartbeat, Hello, Part, Reply, connect
from mint_core.errors import MintError
from sampler_service.engine.engine import Answer, Engine
from sampler_service.jobs import EngineConfig, SamplePart

HEARTBEAT_S = 1.0


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
    assert isinstance(config, EngineConfig)
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
        )
    )
    _serve(pipe, engine)


def _serve(pipe: EnginePipe, engine: Engine) -> None:
    while True:
        while not engine.busy or pipe.waiting():
            call = pipe.receive()
            if call is None:
                return
            try:
                answer = engine.accept(call.number, call.job)
                if answer is not None:
                    pipe.send_all(_messages([answer]))
            except Exception as error:
                pipe.fail(call.number, error)
        # An exception in a pass is our bug or the device's end: the front starts another engine.
        pipe.send_all(_messages(engine.step()))


def _messages(answers: Iterable[Answer]) -> list[Part | Reply | Failure]:
    """What the front is sent; nothing where it wants no answer."""
    return [_message(number, value) for number, value in answers if number]


def _message(number: int, value: Any) -> Part | Reply | Failure:
    match value:
        case SamplePart():
            return Part(number, value)
        case MintError():
            return Failure(number, value)
    return Reply(number, value)


if __name__ == "__main__":
    main()
