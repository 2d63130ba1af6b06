"""The commands of docs/languages/curl.md, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.services import Services

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "languages" / "curl.md"


def test_the_commands_do_what_the_page_says(services: Services) -> None:
    *commands, over_tls = re.findall("```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "https://" in over_tls
    script = "".join(commands)
    at = {"127.0.0.1:50051": services.trainer, "127.0.0.1:50052": services.sampler}
    for written, address in at.items():
        assert written in script
        script = script.replace(written, address)

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines().count("refused") == 1
