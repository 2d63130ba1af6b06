"""A mark for each language."""

import pytest

from tests.languages.table import LANGUAGES


def pytest_configure(config: pytest.Config) -> None:
    for name in LANGUAGES:
        config.addinivalue_line("markers", f"{name}: runs the example client of this language")
