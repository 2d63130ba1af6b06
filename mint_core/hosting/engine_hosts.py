"""Where a service's engines run, as its options say."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from mint_core.engine_host.carried import FilesOf
from mint_core.engine_host.child_process import ChildProcesses
from mint_core.engine_host.host import EngineHost
from mint_core.engine_host.on_ray.host import RayHosts
from mint_core.engine_host.on_ray.options import RayOptions
from mint_core.errors import FailedPrecondition
from mint_core.hosting.service_config import ServiceConfig


def engine_hosts(
    config: ServiceConfig, files: FilesOf, folders: Sequence[Path], *, count: int = 1
) -> Callable[[int], EngineHost]:
    """A host for each engine, by its number: those below `count` are placed together. `files`: what
    a job reads and writes, all of it in `folders` of this machine. Raises FailedPrecondition.
    """
    if config.engines_on == "processes":
        return lambda number: ChildProcesses()
    if importlib.util.find_spec("ray") is None:
        raise FailedPrecondition(
            "`engines_on` ray needs Ray, which is not installed; "
            "`pip install 'mintrpc[server,ray]'`, or leave the option out"
        )
    options = RayOptions(
        address=config.ray_address,
        listen=config.ray_listen,
        strategy=config.ray_strategy,
        cpus=config.ray_cpus,
        gpus=config.ray_gpus,
        folder=str(config.ray_folder or ""),
        count=count,
        front_folders=tuple(str(folder) for folder in folders),
        log_level=config.log_level,
    )
    return RayHosts(options, files).place
