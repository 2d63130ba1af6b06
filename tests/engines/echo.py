"""An engine without a model, which breaks on request: `python -m tests.engines.echo FD`."""

import dataclasses
import os
import signal
import sys
import time

from mint_core.engine_host.carried import here
from mint_core.engine_host.pipe import Call, EnginePipe, Heartbeat, Hello, Part, Reply, connect
from mint_core.errors import InvalidRequest
from tests.engines.echo_jobs import (
    MODEL,
    Aside,
    Bug,
    Copy,
    Count,
    Crash,
    Echo,
    EchoConfig,
    Hang,
    Refuse,
    Work,
)


def main() -> None:
    pipe, config = connect()
    sys.stderr.write("echo engine starts\n")
    time.sleep(config.start_s)
    if refusal := why_not(config):
        pipe.fail(0, InvalidRequest(refusal, field="base_model"))
        return
    pipe.send(Hello(dataclasses.replace(MODEL, folder=config.folder)))
    while (call := pipe.receive()) is not None:
        try:
            answer = run(call, pipe)
        except Exception as error:
            pipe.fail(call.number, error)
        else:
            if not isinstance(call.job, Aside):
                pipe.send(Reply(call.number, answer))


def why_not(config: EchoConfig) -> str:
    """Returns why the engine does not start; empty: it does."""
    if config.start_log is None:
        return config.refusal
    with config.start_log.open("a") as log:
        log.write("start\n")
    starts = len(config.start_log.read_text().splitlines())
    if starts in config.hangs_at_starts:
        signal.pause()
    return config.refusal if starts in config.failing_starts else ""


def run(call: Call, pipe: EnginePipe) -> str:
    match call.job:
        case Echo(text):
            return text
        case Copy(source, target, times):
            here(target).write_bytes(here(source).read_bytes() * times)
            return str(here(source))
        case Refuse(text):
            raise InvalidRequest(text, field="text")
        case Bug():
            raise ZeroDivisionError("a secret")
        case Aside():
            pipe.send(Part(call.number, None))
        case Crash(exit_code):
            os._exit(exit_code)
        case Hang():
            signal.pause()
        case Work(heartbeats, interval_s):
            for _ in range(heartbeats):
                time.sleep(interval_s)
                pipe.send(Heartbeat())
        case Count(parts, bundle):
            for at in range(0, parts, bundle):
                stop = min(at + bundle, parts)
                pipe.send_all([Part(call.number, number) for number in range(at, stop)])
    return "done"


if __name__ == "__main__":
    main()
