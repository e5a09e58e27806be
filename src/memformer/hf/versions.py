"""Check of the installed version of transformers."""

import importlib.metadata

from memformer.errors import InputError

# The first version that passes a model's state as `cache`. Versions 5.18 to 5.23 would drop it without an error.
FIRST = (5, 24)
END = (6,)
_INSTALL = "pip install 'memformer-lm[hf]'"


def check_transformers() -> None:
    """Check that a supported version of transformers is installed.

    Raises:
        InputError: transformers is missing, or its version is not supported.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"memformer.hf needs the package transformers: {_INSTALL}") from error
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not FIRST <= found < END:
        raise InputError(
            f"memformer.hf needs transformers {_shown(FIRST)} or newer and below {_shown(END)}, but {version} is "
            f"installed: {_INSTALL}"
        )


def _shown(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
