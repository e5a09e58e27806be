"""Errors that users can cause and fix; the command prints the message as one line and exits with status 2."""


class InputError(ValueError):
    """A value given by the user is invalid; the message names the value and the rule that it breaks."""


class InputTypeError(InputError, TypeError):
    """A value has the wrong type or dtype."""


class CheckpointError(InputError):
    """A saved file is damaged, incomplete or of another model, run or format; nothing was loaded from it."""


class SaveError(InputError):
    """Writing failed (full disk, no permission); any earlier file is intact."""


def first_line(error: object) -> str:
    """Return the first line of an error's or warning's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
