"""An engine without a model, which breaks on request: `python -m tests.engines.echo FD`."""

import dataclasses
import os
import signal
import sys
import time

from mint_core.engine_pipe import EnginePipe, Heartbeat, Hello, Reply, connect
from mint_core.errors import InvalidRequest
from tests.engines.echo_jobs import MODEL, Bug, Crash, Echo, EchoConfig, Hang, Job, Refuse, Work


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
            answer = run(call.job, pipe)
        except Exception as error:
            pipe.fail(call.number, error)
        else:
            pipe.send(Reply(call.number, answer))


def why_not(config: EchoConfig) -> str:
    """Returns why the engine does not start; empty: it does."""
    if config.start_log is None:
        return config.refusal
    with config.start_log.open("a") as log:
        log.write("start\n")
    starts = len(config.start_log.read_text().splitlines())
    return config.refusal if starts in config.failing_starts else ""


def run(job: Job, pipe: EnginePipe) -> str:
    match job:
        case Echo(text):
            return text
        case Refuse(text):
            raise InvalidRequest(text, field="text")
        case Bug():
            raise ZeroDivisionError("a secret")
        case Crash(exit_code):
            os._exit(exit_code)
        case Hang():
            signal.pause()
        case Work(heartbeats, interval_s):
            for _ in range(heartbeats):
                time.sleep(interval_s)
                pipe.send(Heartbeat())
    return "done"


if __name__ == "__main__":
    main()
