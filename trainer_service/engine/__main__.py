"""`python -m trainer_service.engine FD`: serves the front at the other end of the pipe until it is
gone.
"""

import logging
import os
import queue
import threading

from mint_core.engine_host.pipe import EnginePipe, Heartbeat, Hello, Part, Reply, Report, connect
from mint_core.model.faults import ends_the_engine
from trainer_service.config import TrainerConfig
from trainer_service.engine import saving
from trainer_service.engine.engine import Engine
from trainer_service.engine.saving import Rest
from trainer_service.jobs import SaveRow

logger = logging.getLogger(__name__)

# What is left of jobs: the number of its call, itself, and whether it is optional, as a `SaveRow`.
Rests = queue.SimpleQueue[tuple[int, Rest, bool]]


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
    pipe.send(
        Hello(
            engine.description,
            engine.max_batch_tokens,
            memory_limits=engine.memory_limits,
            traits=", ".join(saving.engine_traits(engine.base).values()),
        )
    )
    _serve(pipe, engine)


def _serve(pipe: EnginePipe, engine: Engine) -> None:
    told = None
    rests: Rests = queue.SimpleQueue()
    threading.Thread(target=_finish, args=(pipe, rests), daemon=True, name="background").start()
    while (call := pipe.receive()) is not None:
        optional = isinstance(call.job, SaveRow) and call.job.optional
        try:
            answer = engine.run(call.job)
            if callable(answer):
                pipe.send(Part(call.number, None))
                rests.put((call.number, answer, optional))
            else:
                pipe.send(Reply(call.number, answer))
        except Exception as error:
            if ends_the_engine(error) and not optional:
                raise
            pipe.fail(call.number, error)
        if (counts := engine.counts()) != told:
            pipe.send(Report(counts))
            told = counts


def _finish(pipe: EnginePipe, rests: Rests) -> None:
    """Does what is left of jobs, one after the other, and answers for the engine, which computes
    meanwhile.
    """
    while True:
        number, rest, optional = rests.get()
        try:
            answer = rest(lambda: pipe.send(Heartbeat()))
            pipe.send(Reply(number, answer))
        except Exception as error:
            if ends_the_engine(error) and not optional:
                logger.critical("the engine ends", exc_info=error)
                os._exit(1)  # from a thread: nothing else ends the others
            pipe.fail(number, error)


if __name__ == "__main__":
    main()
