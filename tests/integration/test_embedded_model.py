"""The embedded model is whole: its tokenizer, its words, its terms."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mint_core.embedded_model import SOURCE_FILE, ConversionError, make_embedded_model

MODEL = Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    if not (MODEL / SOURCE_FILE).exists():
        pytest.skip("`make model` has not made the embedded model")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12 * 34", ["1", "2", " *", " ", "3", "4"]),
        ("  12", ["  ", "1", "2"]),
        ("in 2024's", ["in", " ", "2", "0", "2", "4", "'s"]),
    ],
)
def test_each_digit_is_a_token(
    tokenizer: PreTrainedTokenizerBase, text: str, pieces: list[str]
) -> None:
    tokens = tokenizer.encode(text)
    assert [tokenizer.decode([token]) for token in tokens] == pieces


def test_the_model_answers_and_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1].item() == tokenizer.eos_token_id == 2


def test_it_says_where_it_comes_from() -> None:
    assert "Apache-2.0" in (MODEL / SOURCE_FILE).read_text()
    assert "Apache License" in (MODEL / "LICENSE").read_text()


def test_a_second_call_finds_it_ready() -> None:
    def written_ns() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in MODEL.rglob("*")}

    before = written_ns()
    assert make_embedded_model(MODEL) is False
    assert written_ns() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="remove it or name another folder"):
        make_embedded_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
