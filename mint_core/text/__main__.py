"""`python -m mint_core.text FD`: answers the front at the pipe's other end until it goes."""

import logging
import warnings
from array import array
from typing import Any

from mint_chat import InvalidChat, RendererMismatchWarning, get_renderer
from mint_core.engine_host.pipe import Hello, Reply, connect
from mint_core.errors import FailedPrecondition, InvalidRequest
from mint_core.text.jobs import Detokenize, Render, Rendering, Tokenize


def open_tokenizer(folder: str, name: str) -> Any:
    """A Hugging Face tokenizer. Raises FailedPrecondition if the model has none that opens."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise FailedPrecondition(
            f"the tokenizer of {name} cannot be opened ({type(error).__name__}: {error}); send "
            "tokens instead of texts"
        ) from error


def answer(tokenizer: Any, job: object) -> object:
    """What comes of a job."""
    match job:
        case Tokenize(texts, add_special_tokens):
            if not texts:
                return []
            encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens)
            return [array("i", tokens) for tokens in encoded["input_ids"]]
        case Detokenize(sequences, skip):
            return [tokenizer.decode(tokens, skip_special_tokens=skip) for tokens in sequences]
        case Render():
            return _render(tokenizer, job)
    raise AssertionError(f"unknown job {job!r}")


def _render(tokenizer: Any, job: Render) -> Rendering:
    place = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RendererMismatchWarning)  # who has chosen it knows
            renderer = get_renderer(job.renderer, tokenizer, job.tools)
        chats: list[tuple[array[int], array[float]]] = []
        for index, messages in enumerate(job.chats):
            place = f"chats[{index}]."
            if job.for_generation:
                chats.append((array("i", renderer.build_generation_prompt(messages)), array("f")))
            else:
                tokens, weights = renderer.build_supervised_example(messages, job.train_on_what)
                chats.append((array("i", tokens), array("f", weights)))
    except InvalidChat as error:
        names = {"name": "renderer", "tokenizer": "renderer", "tools": "tools_json"}
        field = names.get(error.field, place + error.field)
        message = error.message.replace(f"`{error.field}`", f"`{field}`", 1)
        raise InvalidRequest(message, field=field) from None
    return Rendering(chats, renderer.get_stop_sequences())


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    pipe, model = connect()
    try:
        tokenizer = open_tokenizer(model.folder, model.name)
    except Exception as error:
        pipe.fail(0, error)
        return
    pipe.send(Hello(model))
    while (call := pipe.receive()) is not None:
        try:
            pipe.send(Reply(call.number, answer(tokenizer, call.job)))
        except Exception as error:
            pipe.fail(call.number, error)


if __name__ == "__main__":
    main()
