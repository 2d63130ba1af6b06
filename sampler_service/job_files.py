"""Which files jobs name, for engines that do not have the front's disk."""

from mint_core.engine_host.carried import NO_FILES, JobFiles
from sampler_service.jobs import LoadAdapter


def job_files(job: object) -> JobFiles:
    return JobFiles(reads=(job.file,)) if isinstance(job, LoadAdapter) else NO_FILES
