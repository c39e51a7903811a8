"""What a user sees when something is wrong: one line, never a traceback."""


def printable(text: str) -> str:
    """Escape what would break a line or talk to the terminal: names come from the model."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class PwoptError(Exception):
    """The work failed (exit code 1). The message names the file, the layer and what to do."""

    exit_code = 1


class ModelError(PwoptError):
    """A model that cannot be read, carried or written."""


class DataError(PwoptError):
    """Samples, labels or preprocessing that do not fit the model."""


class LearnError(PwoptError):
    """A network that cannot be trained here, or training that cannot go on."""


class SpecError(PwoptError):
    """An unknown pass, option or value: wrong usage (exit code 2)."""

    exit_code = 2


class BoundError(PwoptError):
    """A speed, accuracy or size that cannot be reached (exit code 3)."""

    exit_code = 3
