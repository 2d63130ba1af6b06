"""Tokens from a tokenizer that stays on the server are those of the same tokenizer here."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mint
from mint import recipe
from mint._files.tokenizer_files import cache_folder
from mint.recipe import Message, TrainOnWhat
from mint.recipe.renderers import Renderer, get_renderer
from mint_chat import RENDERER_NAMES
from tests.hosted import serving_texts
from tests.unit.mint.recipe.conftest import MakeTokenizer, conversation
from tests.unit.mint.recipe.templates import GPT_OSS, LLAMA3, QWEN3
from tests.unit.mint.recipe.test_against_templates import CONVERSATIONS

LIMIT_S = 120.0
TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "gptoss": GPT_OSS}
RENDERERS = {
    "qwen3": RENDERER_NAMES,  # all: the tokenizer has the marks of every family
    "llama3": ("llama3", "role_colon", "template"),
    "gptoss": ("template",),
}
TEXTS = ["What is 2 + 3?", "", " two  three\n", "\U0001f600 \u00fcn\u00ef", "<|im_end|>x"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::mint.recipe.renderers.RendererMismatchWarning"  # of the renderers here
)


@pytest.fixture(scope="module")
def tokenizers(
    make_tokenizer: MakeTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path]]:
    """Each tokenizer, and its folder."""
    known: dict[str, tuple[Any, Path]] = {}

    def find(model: str) -> tuple[Any, Path]:
        if model not in known:
            bos = "<|begin_of_text|>" if model == "llama3" else None
            folder = tmp_path_factory.mktemp(model)
            make_tokenizer(TEMPLATES[model], bos_token=bos).save_pretrained(folder)
            known[model] = recipe.get_tokenizer(str(folder)), folder
        return known[model]

    return find


@pytest.fixture(scope="module", params=list(TEMPLATES))
def both(
    request: pytest.FixtureRequest, tokenizers: Callable[[str], tuple[Any, Path]]
) -> Iterator[tuple[str, Any, Any]]:
    """A model's name, its tokenizer here, and the one on the server."""
    here, folder = tokenizers(request.param)
    with serving_texts(folder) as address, mint.ServiceClient(base_url=address) as service:
        sampling = service.create_sampling_client()
        yield request.param, here, sampling.get_tokenizer(on_server=True)


def outcome(call: Callable[..., Any], *arguments: object) -> object:
    """What it gives, or how it refuses."""
    try:
        made = call(*arguments)
    except mint.BadRequestError as error:
        return error.message, error.field
    if isinstance(made, tuple):
        return made[0].to_ints(), made[1].tolist(), str(made[1].dtype)
    return made.to_ints()


def compare(here: Renderer, there: Renderer, messages: Any) -> None:
    for what in (*TrainOnWhat, "none"):
        given = messages
        if what == TrainOnWhat.CUSTOMIZED:
            given = [{**message, "trainable": i % 2 == 0} for i, message in enumerate(messages)]
        arguments = given, what
        expected = outcome(here.build_supervised_example, *arguments)
        assert outcome(there.build_supervised_example, *arguments) == expected
    expected = outcome(here.build_generation_prompt, messages)
    assert outcome(there.build_generation_prompt, messages) == expected


def test_conversations_are_rendered_in_the_same_tokens_and_refused_in_the_same_words(
    both: tuple[str, Any, Any],
) -> None:
    model, tokenizer, on_server = both
    for name in RENDERERS[model]:
        here, there = get_renderer(name, tokenizer), get_renderer(name, on_server)
        assert there.name == name
        assert there.get_stop_sequences() == here.get_stop_sequences()
        for messages in CONVERSATIONS.values():
            compare(here, there, messages)


def test_texts_and_tokens_are_the_tokenizers(both: tuple[str, Any, Any]) -> None:
    _, here, there = both
    for text in TEXTS:
        assert there.encode(text) == here.encode(text)
        tokens = here.encode(text, add_special_tokens=False)
        assert there.encode(text, add_special_tokens=False) == tokens
        for skip in (False, True):
            expected = here.decode(tokens, skip_special_tokens=skip)
            assert there.decode(tokens, skip_special_tokens=skip) == expected
    assert not cache_folder().exists()  # nothing was fetched


BAD: list[tuple[str, Callable[[Any], object]]] = [
    ("`text` is 3", lambda t: t.encode(3)),
    ("`token_ids` has a token .* beyond the vocabulary of 1000", lambda t: t.decode([1000])),
    (r"`token_ids\[1\]` is -1", lambda t: t.decode([1, -1])),
    ("`skip_special_tokens` is 1", lambda t: t.decode([1], skip_special_tokens=1)),
    ("`name` is 'qwen4'; there are", lambda t: get_renderer("qwen4", t)),
    ("`role` is 'user'; servers", lambda t: rendered(t).build_generation_prompt(QUESTION, "user")),
    (
        "`prefill` needs .* leave `on_server`",
        lambda t: rendered(t).build_generation_prompt(QUESTION, prefill="So"),
    ),
    ("`tokenizer` is on the server", lambda t: rendered(t).parse_response([1])),
    ("`messages` is empty", lambda t: rendered(t).build_generation_prompt([])),
    (
        r"`messages\[0\]` has no `content`",
        lambda t: rendered(t).build_supervised_example([{"role": "user"}]),  # type: ignore[typeddict-item]
    ),
]
QUESTION: list[Message] = conversation("What is 2 + 3?")


def rendered(tokenizer: Any) -> Renderer:
    return get_renderer("role_colon", tokenizer)


def test_what_a_server_does_not_do_is_refused_by_name(both: tuple[str, Any, Any]) -> None:
    for why, call in BAD:
        with pytest.raises(mint.BadRequestError, match=why):
            call(both[2])


def test_a_tokenizer_without_a_chat_template_is_refused_in_the_same_words(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    here = recipe.get_tokenizer(str(tmp_path))
    with serving_texts(tmp_path) as address, mint.ServiceClient(base_url=address) as service:
        there = service.create_sampling_client().get_tokenizer(on_server=True)
        for name in ("template", "qwen3"):
            messages = []
            for tokenizer in (here, there):
                try:
                    get_renderer(name, tokenizer)
                    messages.append(("", ""))
                except mint.BadRequestError as error:
                    messages.append((error.message, error.field))
            assert messages[0] == messages[1]


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = sys.modules["jinja2"] = None
import mint
from mint.recipe.renderers import get_renderer
with mint.ServiceClient(base_url=sys.argv[1]) as service:
    tokenizer = service.create_sampling_client().get_tokenizer(on_server=True)
    renderer = get_renderer("template", tokenizer)
    print(tokenizer.decode(renderer.build_generation_prompt([{"role": "user", "content": "a"}])
                           .to_ints()), end="")
"""


def test_the_client_then_needs_no_transformers(
    tokenizers: Callable[[str], tuple[Any, Path]],
) -> None:
    with serving_texts(tokenizers("qwen3")[1]) as address:
        command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, address]
        done = subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True, text=True)
    assert done.stdout == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
