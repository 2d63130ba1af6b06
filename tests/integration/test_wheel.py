"""What a newcomer installs: the wheel alone, in an environment of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import Services

ROOT = Path(__file__).parents[2]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_loop_of_the_readme_runs_with_the_wheel_alone(
    services: Services, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name in (ROOT / "README.md").read_text()
    run(sys.executable, "-m", "venv", tmp_path / "laptop")
    python = tmp_path / "laptop/bin/python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "loop.py").write_text(code)

    said = run(
        python,
        tmp_path / "loop.py",
        MINT_BASE_URL=services.trainer,
        MINT_SAMPLER_URL=services.sampler,
    )

    *steps, answers = said.splitlines()
    assert [int(line.split()[0]) for line in steps] == list(range(10))  # and no word beside them
    assert len(eval(answers)) == 4
    installed = run(python, "-m", "pip", "list")
    assert "torch" not in installed
    assert "transformers" in installed
