"""Errors that a person can cause and mend; the command prints their message as one line and exits with status 2."""


class InputError(ValueError):
    """Something given by the user is wrong; the message names the thing, its value and the rule."""


class InputTypeError(InputError, TypeError):
    """A value has the wrong type or dtype."""


class CheckpointError(InputError):
    """A saved file is damaged, incomplete or belongs to something else; nothing was loaded from it."""


class SaveError(InputError):
    """Writing failed (full disk, no permission); whatever was there before is intact."""
