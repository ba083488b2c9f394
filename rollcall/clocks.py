"""Whether the clock of another machine agrees with this one's, by what it says in an HTTP answer's Date."""

from email.utils import parsedate_to_datetime

RESOLUTION = 1.0  # seconds: a Date has no fractions


def apart(date: str, asked: float, answered: float) -> float:
    """Return by how many seconds at least another clock is ahead, behind where negative; 0 where it may be right.

    `date` is the Date of an answer that came between two readings of `time.time()`. Raises ValueError when it is none.
    https://httpwg.org/specs/rfc9110.html#field.date
    """
    theirs = parsedate_to_datetime(date).timestamp()
    return max(theirs - answered, 0.0) + min(theirs + RESOLUTION - asked, 0.0)


def complaint(whose: str, seconds: float) -> str:
    """Say by how much a clock is apart from this machine's; nothing when that is less than a second."""
    if abs(seconds) < RESOLUTION:
        return ""
    return (
        f"{whose}: its clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's: "
        f"set both by NTP; logs, certificates and deadlines that are points in time are wrong until then"
    )
