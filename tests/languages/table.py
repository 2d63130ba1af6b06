"""The example clients: what each needs on Debian or Ubuntu, how it is built and how it is run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """Commands run in the folder."""

    folder: Path
    run: Sequence[str]
    build: Sequence[str] = ()
    apt: Sequence[str] = ()  # packages
    tools: Sequence[str] = ()  # programs that come from no package named here
    npm: bool = False  # whether package.json names packages

    def missing_apt(self) -> list[str]:
        return [package for package in self.apt if not _has_package(package)]

    def missing_npm(self) -> bool:
        return self.npm and not (self.folder / "node_modules").exists()

    def is_at_hand(self) -> bool:
        found = all(shutil.which(tool) for tool in self.tools)
        return found and not self.missing_npm() and not self.missing_apt()


def _example(name: str, **options: object) -> Language:
    return Language(folder=ROOT / "examples" / name, **options)  # type: ignore[arg-type]


LANGUAGES = {
    # What the others are compared with, through the same troubles.
    "python": Language(folder=ROOT, run=(sys.executable, "-m", "tests.languages.reference")),
    "go": _example(
        "go",
        build=("make",),
        run=("build/client",),
        apt=(
            "golang-go",
            "golang-google-grpc-dev",
            "golang-google-genproto-dev",
            "golang-google-protobuf-dev",
            "golang-github-golang-protobuf-1-5-dev",
            "make",
            "protobuf-compiler",
            "protoc-gen-go",
            "protoc-gen-go-grpc",
        ),
    ),
    "typescript": _example(
        "typescript",
        build=("npm", "run", "--silent", "build"),
        run=("node", "build/client.js"),
        tools=("node", "npm"),
        npm=True,
    ),
    "cpp": _example(
        "cpp",
        build=("make", "-j2"),
        run=("build/client",),
        apt=(
            "g++",
            "libgrpc++-dev",
            "libprotobuf-dev",
            "make",
            "pkg-config",
            "protobuf-compiler",
            "protobuf-compiler-grpc",
        ),
    ),
    "java": _example(
        "java",
        build=("make",),
        run=("java", "@build/client"),
        apt=(
            "default-jdk-headless",
            "libgeronimo-annotation-1.3-spec-java",
            "libgoogle-gson-java",
            "libgrpc-java",
            "libguava-java",
            "libnetty-java",
            "libnetty-tcnative-java",
            "libperfmark-java",
            "libprotobuf-java",
            "protobuf-compiler",
            "protobuf-compiler-grpc-java-plugin",
        ),
    ),
    "ruby": _example(
        "ruby",
        build=("make",),
        run=("ruby", "client.rb"),
        apt=("protobuf-compiler", "protobuf-compiler-grpc", "ruby-grpc"),
    ),
}


def install_commands(languages: Sequence[Language]) -> list[list[str]]:
    """What brings the packages that are missing: one command of apt, and one of npm a folder."""
    apt = sorted({package for each in languages for package in each.missing_apt()})
    installs = [["apt-get", "install", "--yes", "--no-install-recommends", *apt]] if apt else []
    folders = [each.folder.relative_to(ROOT) for each in languages if each.missing_npm()]
    return installs + [["npm", "install", f"--prefix={folder}"] for folder in folders]


def required() -> set[str]:
    """Languages that must run, whatever is missing."""
    names = set(os.environ.get("MINT_LANGUAGES_REQUIRED", "").split())
    if unknown := names - LANGUAGES.keys():
        raise ValueError(f"MINT_LANGUAGES_REQUIRED names {unknown}; there are {list(LANGUAGES)}")
    return names


def _has_package(name: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    asked = ("dpkg-query", "--show", "--showformat=${db:Status-Status}", name)
    return subprocess.run(asked, capture_output=True, text=True).stdout == "installed"
