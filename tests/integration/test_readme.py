"""Every fenced block of README.md, as printed there: run, or listed with the reason why not."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mint._transport.opening import VARIABLES
from mint_core.hosting.serve_flags import parse_serve_flags
from mint_core.hosting.settings import Settings
from sampler_service.config import SamplerConfig
from tests.services import Services
from trainer_service.config import TrainerConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [
    line.partition(" #")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
]
IN_TEXT = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", README)]
WHEEL = "mintrpc-0.1.0-py3-none-any.whl"
LIMIT_S = 900.0

IN_THE_CLONE = ["make install", "make quickstart", "make serve", "make wheel"]
BESIDE = "make serve PORT=50061 STORE=other"
FOR_OTHERS = [
    "make certs",
    "make key TENANT=ada KEYS=keys.txt",
    "make serve SERVE_FLAGS='--keys keys.txt --tls-cert certs/server.crt --tls-key certs/server.key"
    " --trainer-address 0.0.0.0:50051 --sampler-address 0.0.0.0:50052'",
]
ON_THE_NODE = [
    "pip install torch==2.13.0",
    f"pip install '{WHEEL}[server]'",
    "python -m mint_core.hosting.serve --base-model /data/qwen3",  # another model's folder
]
ON_THE_LAPTOP = [f"pip install {WHEEL}", "python loop.py"]
_TLS = "--keys keys.txt --tls-cert certs/server.crt --tls-key certs/server.key"
ON_GPU_1 = [
    "make certs NAMES=gpu-1,gpu-2",
    "make -s key TENANT=sampler KEYS=keys.txt KEY_FLAGS='--scopes fetch' > sampler.key",
    f"make serve-trainer SERVE_FLAGS='{_TLS} --address 0.0.0.0:50051 --sampler-address"
    " gpu-2:50052'",
]
ON_GPU_2 = (
    "make serve-sampler STORE=https://gpu-1:50051 SERVE_FLAGS='--store-api-key sampler.key"
    f" --store-tls-ca certs/ca.pem {_TLS} --address 0.0.0.0:50052'"
)
NOT_RUN = {
    "ssh -fNL 50051:127.0.0.1:50051 -L 50052:127.0.0.1:50052 gpu-node": "another host",
    "make serve MODEL=Qwen/Qwen3-0.6B": "a model hub",
    "make serve MODEL=/data/qwen3 MODEL_NAME=Qwen/Qwen3-0.6B SERVE_FLAGS="
    "'--device cuda --dtype bfloat16'": "a GPU",
    "make serve MODEL=Qwen/Qwen3-8B-FP8 SERVE_FLAGS='--dtype float8'": "a model hub",
    "make install TORCH_INDEX=ADDRESS": "the reader's own index",
    **dict.fromkeys((*ON_GPU_1, ON_GPU_2), "two hosts, as in test_wire_store.py"),
}


def test_every_block_is_run_or_has_its_reason() -> None:
    assert {kind for kind, _ in BLOCKS} == {"", "sh", "toml", "python", "py"}
    run = {*IN_THE_CLONE, BESIDE, *FOR_OTHERS, *ON_THE_NODE, *ON_THE_LAPTOP}
    assert set(SHELL) == run | NOT_RUN.keys()


MAKE = [words for words in [*SHELL, *IN_TEXT] if re.match(r"make [a-z]", words)]


@pytest.mark.parametrize("command", dict.fromkeys(MAKE))
def test_make_knows_it_and_the_services_take_the_flags(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toml,) = (block for kind, block in BLOCKS if kind == "toml")
    (tmp_path / "mint.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)

    for line in planned(command):
        if "mint_core.hosting.serve" in line:
            parse_serve_flags(shlex.split(line)[3:])  # refuses what either service would refuse
        for role, kind in (("trainer", TrainerConfig), ("sampler", SamplerConfig)):
            if f"-m {role}_service " in line:
                Settings(role, kind, shlex.split(line)[3:])  # type: ignore[arg-type]


def planned(command: str) -> list[str]:
    """The commands that `make` would run."""
    words = ["make", "--dry-run", "-C", ROOT, *shlex.split(command)[1:]]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_key_without_a_tenant_is_told_what_lacks(tmp_path: Path) -> None:
    (line,) = (line for line in planned("make key") if "key_ring" in line)
    _, *words = shlex.split(line)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert said.startswith("error: `tenant` '' cannot be a name")
    assert "TENANT=" in said


def test_what_it_calls_a_file_is_there() -> None:
    words = {word for code in IN_TEXT for word in code.split()}
    files = {word for word in words if re.fullmatch(r"(\w+/)+([\w.]+)?", word)}
    assert len(files) > 8
    (tree,) = (block for kind, block in BLOCKS if not kind and "examples/" in block)
    files |= set(re.findall(r"^[\w/]+/|(?<=^examples/ )\w+/", tree, re.MULTILINE))
    assert not {name for name in files if not (ROOT / name).exists()}


def test_it_names_what_a_client_reads() -> None:
    rows = re.findall(r"^\| `MINT_.*", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(MINT_\w+)`", row)} == set(VARIABLES)
    assert ".env" in IN_TEXT


def test_the_loop_and_what_follows_it_run(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks in Python, one after another."""
    services.point_environment_at_them(monkeypatch)
    code = "".join(block for kind, block in BLOCKS if kind in ("python", "py"))
    (tmp_path / "loop.py").write_text(code)
    command = [sys.executable, tmp_path / "loop.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *steps, answers = done.stdout.splitlines()[:11]
    losses = [float(line.split()[1]) for line in steps]
    assert losses[-1] < losses[0]
    assert len(eval(answers)) == 4
    assert "<|im_end|>" not in answers
    assert re.search(r"^OptimStep 11 ", done.stdout, re.MULTILINE)


def test_the_call_from_a_shell_works(services: Services) -> None:
    (command,) = (code for code in IN_TEXT if code.startswith(".venv/bin/buf curl"))
    assert "127.0.0.1:50051" in command
    words = shlex.split(command.replace("127.0.0.1:50051", services.trainer))
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, *words[1:]], capture_output=True, text=True, timeout=60)
    assert '"baseModels"' in done.stdout, done.stderr


