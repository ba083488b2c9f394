"""`new`: a service of one's own, in a repository like Rollcall's or standing alone."""

import keyword
import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, PackageLoader, StrictUndefined

from rollcall.cli import show

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 30
"""Most characters of a service's name, its namespace included: the chart takes no more, for Kubernetes takes 63 of a
Service's, with the release's name before it and `headless` behind."""
LIBRARY = "rollcall-chassis"
"""What packages know the library by."""
TAKEN = (
    *("consul", "consul-client", "consul-server", "test"),
    *("contracts", "google", "grpc", "protos", "rollcall", "services", "tests", "wheels"),
)
"""Names of the chart's own components, and of packages and folders, that a service's would come in the way of."""


@dataclass(frozen=True)
class Plan:
    """A service that is to be made, by all the names that it goes by."""

    name: str
    namespace: str
    type: str
    root: Path
    """The folder that files are written below."""
    alone: bool

    @property
    def service(self) -> str:
        """The name that it is registered under, and called by."""
        return f"{self.namespace}-{self.name}" if self.namespace else self.name

    @property
    def module(self) -> str:
        """The name of its package."""
        return self.service.replace("-", "_")

    @property
    def folder(self) -> str:
        """The folder of what is its own, below the root; empty where that is all of it."""
        return "" if self.alone else f"services/{self.module}"

    @property
    def command(self) -> str:
        """What the command is called by, where the service is at home."""
        return ".venv/bin/rollcall" if self.alone else ".venv/bin/python -m rollcall"

    @property
    def proto(self) -> str:
        """The folder of its contract, below that of all contracts."""
        return "/".join(_module(part) for part in (self.namespace, self.name, "v1") if part)

    def names(self) -> dict[str, Any]:
        """Return what templates know."""
        stubs = _module(self.name)
        above = "protos/contracts" if self.alone else "../../protos"
        return {
            "service": self.service,
            "module": self.module,
            "folder": self.folder,
            "type": self.type,
            "alone": self.alone,
            "title": "".join(part.capitalize() for part in self.name.split("-")),
            "stubs": stubs,
            "proto_package": self.proto.replace("/", "."),
            "proto_link": f"{above}/{self.proto}/{stubs}.proto",
            "contract": f"contracts.{self.proto.replace('/', '.')}",
            "code": self.module if self.alone else f"services.{self.module}",
            "values": f"{self.folder}/values.yaml".lstrip("/"),
            "command": self.command,
            "library": LIBRARY,
            "version": _version(),
        }

    def files(self) -> dict[str, str]:
        """Return by the path of each file, below the root, the template that it is made from; none for an empty one."""
        own = f"{self.folder}/" if self.folder else ""
        code = f"{self.module}/" if self.alone else own
        stubs = _module(self.name)
        files = {
            f"{own}README.md": "README.md",
            f"{own}values.yaml": "values.yaml",
            f"{own}requirements.txt": f"{'alone' if self.alone else 'here'}/requirements.txt",
            f"{code}__init__.py": "init.py",
            f"{code}__main__.py": f"{self.type}/main.py",
            f"{code}settings.py": f"{self.type}/settings.py",
            f"{own}tests/test_{self.module}.py": f"{self.type}/test.py",
        }
        if self.type == "srv":
            contracts = "protos/contracts" if self.alone else "protos"
            files |= {f"{code}handler.py": "srv/handler.py", f"{contracts}/{self.proto}/{stubs}.proto": "proto"}
        else:
            files[f"{code}app.py"] = "web/app.py"
        if self.alone:
            for name in ("Dockerfile", "Makefile", "pyproject.toml", "requirements-dev.txt"):
                files[name] = f"alone/{name}"
            files |= {".gitignore": "alone/gitignore", ".dockerignore": "alone/dockerignore"}
        return dict(sorted(files.items()))

    def next_steps(self) -> list[str]:
        """Return what to type next, from where the command was given."""
        call = f"""call {self.service}.Call '{{"name": "李白"}}'"""
        last = f"{self.command} {call if self.type == 'srv' else f'instances {self.service}'}"
        if self.alone:
            return [f"cd {self.root.name}", "make test", "make run", last]
        python = ".venv/bin/python -m"
        run = f"{python} services.{self.module}" + (" --tags public" if self.type == "srv" else "")
        return ["make proto" if self.type == "srv" else "make setup", f"{python} pytest {self.folder}", run, last]


