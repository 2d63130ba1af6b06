"""Code is told from prose."""

from tests.page_code import code_blocks

PAGE = """\
Heading
Two words

Prose that does not parse, with a colon:

import math

def area(radius):
    # a comment

    return math.pi * radius**2

Usage:

# Once it is defined:
print(area(2))
Closing words.
Bye
"""


def test_code_comes_out_whole_and_in_order() -> None:
    first, second = code_blocks(PAGE)
    assert first == (
        "import math\n\ndef area(radius):\n    # a comment\n\n    return math.pi * radius**2"
    )
    assert second == "# Once it is defined:\nprint(area(2))"


def test_one_word_is_prose() -> None:
    assert code_blocks("Configuration\n\nOverview\n") == []


def test_an_empty_page_has_no_code() -> None:
    assert code_blocks("") == []
