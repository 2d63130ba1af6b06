"""Imports go one way (docs/design.md): who may import whom, who is free of torch and gRPC."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {
    "mintrpc": "proto/mintrpc",
    "mint": "py_client/mint",
    "mint_chat": "mint_chat",
    "mint_core": "mint_core",
    "checkpoint_store": "checkpoint_store",
    "trainer_service": "trainer_service",
    "sampler_service": "sampler_service",
}
MAY_IMPORT = {
    "mint": {"mintrpc", "mint_chat"},
    "mint_chat": set(),
    "mint_core": {"mintrpc", "mint_chat"},
    "checkpoint_store": {"mint_core"},
    "trainer_service": {"mint_core", "checkpoint_store", "mintrpc"},
    "sampler_service": {"mint_core", "checkpoint_store", "mintrpc"},
}
# The same within the client; its public modules know all.
_VALUES = {"errors", "types"}
CLIENT_MAY_IMPORT = {
    "types": {"errors", "_torch"},
    "_transport": {*_VALUES, "futures", "_forks", "_threads", "_version"},
    "_run": {*_VALUES, "futures", "_threads", "_transport", "_torch"},
    "_sampling": {*_VALUES, "_transport"},
    "_files": {*_VALUES, "futures", "_transport"},
    "recipe": {*_VALUES, "_files"},
}
MAX_FILES = 20  # of one folder
# Where torch lives. Everything else, the fronts and the client above all, does without.
TORCH = ("/engine/", "mint_core/lora/", "mint_core/model/", "mint_core/embedded_model.py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported top-level package, and whether the import stands at module level."""
    tree = ast.parse(path.read_text())
    top_level = set(tree.body)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            yield name, node in top_level


def sources(package: str) -> list[Path]:
    return sorted((ROOT / OURS[package]).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    forbidden = set(OURS) - MAY_IMPORT[package] - {package}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name, _ in imports(path)
        if name.split(".")[0] in forbidden
    ]
    assert sources(package)
    assert not found


def test_torch_stays_in_the_engines_and_in_the_clients_one_file() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in MAY_IMPORT
        for path in sources(package)
        for name, _ in imports(path)
        if name.split(".")[0] in {"torch", "peft"}
        and not any(part in path.as_posix() for part in TORCH)
        and path.as_posix().removeprefix(f"{ROOT}/") != "py_client/mint/_torch.py"
    ]
    assert not found


def test_nothing_imports_the_clients_torch_file_at_module_level() -> None:
    found = [
        path
        for path in sources("mint")
        for name, top_level in imports(path)
        if top_level and name.startswith("mint._torch")
    ]
    assert not found


def test_engines_and_lora_never_import_grpc() -> None:
    engine_side = [
        path
        for package in MAY_IMPORT
        for path in sources(package)
        if any(part in f"/{path.relative_to(ROOT).as_posix()}" for part in TORCH)
        or path.match("engine_host/pipe.py")
    ]
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in engine_side
        for name, _ in imports(path)
        if name.split(".")[0] in {"grpc", "mintrpc"} or name.startswith("mint_core.rpc")
    ]
    assert len(engine_side) > 10
    assert not found


@pytest.mark.parametrize("package", ["trainer_service", "sampler_service"])
def test_planner_jobs_and_engine_speak_no_protobuf(package: str) -> None:
    inside = [
        p
        for p in sources(package)
        if p.name in {"planner.py", "jobs.py"} or "engine" in p.relative_to(ROOT).parts
    ]
    assert inside
    assert not [p for p in inside for name, _ in imports(p) if name.split(".")[0] == "mintrpc"]


def modules(package: str) -> dict[str, Path]:
    """Files by the name under which they are imported."""
    folder = ROOT / OURS[package]
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for path in sources(package)
    }


def imported_modules(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Those of the known modules that a file imports: anywhere, also in functions or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


def imported_at_start(path: Path) -> set[str]:
    """What is imported when a file is: with the packages that lie around."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = (name.split(".") for name in found)
    return {".".join(name[:stop]) for name in parts for stop in range(1, len(name) + 1)}


@pytest.mark.parametrize("service", ["trainer_service", "sampler_service"])
def test_an_engine_starts_without_grpc_and_what_reads_certificates(service: str) -> None:
    """By whatever it imports: it would take time and memory, and a GPU's machine may lack them."""
    known = {name: path for package in OURS for name, path in modules(package).items()}
    left, seen = [f"{service}.engine.__main__"], {}
    while left:
        if (name := left.pop()) in known:
            for other in imported_at_start(known[name]) - seen.keys():
                seen[other] = name
                left.append(other)
    assert len(seen.keys() & known.keys()) > 50
    unwanted = {"grpc", "google", "mintrpc", "cryptography", "cyclopts", "obstore", "llguidance"}
    assert {name: seen[name] for name in seen.keys() & unwanted} == {}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    known = modules(package)
    graph = {name: imported_modules(path, known) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_folders_import_each_other_in_a_circle(package: str) -> None:
    """Each folder of a package is a room, and so is each file that lies flat beside them."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        if name != package:
            room = name.split(".")[1]
            others = imported_modules(path, known) - {package}
            graph.setdefault(room, set()).update(o.split(".")[1] for o in others)
    try:
        TopologicalSorter({room: set(o) - {room} for room, o in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("folder", CLIENT_MAY_IMPORT)
def test_parts_of_the_client_know_only_what_lies_below_them(folder: str) -> None:
    known = modules("mint")
    inside = {name: path for name, path in known.items() if name.startswith(f"mint.{folder}.")}
    found = [
        f"{name} imports {other}"
        for name, path in inside.items()
        for other in imported_modules(path, known)
        if other.split(".")[1] not in CLIENT_MAY_IMPORT[folder] | {folder}
    ]
    assert inside
    assert not found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_folder_holds_more_files_than_a_reader_can_look_over(package: str) -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in sources(package))
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}
