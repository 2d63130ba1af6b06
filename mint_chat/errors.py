"""What a renderer refuses."""


class InvalidChat(ValueError):
    """`message` is a sentence that names `field`."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


def refused(field: str, what: str) -> InvalidChat:
    """The refusal of an input by a sentence that begins with the name of its field."""
    return InvalidChat(f"`{field}` {what}", field=field)
