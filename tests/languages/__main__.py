"""Installs what example clients need, builds them, and runs them against servers: `make languages`.

Arguments are languages; `--install` installs what is missing, which otherwise is said, and
`--install-only` does no more.
"""

import argparse
import os
import shlex
import subprocess
import sys

from tests.languages.table import LANGUAGES, ROOT, install_commands


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("languages", nargs="+", choices=LANGUAGES)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--install-only", action="store_true")
    given = parser.parse_args()
    commands = install_commands([LANGUAGES[name] for name in given.languages])
    for command in commands:
        sys.stdout.write(shlex.join(command) + "\n")
        sys.stdout.flush()
        if given.install or given.install_only:
            subprocess.run(command, cwd=ROOT, check=True)
    if given.install_only:
        return 0
    if commands and not given.install:
        sys.stdout.write("are missing; INSTALL=1 installs them\n")
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", "tests/languages"]
    environment = os.environ | {"MINT_LANGUAGES_REQUIRED": " ".join(given.languages)}
    chosen = ["-m", " or ".join(given.languages)]
    return subprocess.run([*tests, *chosen], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
