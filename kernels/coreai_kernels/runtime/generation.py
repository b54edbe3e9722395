"""Whether an owner's settings are still those that something was worked out from."""

__all__ = ["Generation"]


class Generation(dict[str, object]):
    """The generation of an owner's settings: a new one begins with each change.

    A dictionary of one entry, so that the guard of captured calls reads it as any other slot. The entry's
    value is compared by identity: no two generations have the same.
    """

    KEY = "now"

    def __init__(self) -> None:
        super().__init__({self.KEY: object()})

    @property
    def now(self) -> object:
        """The current generation, which equals itself alone."""
        return self[self.KEY]

    def advance(self) -> None:
        """Begin a new one."""
        self[self.KEY] = object()