@click.command()
@click.argument("name")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["srv", "web"]),
    default="srv",
    help="srv: a gRPC service with the four kinds of RPC. web: an HTTP front.  [srv]",
)
@click.option("--namespace", default="", metavar="NS", help="What its name, and its contract's package, begin with.")
@click.option("--alone", is_flag=True, help="In a folder of its own, also where this is a repository like Rollcall's.")
def new(name: str, kind: str, namespace: str, *, alone: bool) -> None:
    """Make a service.

    With its contract, handler, settings, tests, image, chart values and README. In a repository like Rollcall's it goes
    where the others are; elsewhere into a folder of its own, NAME, standing on the published library. Nothing that is
    there is overwritten.
    """
    repository = None if alone else _repository(Path.cwd())
    service = f"{namespace}-{name}" if namespace else name
    plan = Plan(name, namespace, kind, repository or Path.cwd() / service, alone=repository is None)
    _check(plan)
    files = plan.files()
    if there := [path for path in files if (plan.root / path).exists()]:
        raise show.FoundError(f"nothing was made, as these are there already: {', '.join(there)}")
    if repository and (repository / plan.folder).exists():
        raise show.FoundError(f"nothing was made, as there is a folder {plan.folder} already")
    rendered = {path: _render(template, plan.names()) for path, template in files.items()}
    for path, text in rendered.items():
        file = plan.root / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as output:
                output.write(text)
        except OSError as error:
            raise show.FoundError(f"{_shown(file)} cannot be written: {error.strerror}") from None
    where = "" if plan.root == Path.cwd() else f" in {_shown(plan.root)}"
    click.echo(f"made {plan.service}{where}:")
    for path in files:
        click.echo(f"  {path}")
    click.echo("next:")
    for step in plan.next_steps():
        click.echo(f"  {step}")


def _check(plan: Plan) -> None:
    """Raise `FoundError` for a name that a service cannot have."""
    for what, given in (("name", plan.name), ("namespace", plan.namespace)):
        if not NAME.fullmatch(given) and (given or what == "name"):
            raise show.FoundError(
                f"expected the {what} to be lower-case letters and digits, a letter first, with single hyphens "
                f"between, as order or order-history are; found {given!r}",
                show.TYPED_WRONGLY,
            )
    if len(plan.service) > LONGEST:
        raise show.FoundError(
            f"expected a name of at most {LONGEST} characters, found {len(plan.service)}: {plan.service}",
            show.TYPED_WRONGLY,
        )
    for word in sorted({plan.module, *plan.proto.split("/")}):
        if keyword.iskeyword(word) or word in TAKEN:
            raise show.FoundError(
                f"{word!r} means something else in Python or here: choose another", show.TYPED_WRONGLY
            )
    there = find_spec(plan.module) if plan.alone else None
    if there and there.origin:  # a folder without code has none
        raise show.FoundError(
            f"{plan.module!r} is the name of a Python module already, which a package of this name would hide: choose "
            f"another, or give it a --namespace",
            show.TYPED_WRONGLY,
        )


def _repository(folder: Path) -> Path | None:
    """Return the folder, this one or one above, of a repository like Rollcall's; None where there is none."""
    for each in (folder, *folder.parents):
        try:
            project = tomllib.loads((each / "pyproject.toml").read_text())["project"]["name"]
        except (OSError, ValueError, LookupError):
            continue
        if project == LIBRARY and all((each / part).is_dir() for part in ("services", "protos", "Dockerfiles")):
            return each
    return None


def _render(template: str, names: dict[str, Any]) -> str:
    loader = PackageLoader("rollcall", "templates")
    # What is made here is code, which nothing in a name that `_check` lets through has to be escaped in.
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    return environment.get_template(f"{template}.jinja").render(names)


def _module(name: str) -> str:
    return name.replace("-", "_")


def _version() -> str:
    try:
        return version(LIBRARY)
    except PackageNotFoundError:  # in the repository, which is not installed
        return "0.1.0"


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
