import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_store import CheckpointPath, check_name, parse_path
from mint_core.errors import InvalidRequest

FORMS = (
    "mint://<training_run_id>/weights/<name>",
    "mint://<training_run_id>/sampler_weights/<name>",
)


def test_a_path_names_run_kind_and_name() -> None:
    parsed = parse_path("mint://r-1/sampler_weights/my.sft_v1")

    assert parsed == CheckpointPath("r-1", "sampler_weights", "my.sft_v1")


def test_a_path_may_name_a_revision() -> None:
    assert parse_path("mint://r-1/weights/a@12").revision == 12


@pytest.mark.parametrize(
    "path",
    [
        "",
        "r-1/weights/a",
        "mint://r-1/a",
        "mint://r-1/other/a",
        "mint://r-1/weights/",
        "mint://r-1/weights/a@",
        "mint://r-1/weights/a@0",
        "mint://r-1/weights/a@01",
        "mint://r-1/weights/a@x",
        "mint://r-1/weights/../b",
        "mint://../weights/b",
        "mint://r-1/weights/a/b",
        "mint://r-1/weights/a\n",
        "mint://r-1/weights/.a",
        "tinker://r-1/weights/a",
    ],
)
def test_a_malformed_path_is_refused_with_the_legal_forms(path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_path(path, field="model_path")

    assert all(form in caught.value.message for form in FORMS)
    assert caught.value.field == "model_path"
    assert caught.value.metadata["path"] == path


def test_a_path_of_the_wrong_kind_is_refused_with_the_legal_forms() -> None:
    with pytest.raises(
        InvalidRequest, match="is of kind `weights` where `sampler_weights`"
    ) as caught:
        parse_path("mint://r-1/weights/a", kind="sampler_weights")

    assert all(form in caught.value.message for form in FORMS)


@given(st.text())
def test_parsing_returns_the_path_or_refuses(text: str) -> None:
    path = f"mint://r-1/weights/{text}"
    try:
        parsed = parse_path(path)
    except InvalidRequest:
        return
    assert str(parsed) == path


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a@1", "a b", "x" * 129, "\u00e9"])
def test_a_name_that_no_path_could_carry_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a checkpoint"):
        check_name(name)
