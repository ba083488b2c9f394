"""`rollcall`, or `python -m rollcall`: the command."""

import sys


def main() -> None:
    """Run the command and exit with its code."""
    try:
        from rollcall.cli import run  # noqa: PLC0415 (the library works without what the command needs)
    except ModuleNotFoundError as error:
        if error.name not in ("click", "jinja2"):
            raise
        sys.exit(f"rollcall: the command needs {error.name}: pip install 'rollcall-chassis[cli]'")
    sys.exit(run())


if __name__ == "__main__":
    main()