# From here on: what a newcomer does, with the network and some minutes.


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, with the loop as `loop.py`."""
    folder = tmp_path_factory.mktemp("newcomer") / "mintrpc"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    write_loop(folder)
    return folder


def write_loop(folder: Path) -> None:
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    (folder / "loop.py").write_text(code)


def environment(folder: Path) -> dict[str, str]:
    """A newcomer's, with the folder's programs first."""
    ours = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("MINT_")}
    return kept | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def shell(line: str, folder: Path, programs: Path, **variables: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=environment(programs) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


(SAID,) = re.findall(r'until Ctrl-C: "(.*)"', README)


@contextmanager
def serving(line: str, folder: Path, programs: Path, said: str = SAID) -> Iterator[None]:
    """Runs the line until it says so, and ends it as Ctrl-C does."""
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=folder,
            env=environment(programs),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        while said not in log.read_text():
            assert process.poll() is None, f"{line}\n{log.read_text()}"
            time.sleep(0.1)  # nothing tells of a line in a file
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(LIMIT_S)
    assert "Traceback" not in log.read_text()
    assert log.read_text().count(" stopped\n") == 2
    log.unlink()


def check_loop(said: str) -> None:
    *steps, answers = said.splitlines()
    assert [int(line.split()[0]) for line in steps] == list(range(10))  # and no word beside them
    assert len(eval(answers)) == 4
    assert "<|im_end|>" not in answers


def venv(folder: Path, *files: Path) -> Path:
    """An empty folder with those files; its programs' folder."""
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)
    write_loop(folder)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    return folder / "env"


@pytest.fixture
def ports() -> None:
    for port in (50051, 50052, 9051, 9052, *range(50061, 50065)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"something listens on port {port}, which README.md names")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ports")
def test_a_newcomer_comes_as_far_as_it_says(clone: Path) -> None:
    install, quickstart, serve, _ = IN_THE_CLONE
    certs, key, serve_others = FOR_OTHERS
    programs, loop = clone / ".venv", ".venv/bin/python loop.py"
    assert loop in IN_TEXT
    before = {path.name for path in clone.iterdir()}
    assert "Downloads and installs torch" in shell(install, clone, programs)
    check_table(shell(quickstart, clone, programs))
    assert {path.name for path in clone.iterdir()} - before == {".venv", ".models"}
    with serving(serve, clone, programs):
        check_loop(shell(loop, clone, programs))
    with serving(BESIDE, clone, programs, SAID.replace(":5005", ":5006")):
        check_loop(shell(loop, clone, programs, MINT_BASE_URL="127.0.0.1:50061"))
    shell(certs, clone, programs)
    *_, secret = shell(key, clone, programs).split()
    at = {"MINT_BASE_URL": "https://localhost:50051", "MINT_TLS_CA": "certs/ca.pem"}
    with serving(serve_others, clone, programs, SAID.replace("127.0.0.1", "https://0.0.0.0")):
        check_loop(shell(loop, clone, programs, **at, MINT_API_KEY=secret))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ports")
def test_a_wheel_alone_serves_and_trains(clone: Path, qwen3_folder: Path) -> None:
    shell(IN_THE_CLONE[-1], clone, clone / ".venv")
    made = clone / "dist" / WHEEL
    node, laptop = clone.parent / "node", clone.parent / "laptop"
    on_node, on_laptop = venv(node, made), venv(laptop, made)
    *installs, start = ON_THE_NODE
    for line in installs:
        shell(line, node, on_node)
    shell(ON_THE_LAPTOP[0], laptop, on_laptop)
    with serving(start.replace("/data/qwen3", str(qwen3_folder)), node, on_node):
        check_loop(shell(ON_THE_LAPTOP[1], laptop, on_laptop))
    installed = shell("pip list", laptop, on_laptop)
    assert "torch" not in installed
    assert "transformers" in installed


def check_table(said: str) -> None:
    """Near README.md's figures: they are to the last digit on a processor of that kind alone."""
    for row in re.findall(r"^\| (mean logprob .*|held-out .*|training loss .*) \|$", README, re.M):
        name, *told = row.split(" | ")
        (line,) = (line for line in said.splitlines() if line.startswith(name))
        for ours, theirs in zip(line.removeprefix(name).split(), told, strict=True):
            near = 4 if "held-out answers right" in name else 0.1
            assert float(ours) == pytest.approx(float(theirs.split()[0]), abs=near), line
