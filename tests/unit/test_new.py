"""`rollcall new`: what it makes where, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rollcall.cli import show
from rollcall.cli.new import new

REPOSITORY = """[project]
name = "rollcall-chassis"
"""
SRV = {"__init__.py", "__main__.py", "handler.py", "settings.py"}
WEB = {"__init__.py", "__main__.py", "app.py", "settings.py"}
ALONE = {
    ".dockerignore",
    ".gitignore",
    "Dockerfile",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements-dev.txt",
    "requirements.txt",
    "values.yaml",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def repository(folder: Path) -> Path:
    for part in ("services", "protos", "Dockerfiles"):
        (folder / part).mkdir()
    (folder / "pyproject.toml").write_text(REPOSITORY)
    return folder


def made(*arguments: str) -> Result:
    ran = CliRunner().invoke(new, arguments, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran


def refused(*arguments: str) -> show.FoundError:
    with pytest.raises(show.FoundError) as error:
        CliRunner().invoke(new, arguments, catch_exceptions=False)
    return error.value


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_service_alone(folder: Path) -> None:
    ran = made("shop")
    contract = {"protos/contracts/shop/v1/shop.proto"}
    assert files(folder / "shop") == ALONE | {f"shop/{name}" for name in SRV} | contract | {"tests/test_shop.py"}
    assert ran.output.startswith("made shop in shop:\n")
    assert "\nnext:\n  cd shop\n  make test\n  make run\n  .venv/bin/rollcall call shop.Call" in ran.output


def test_a_front_alone(folder: Path) -> None:
    ran = made("shop", "--type", "web")
    assert files(folder / "shop") == ALONE | {f"shop/{name}" for name in WEB} | {"tests/test_shop.py"}
    assert ran.output.endswith("  .venv/bin/rollcall instances shop\n")
    assert "rollcall-chassis[web]" in (folder / "shop/requirements.txt").read_text()


@pytest.mark.parametrize("below", ["", "services"])
def test_a_service_in_a_repository_goes_where_the_others_are(
    repository: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    before = files(repository)
    monkeypatch.chdir(repository / below)
    ran = made("shop")
    own = {*SRV, "README.md", "requirements.txt", "values.yaml", "tests/test_shop.py"}
    assert files(repository) - before == {f"services/shop/{name}" for name in own} | {"protos/shop/v1/shop.proto"}
    assert "\nnext:\n  make proto\n" in ran.output


def test_a_front_in_a_repository(repository: Path) -> None:
    before = files(repository)
    made("shop", "--type", "web")
    own = {*WEB, "README.md", "requirements.txt", "values.yaml", "tests/test_shop.py"}
    assert files(repository) - before == {f"services/shop/{name}" for name in own}


def test_alone_in_a_repository(repository: Path) -> None:
    made("shop", "--alone")
    assert (repository / "shop/Makefile").is_file()
    assert not (repository / "services/shop").exists()


def test_a_namespace_and_a_name_of_many_words(folder: Path) -> None:
    made("order-history", "--namespace", "acme")
    root = folder / "acme-order-history"
    proto = (root / "protos/contracts/acme/order_history/v1/order_history.proto").read_text()
    assert "package acme.order_history.v1;" in proto
    assert "service OrderHistoryService {" in proto
    main = (root / "acme_order_history/__main__.py").read_text()
    assert 'rollcall.Service("acme-order-history", settings=OrderHistorySettings)' in main
    assert "healthService: acme.order_history.v1.OrderHistoryService" in (root / "values.yaml").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Shop",
        "1shop",
        "shop_front",
        "shop--front",
        "-shop",
        "shop-",
        "shop.front",
        "../shop",
        "a/b",
        "店",
        "a" * 31,
    ],
)
def test_a_name_that_cannot_be(folder: Path, name: str) -> None:
    error = refused("--", name)
    assert str(error).startswith("expected ")
    assert error.code == show.TYPED_WRONGLY
    assert files(folder) == set()


@pytest.mark.parametrize(
    "name", ["class", "import", "contracts", "rollcall", "google", "tests", "json", "requests", "consul", "wheels"]
)
def test_a_name_that_means_something_else(folder: Path, name: str) -> None:
    error = refused(name)
    assert "choose another" in str(error)
    assert error.code == show.TYPED_WRONGLY
    assert files(folder) == set()


def test_a_module_s_name_will_do_where_it_hides_nothing(repository: Path) -> None:
    made("json")
    assert (repository / "services/json/handler.py").is_file()
    made("json", "--namespace", "acme", "--alone")


@pytest.mark.parametrize("namespace", ["Acme", "a b", "class", "google"])
def test_a_namespace_that_cannot_be(folder: Path, namespace: str) -> None:
    assert refused("shop", "--namespace", namespace).code == show.TYPED_WRONGLY
    assert files(folder) == set()


@pytest.mark.parametrize("there", ["shop/Makefile", "shop/shop/handler.py", "shop/protos/contracts/shop/v1/shop.proto"])
def test_nothing_is_overwritten(folder: Path, there: str) -> None:
    (folder / there).parent.mkdir(parents=True)
    (folder / there).write_text("mine")
    error = refused("shop")
    assert there.removeprefix("shop/") in str(error)
    assert error.code == show.NOT_WELL
    assert files(folder) == {there}
    assert (folder / there).read_text() == "mine"


def test_what_cannot_be_written_is_said(folder: Path) -> None:
    (folder / "shop").write_text("a file where a folder should be")
    assert "shop" in str(refused("shop"))
    assert "cannot be written" in str(refused("shop"))


def test_a_service_that_is_there_is_left_alone(repository: Path) -> None:
    (repository / "services/shop").mkdir()
    assert "a folder services/shop already" in str(refused("shop"))
    made("shop", "--namespace", "acme")
    before: dict[str, Any] = {path: (repository / path).read_text() for path in files(repository)}
    refused("shop", "--namespace", "acme", "--type", "web")
    assert {path: (repository / path).read_text() for path in files(repository)} == before


def test_another_s_repository_is_none_of_ours(repository: Path) -> None:
    (repository / "pyproject.toml").write_text('[project]\nname = "another"\n')
    made("shop")
    assert (repository / "shop/Makefile").is_file()
    (repository / "pyproject.toml").write_text("no toml [")
    made("other")
    assert not any((repository / "services").iterdir())
