"""The commands of docs/languages/curl.md, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.authorities import Authority
from tests.keys import make_key
from tests.servers import running_summing_trainer
from tests.services import Services

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "languages" / "curl.md"
*COMMANDS, OVER_TLS = re.findall("```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(script: str, addresses: dict[str, str], **environment: str) -> str:
    """What a script prints, which must end well, with addresses in place of those of the page."""
    for written, address in addresses.items():
        assert written in script
        script = script.replace(written, address)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_do_what_the_page_says(services: Services) -> None:
    at = {"127.0.0.1:50051": services.trainer, "127.0.0.1:50052": services.sampler}
    assert run("".join(COMMANDS), at).splitlines().count("refused") == 1


def test_so_does_the_one_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, (cert, key) = authority.issue("server", "localhost"), authority.issue("ada")
    flags = {"tls_cert": server[0], "tls_key": server[1], "client_ca": authority.file}
    secret = make_key("ada", tmp_path / "keys")
    with running_summing_trainer(tmp_path, **flags, keys=tmp_path / "keys") as trainer:
        port = trainer.address.rpartition(":")[2]
        files = {"MINT_TLS_CA": authority.file, "MINT_TLS_CERT": cert, "MINT_TLS_KEY": key}
        environment = {name: str(file) for name, file in files.items()}
        at = {"localhost:50051": f"localhost:{port}"}
        assert run(OVER_TLS, at, MINT_API_KEY=secret, **environment).strip() == "{}"
