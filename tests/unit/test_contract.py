"""The contract's own checks can fail, and say what `make check` relies on."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sampler_service import service as sampler_service
from tests import reference_page
from trainer_service import service as trainer_service

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")


def buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    (tmp_path / "proto").mkdir()
    shutil.copy(ROOT / "proto/baseline.binpb", tmp_path / "proto")
    shutil.copytree(
        ROOT / "proto/mintrpc",
        tmp_path / "proto/mintrpc",
        ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"),
    )
    return tmp_path


def edit(contract: Path, old: str, new: str) -> None:
    path = contract / "proto/mintrpc/v1/types.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_contract_as_committed_breaks_nobody(contract: Path) -> None:
    result = buf(contract, "breaking", "--against", "proto/baseline.binpb")
    assert result.returncode == 0, result.stdout


def test_a_changed_field_type_is_caught(contract: Path) -> None:
    edit(contract, "int32 rank = 1;", "string rank = 1;")
    result = buf(contract, "breaking", "--against", "proto/baseline.binpb")
    assert result.returncode != 0
    assert '"rank"' in result.stdout


def test_an_undocumented_field_is_caught(contract: Path) -> None:
    edit(contract, "  // Required. Rank of A and B: 1 to the served maximum.\n", "")
    result = buf(contract, "lint")
    assert result.returncode != 0
    assert "rank" in result.stdout


def test_the_readme_names_every_rpc() -> None:
    declared = {
        service: re.findall(r"^  rpc (\w+)", body, re.MULTILINE)
        for file in (ROOT / "proto/mintrpc/v1").glob("*.proto")
        for service, body in re.findall(r"^service (\w+) {(.*?)^}", file.read_text(), re.S | re.M)
    }
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|$", (ROOT / "README.md").read_text(), re.M)
    named = {service: calls.replace("*", "").split(", ") for service, calls in rows}

    assert {name: named.get(name) for name in declared} == declared


def test_the_contract_lists_every_feature() -> None:
    text = (ROOT / "proto/mintrpc/v1/model.proto").read_text()
    told = re.findall(r'"(\w+)"', text[text.index("Optional parts") : text.index("features = 8")])
    assert set(told) == {*trainer_service.FEATURES, *sampler_service.FEATURES}


def test_other_languages_can_import_every_file() -> None:
    for file in (ROOT / "proto/mintrpc/v1").glob("*.proto"):
        options = dict(re.findall(r'^option (\w+) = "?([^";]*)', file.read_text(), re.MULTILINE))
        # Go's import paths begin with a host; this one is of a name that is nobody's.
        assert options["go_package"] == "mintrpc.example/mintrpc/v1", file
        assert options["csharp_namespace"] == "Mintrpc.V1"
        assert options["java_package"] == "mintrpc.v1"
        assert options["java_multiple_files"] == "true"


def test_the_reference_is_that_of_the_contract_as_it_is() -> None:
    assert reference_page.PAGE.read_text() == reference_page.page(), "`make reference` writes it"
