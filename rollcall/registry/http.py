"""What registries that are asked over HTTP share."""

import random
from pathlib import Path

import requests

from rollcall.registry import RegistryError

BACKOFF = (0.1, 2.0)  # seconds: the first and the longest pause after there was no answer


def pause(rounds: int) -> float:
    """Return the seconds to wait before the next question, after so many rounds without an answer."""
    return min(BACKOFF[0] * 2.0 ** min(rounds, 10), BACKOFF[1]) * random.uniform(0.5, 1)  # noqa: S311 (spreads questions, guards nothing)


def token_from(file: str | Path, token: str = "") -> str:
    """Return the token that a file has, or the given one where none is named, fit to be sent in a header.

    Raises `RegistryError` when the file cannot be read, and for what is no token, without showing it.
    """
    try:
        token = Path(file).read_text().strip() if file else token
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"the token's file {file} cannot be read: {error}") from None
    if not (token.isascii() and token.isprintable()):  # requests would show it in its own complaint
        raise RegistryError(
            f"expected the token to be one line of printable ASCII, in {file or 'the setting'}; found something else, "
            f"which is not shown here"
        )
    return token


def reason(error: requests.RequestException) -> str:
    """Say why there was no answer."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"TLS failed: {error}"
    return "connection refused or lost" if isinstance(error, requests.ConnectionError) else str(error)
