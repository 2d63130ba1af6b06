"""Starts trainer and sampler side by side and stops both: `python -m mint_core.hosting.serve`."""

import asyncio
import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mint_core.addresses import host_and_port
from mint_core.errors import FailedPrecondition, MintError
from mint_core.hosting.serve_flags import ServeFlags, parse_serve_flags
from mint_core.hosting.service_main import first, set_up_logging, stop_signal, write_whole

logger = logging.getLogger("mint.serve")

POLL_INTERVAL_S = 0.1  # while a service starts
STOP_LIMIT_S = 30.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class _Service:
    """One service as a child process."""

    name: str
    process: asyncio.subprocess.Process
    ready_file: Path

    @classmethod
    async def start(cls, name: str, folder: Path, *flags: str) -> "_Service":
        ready_file = folder / f"{name}.json"
        flags = (*flags, "--ready-file", str(ready_file))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"{name}_service", *flags
        )
        return cls(name, process, ready_file)

    @property
    def ready(self) -> bool:
        """Whether it listens. Raises if it has ended."""
        if self.process.returncode is not None:
            raise FailedPrecondition(
                f"the {self.name} ended with status {self.process.returncode}; its log says why"
            )
        return self.ready_file.exists()

    @property
    def addresses(self) -> dict[str, str]:
        """Where it listens, once it is ready."""
        addresses: dict[str, str] = json.loads(self.ready_file.read_text())
        return addresses

    async def stop(self) -> None:
        if self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def serve(flags: ServeFlags) -> None:
    """Runs both services until cancelled. Raises when one of them ends."""
    with tempfile.TemporaryDirectory(prefix="mint-serve-") as folder:
        services: list[_Service] = []
        try:
            sampler = await _Service.start("sampler", Path(folder), *flags.sampler)
            services.append(sampler)
            address = await _sampler_address(flags, sampler)
            trainer = await _Service.start("trainer", Path(folder), *flags.trainer, *address)
            services.insert(0, trainer)
            await _until_ready(*services)
            _announce(trainer.addresses, sampler.addresses, flags.ready_file)
            ends = [asyncio.create_task(service.process.wait()) for service in services]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await _until_ready(*services)  # says which one ended
        finally:
            await asyncio.gather(*(service.stop() for service in services))


async def _sampler_address(flags: ServeFlags, sampler: _Service) -> tuple[str, ...]:
    """Returns the trainer's flags about the sampler, after waiting for its port if need be."""
    address = flags.sampler_address
    if not address:
        return ()
    if host_and_port(address, "sampler_address")[1] == 0:
        await _until_ready(sampler)
        address = sampler.addresses["address"]
    return ("--sampler-address", address)


async def _until_ready(*services: _Service) -> None:
    while False in {service.ready for service in services}:
        await asyncio.sleep(POLL_INTERVAL_S)


def _announce(trainer: dict[str, str], sampler: dict[str, str], ready_file: Path | None) -> None:
    logger.info("trainer on %s, sampler on %s", trainer["address"], sampler["address"])
    scheme = "" if "://" in trainer["address"] else "http://"
    logger.info("connect with MINT_BASE_URL=%s%s; Ctrl-C stops both", scheme, trainer["address"])
    if ready_file:
        write_whole(ready_file, json.dumps({"trainer": trainer, "sampler": sampler}))


async def _run(flags: ServeFlags) -> None:
    await first(serve(flags), stop_signal())


def main() -> int:
    set_up_logging("INFO")
    try:
        asyncio.run(_run(parse_serve_flags(sys.argv[1:])))
    except MintError as error:
        logger.error("cannot serve: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
