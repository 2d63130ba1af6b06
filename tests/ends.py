"""`python tests/ends.py oldest|newest`: constraints for pip at an end of what is admitted.

Tools and what generates code stay as they are: only what runs is tried at its ends.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def constraints(end: str) -> list[str]:
    """Lines such as `peft==0.19`. The newest end needs none: pip takes it by itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, [*project["dependencies"], *extras["server"], *extras["s3"]])
    if end == "newest":
        return []
    least = (
        (each.name, s.version) for each in wanted for s in each.specifier if s.operator == ">="
    )
    return [f"{name}=={version}" for name, version in least]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(sys.argv[1]))
