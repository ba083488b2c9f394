"""The command: what is registered, how it is, and calls to it, for people at a terminal and for programs."""

import logging
import os
from typing import Any

import click
from click.shell_completion import get_completion_class

from rollcall.cli import show
from rollcall.cli.call import call
from rollcall.cli.health import doctor, health
from rollcall.cli.kv import kv
from rollcall.cli.look import deregister, instances, services, watch
from rollcall.cli.new import new
from rollcall.registry import RegistryError, RegistryUnavailableError
from rollcall.settings import PREFIX, BadSettingError

_EPILOG = f"""Consul is found, and let in to, by the same environment variables as by services: {PREFIX}CONSUL,
{PREFIX}CONSUL_TOKEN or {PREFIX}CONSUL_TOKEN_FILE, {PREFIX}CONSUL_CA, {PREFIX}CONSUL_CERT and {PREFIX}CONSUL_KEY. So is
another registry: {PREFIX}REGISTRY=mdns; or kubernetes, with {PREFIX}KUBERNETES_API, such as the http://127.0.0.1:8001
of kubectl proxy, and {PREFIX}KUBERNETES_NAMESPACE.

Exit codes: 0 well, 1 not found or not well, 2 typed wrongly, 3 the registry cannot be asked, 130 interrupted; and for
a call that fails 64 and the code of its gRPC status."""

_WHERE = f"See --consul and {PREFIX}CONSUL, or rollcall --help for other registries"


@click.group(
    epilog=_EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "color": False if os.environ.get("NO_COLOR") else None,  # None: on a terminal only. https://no-color.org
    },
)
@click.option("--consul", metavar="ADDRESSES", help="Consul servers as HOST:PORT, by commas.  [127.0.0.1:8500]")
def cli(consul: str | None) -> None:
    """Look at a system of services that register themselves, and call them."""


for _command in (new, services, instances, watch, call, health, doctor, kv, deregister):
    cli.add_command(_command)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete words.

    Commands, services and methods.

    \b
        bash, zsh:  eval "$(rollcall completion bash)"
        fish:       rollcall completion fish | source
    """  # noqa: D301 (what click takes for "leave these lines as they are")
    made = get_completion_class(shell)
    assert made  # noqa: S101 (of the three that can be chosen)
    click.echo(made(cli, {}, "rollcall", "_ROLLCALL_COMPLETE").source())


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; whatever goes wrong is said in words."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code: Any = cli.main(arguments, prog_name="rollcall", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = show.INTERRUPTED
    except (show.FoundError, BadSettingError, RegistryError) as error:
        text, code = _complaint(error)
        click.echo(f"rollcall: {text}", err=True)
    return int(code or 0)


def _complaint(error: Exception) -> tuple[str, int]:
    """Return what is to be said of an error, and the exit code that it is."""
    match error:
        case show.FoundError():
            return str(error), error.code
        case BadSettingError():
            return str(error), show.TYPED_WRONGLY
        case RegistryUnavailableError():
            return f"{error}; is it running, and there? {_WHERE}", show.UNAVAILABLE
    return str(error), show.UNAVAILABLE
