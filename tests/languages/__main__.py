"""Builds example clients and runs them against servers, or installs what they need: see the target
`languages` of the Makefile.
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
    parser.add_argument("--install", action="store_true", help="what is missing, and no more")
    given = parser.parse_args()
    commands = install_commands([LANGUAGES[name] for name in given.languages])
    for command in commands:
        sys.stdout.write(shlex.join(command) + "\n")
        sys.stdout.flush()
        if given.install:
            subprocess.run(command, cwd=ROOT, check=True)
    if given.install:
        return 0
    if commands:
        sys.stdout.write("installs what is missing, as does INSTALL=1\n")
        return 1
    tests = [sys.executable, "-m", "pytest", "tests/languages", "-m", " or ".join(given.languages)]
    environment = os.environ | {"MINT_LANGUAGES_REQUIRED": " ".join(given.languages)}
    return subprocess.run(tests, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
