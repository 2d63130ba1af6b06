"""`python -m trainer_service.engine FD`: serves the front at the other end of the pipe until it is
gone.
"""

import logging

from mint_core.engine_host.pipe import EnginePipe, Heartbeat, Hello, Reply, Report, connect
from mint_core.errors import MintError
from trainer_service.config import TrainerConfig
from trainer_service.engine.background import Background
from trainer_service.engine.engine import Engine
from trainer_service.jobs import SaveRow


def main() -> None:
    pipe, config = connect()
    assert isinstance(config, TrainerConfig)
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        engine = Engine(config, progress=lambda: pipe.send(Heartbeat()))
    except Exception as error:
        pipe.fail(0, error)
        return
    pipe.send(Hello(engine.description, engine.max_batch_tokens))
    _serve(pipe, engine)


def _serve(pipe: EnginePipe, engine: Engine) -> None:
    told = None
    background = Background(pipe)
    while (call := pipe.receive()) is not None:
        try:
            answer = engine.run(call.job)
            if callable(answer):
                background.put(call.number, answer)
            else:
                pipe.send(Reply(call.number, answer))
        except MintError as refusal:
            pipe.fail(call.number, refusal)
        except Exception as error:
            # Our bug, no memory, or the device's end: the front starts another engine, has the
            # rest done again, and finds out whose doing it is.
            if not (isinstance(call.job, SaveRow) and call.job.optional):
                raise
            pipe.fail(call.number, error)
        if (counts := engine.row_counts()) != told:
            pipe.send(Report(counts))
            told = counts


if __name__ == "__main__":
    main()
