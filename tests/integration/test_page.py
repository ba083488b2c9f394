"""The web page as people use it: in a browser, before real services that real Consul servers know of."""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests import chromium
from tests.chromium import DESKTOP, PHONE
from tests.integration.fleet import Fleet
from tests.waiting import eventually, free_port

PUBLIC = ("--tags", "public")
SOON = 2.0  # seconds within which the page shows what has happened to an instance
PATIENCE = 20_000  # ms

Visit = Callable[..., Page]

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("page"), module_cluster, guard)
    try:
        for instance in ("sum-1", "sum-2", "sum-3", "greeter-1", "greeter-2", "hello-1"):
            fleet.start(instance, *PUBLIC)
        fleet.start("student-1", *PUBLIC, "--database", f"sqlite:///{fleet.run}/student.db")
        for name, count in (("sum", 3), ("greeter", 2), ("hello", 1), ("student", 1)):
            eventually(f"{count} of {name} pass", lambda: len(fleet.passing(name)) == count, 30)  # noqa: B023
        yield fleet
    finally:
        fleet.close()


def started(fleet: Fleet, instance: str, *flags: str) -> str:
    """Start an instance of the gateway; return its URL."""
    port = free_port()
    fleet.start(instance, "--port", str(port), *flags)
    eventually(f"{instance} passes", lambda: instance in fleet.passing("gateway"), 30)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def url(system: Fleet) -> str:
    return started(system, "gateway-1")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.running() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    """Opens the page; sees in the end that it has asked nobody but the gateway, and that nothing was wrong with it."""
    wrong: list[str] = []
    contexts = []

    def visit(at: str = "", *, of: str = url, viewport: ViewportSize = DESKTOP, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda asked: wrong.extend([asked.url] * (not _ours(asked.url, of))))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.extend([said.text] * (said.type == "error" and not _expected(said.text))))
        page.goto(f"{of}/{at}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def _ours(asked: str, of: str) -> bool:
    return asked.startswith((of, of.replace("http", "ws", 1), "data:"))


def _expected(text: str) -> bool:
    """Say whether the browser only tells that an answer was a problem, or that the gateway was away."""
    return text.startswith(("Failed to load resource", "WebSocket connection"))


def instance(page: Page, id_: str) -> Locator:
    return page.locator(f"[data-instance='{id_}']")


def service(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name, exact=True)


def press(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def answer(page: Page) -> Any:
    """Return what was answered."""
    return json.loads(page.get_by_label("Answer").inner_text())


def outcome(page: Page) -> Locator:
    return page.locator(".outcome")


# The map.


def test_shows_services_their_instances_and_who_calls_whom(visit: Visit) -> None:
    page = visit()
    for id_ in ("sum-1", "sum-2", "sum-3", "greeter-1", "hello-1", "student-1", "gateway-1"):
        expect(instance(page, id_)).to_contain_text("passing")
    expect(service(page, "student")).to_contain_text("calls sum")
    expect(service(page, "gateway")).to_contain_text("calls greeter, hello")
    expect(service(page, "hello")).to_contain_text("JSON-RPC")
    expect(page.locator(".edges > path[d^=M]")).to_have_count(5)
    instance(page, "sum-1").locator("summary").click()
    expect(instance(page, "sum-1")).to_contain_text(re.compile(r"address\s*127\.0\.0\.1:\d+"))


def test_an_instance_that_is_killed_is_seen_to_go_and_one_that_starts_to_come(
    visit: Visit, system: Fleet, report: list[str]
) -> None:
    page = visit()
    expect(instance(page, "sum-3")).to_contain_text("passing")
    begun = time.monotonic()
    system.kill("sum-3")
    instance(page, "sum-3").get_by_text("fails its check").wait_for()
    gone = time.monotonic() - begun
    expect(page.get_by_role("log", name="What has changed")).to_contain_text("sum-3 fails its check")
    system.start("sum-3")
    eventually("sum-3 passes", lambda: "sum-3" in system.passing("sum"), 30)
    begun = time.monotonic()
    expect(instance(page, "sum-3")).to_contain_text("passing")
    come = time.monotonic() - begun
    report.append(f"shown as failing {gone:.2f} s after it was killed, and as passing {come:.2f} s after Consul knew")
    assert gone < SOON
    assert come < SOON
    system.stop("sum-3")
    expect(instance(page, "sum-3")).to_have_count(0)
    system.start("sum-3")
    expect(instance(page, "sum-3")).to_contain_text("passing")


def test_shows_rates_and_latencies_while_calls_run(visit: Visit) -> None:
    page = visit("#sum.Add")
    press(page, "Send 1,000 calls")
    expect(instance(page, "sum-1")).to_contain_text(re.compile(r"[1-9][\d.]*\s*calls per second"))
    expect(instance(page, "sum-1")).to_contain_text(re.compile(r"[\d.]+ ms\s*95th percentile"))
    expect(instance(page, "gateway-1")).to_contain_text(re.compile(r"[1-9][\d.]*\s*calls per second"))
    press(page, "Stop")


def test_says_when_the_connection_is_lost_and_makes_it_again(visit: Visit, system: Fleet) -> None:
    page = visit(of=started(system, "gateway-2"))
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    system.kill("gateway-2")
    expect(page.get_by_text("connection lost, trying again")).to_be_visible()
    press(page, "Call")
    expect(outcome(page)).to_contain_text("The gateway does not answer")
    system.start("gateway-2")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    press(page, "Call")
    expect(outcome(page)).to_contain_text("200 OK")
    system.stop("gateway-2")


def test_says_when_there_is_nothing_to_call(visit: Visit, system: Fleet) -> None:
    page = visit(of=started(system, "gateway-3", "--public-tag", "nobody-has-it"))
    expect(page.get_by_text("There is no public service to call.")).to_be_visible()
    expect(service(page, "sum")).to_contain_text("internal")
    system.stop("gateway-3")


def test_a_service_that_comes_can_be_called(visit: Visit, system: Fleet) -> None:
    page = visit()
    expect(page.get_by_role("link", name="Add", exact=True)).to_be_visible()
    assert page.get_by_role("link", name="Do", exact=True).count() == 0
    system.start("person-1", *PUBLIC)
    page.get_by_role("link", name="Do", exact=True).click()
    page.get_by_label("name").fill("李白")
    page.get_by_label("age").fill("333")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("200 OK")
    assert answer(page) == {"name": "李白 is sleeping", "age": 999}
    # What the service refuses is said beside the field.
    page.get_by_label("name").fill("")
    page.get_by_label("age").fill("-1")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("400 Bad Request")
    expect(outcome(page)).to_contain_text("INVALID_ARGUMENT")
    for field in ("name", "age"):
        expect(page.get_by_label(field)).to_have_attribute("aria-invalid", "true")
        expect(page.get_by_label(field)).to_have_accessible_description(re.compile("must"))
    system.stop("person-1")
    expect(service(page, "person")).to_have_count(0)


# Calls.


def test_a_form_for_a_message_of_every_shape(visit: Visit) -> None:
    page = visit("#student.AddFunc")
    page.get_by_label("name").fill("李白")
    page.get_by_label("age").fill("33")
    press(page, "Add p")
    page.get_by_label("weight").fill("60")
    for score in ("90", "1", "85", "77"):
        press(page, "Add score")
        page.keyboard.type(score)  # into the field that was added
    press(page, "Remove score 2")
    page.get_by_label("w", exact=False).and_(page.locator("select")).select_option("WEEK_SUNDAY")
    page.get_by_label("class").check()
    page.get_by_role("textbox", name="class").fill("of 701")
    page.get_by_label("teacher").check()
    page.get_by_role("textbox", name="teacher").fill("贺知章")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("200 OK")
    expect(outcome(page)).to_contain_text(re.compile(r"[\d.]+ ms\s*answered by student-1"))
    stored = answer(page)
    assert stored == {
        "name": "李白",
        "age": 33,
        "p": {"weight": 60},
        "score": [90, 85, 77],
        "w": "WEEK_SUNDAY",
        "teacher": "贺知章",
        "id": stored["id"],
        "total": "252",
    }
    press(page, "Remove p")
    page.get_by_label("none").check()
    page.get_by_label("age").fill("200")
    for _ in range(3):
        press(page, "Remove score 1")
    press(page, "Add score")
    page.keyboard.type("-5")
    press(page, "Call")
    for label in ("age", "score 1"):
        expect(page.get_by_label(label, exact=False).first).to_have_accessible_description(re.compile("must"))


def test_json_rpc_has_a_form_like_all_others(visit: Visit) -> None:
    page = visit("#hello.HelloWorld")
    page.get_by_role("form").get_by_role("textbox").first.fill("李白")
    page.keyboard.press("Enter")
    expect(outcome(page)).to_contain_text("answered by hello-1")
    assert answer(page) == "李白 你好"


@pytest.mark.parametrize("text", ["9007199254740993", "-9223372036854775808", "9223372036854775807"])
def test_integers_of_64_bits_stay_what_they_are(visit: Visit, text: str) -> None:
    page = visit("#greeter.BidiStream")
    page.get_by_label("stroke").fill(text)
    press(page, "Send")
    expect(page.locator(".chat .service")).to_contain_text(f'"{text}"')
    expect(page.locator(".chat .you")).to_contain_text(text)


def test_what_was_typed_is_there_when_one_comes_back(visit: Visit) -> None:
    page = visit("#sum.Add")
    page.get_by_label("num1").fill("333")
    page.get_by_role("link", name="Get", exact=True).click()
    page.get_by_label("id").fill("1")
    page.go_back()
    expect(page.get_by_label("num1")).to_have_value("333")


def test_a_deadline_is_kept(visit: Visit) -> None:
    page = visit("#sum.Add")
    page.get_by_label("within").fill("0.000001")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("504 Gateway Timeout")
    page.get_by_label("within").fill("soon")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("400 Bad Request")


def test_a_stream_can_be_stopped(visit: Visit) -> None:
    page = visit("#greeter.ServerStream")
    page.get_by_label("count").fill("3")
    press(page, "Start")
    expect(outcome(page)).to_contain_text(re.compile("200 OK.*answered by greeter-[12].*3 messages", re.DOTALL))
    page.get_by_label("count").fill("10000000")
    press(page, "Start")
    expect(outcome(page)).to_contain_text("the last 200 of them")
    press(page, "Stop")
    expect(outcome(page)).to_contain_text("stopped after")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    # And the service has heard of it.
    expect(page.locator("[data-instance^='greeter'] .figure").first).to_be_visible()
    for id_ in ("greeter-1", "greeter-2"):
        instance(page, id_).locator("summary").click()
        expect(instance(page, id_)).to_contain_text(re.compile(r"in flight\s*0"))
    page.get_by_label("count").fill("-1")
    press(page, "Start")
    expect(page.get_by_label("count")).to_have_accessible_description(re.compile("must be from 0"))


def test_a_chat(visit: Visit) -> None:
    page = visit("#greeter.BidiStream")
    for stroke in ("1", "22", "333"):
        page.get_by_label("stroke").fill(stroke)
        page.keyboard.press("Enter")
        expect(page.locator(".chat .service").last).to_contain_text(f'"{stroke}"')
        expect(page.get_by_label("stroke")).to_be_focused()
        expect(page.get_by_label("stroke")).to_have_value("")
    press(page, "Finish")
    expect(outcome(page)).to_contain_text(re.compile("OK.*answered by greeter-[12]", re.DOTALL))
    page.get_by_label("stroke").fill("4")
    press(page, "Send")
    expect(page.locator(".chat .service")).to_have_count(1)  # it is another one
    press(page, "Stop")
    expect(outcome(page)).to_contain_text("stopped")
    page.get_by_label("stroke").fill("four")
    press(page, "Send")
    expect(page.get_by_label("stroke")).to_have_attribute("aria-invalid", "true")


def test_a_stream_of_messages_has_one_answer(visit: Visit) -> None:
    page = visit("#greeter.ClientStream")
    for stroke in ("1", "2", "3"):
        page.get_by_label("stroke").fill(stroke)
        press(page, "Send")
        expect(page.locator(".chat .you").last).to_contain_text(stroke)
    press(page, "Finish")
    expect(page.locator(".chat .service")).to_contain_text('{"count":"3"}')
    expect(outcome(page)).to_contain_text("answered by greeter-")


def test_a_thousand_calls_and_how_they_spread(visit: Visit, report: list[str]) -> None:
    page = visit("#sum.Add")
    page.get_by_label("num1").fill("333")
    press(page, "Send 1,000 calls")
    page.get_by_text("1,000 calls, none failed").wait_for(timeout=200_000)
    rows = page.locator(".spread li")
    names = rows.locator(".by").all_inner_texts()
    counts = [int(each) for each in rows.locator("b").all_inner_texts()]
    assert names == ["sum-1", "sum-2", "sum-3"]
    assert sum(counts) == 1000
    assert min(counts) > 250
    facts = page.locator(".spread .facts").inner_text().splitlines()
    report.append(f"{', '.join(map(str, counts))}; {', '.join(facts)}")
    # Only what may be repeated is offered a thousand times.
    page.get_by_role("link", name="AddFunc", exact=True).click()
    expect(page.get_by_role("button", name="Send 1,000 calls")).to_have_count(0)


# For everybody.


def test_leads_to_consul_and_to_the_api(visit: Visit, url: str, system: Fleet) -> None:
    page = visit()
    address = system.cluster.addresses[0]
    expect(page.get_by_role("link", name="Consul")).to_have_attribute("href", f"http://{address}/ui")
    page.get_by_role("link", name="API").click()
    page.get_by_text("/v1/sum/Add").first.wait_for()
    assert page.url == f"{url}/docs"


def test_is_usable_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit("#sum.Add")
    page.get_by_label("num1").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the methods")).to_be_focused()
    page.keyboard.press("Enter")
    _tab_to(page, page.get_by_role("link", name="Call", exact=True))
    page.keyboard.press("Enter")
    _tab_to(page, page.get_by_label("name"))
    page.keyboard.type("World")
    page.keyboard.press("Enter")
    expect(outcome(page)).to_contain_text("200 OK")
    _tab_to(page, page.get_by_label("Answer"))
    page.get_by_role("link", name="Skip to the methods").focus()
    _tab_to(page, instance(page, "sum-1").locator("summary"))
    page.keyboard.press("Enter")
    expect(instance(page, "sum-1").get_by_text("address")).to_be_visible()


def _tab_to(page: Page, wanted: Locator) -> None:
    """Press Tab until this has the focus, and see that each thing on the way shows that it has."""
    for _ in range(60):
        page.keyboard.press("Tab")
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        assert shown, page.evaluate("document.activeElement.outerHTML")
        if wanted.evaluate("each => each === document.activeElement"):
            return
    raise AssertionError(f"expected to reach {wanted} by Tab, found it after none of 60")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, viewport: ViewportSize, scheme: str) -> None:
    page = visit("#student.AddFunc", viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    press(page, "Add p")
    press(page, "Add score")
    page.get_by_label("teacher").check()
    page.get_by_label("age").fill("-1")
    press(page, "Call")
    expect(page.get_by_label("age")).to_have_attribute("aria-invalid", "true")
    instance(page, "sum-1").locator("summary").click()
    page.get_by_text("As a command").click()
    _is_sound(page)
    page.get_by_role("link", name="Get", exact=True).click()
    page.get_by_label("id").fill("1")
    press(page, "Call")
    expect(outcome(page)).to_contain_text("answered by")
    _is_sound(page)
    page.get_by_role("link", name="BidiStream", exact=True).click()
    page.get_by_label("stroke").fill("1")
    press(page, "Send")
    expect(page.locator(".chat li")).to_have_count(2)
    _is_sound(page)
    page.get_by_role("link", name="ServerStream", exact=True).click()
    page.get_by_label("count").fill("1000")
    press(page, "Start")
    expect(outcome(page)).to_contain_text("200 OK")
    _is_sound(page)
    page.get_by_role("link", name="Add", exact=True).click()
    press(page, "Send 1,000 calls")
    expect(page.locator(".spread li")).to_have_count(3)
    press(page, "Stop")
    expect(outcome(page)).to_contain_text("none failed")
    _is_sound(page)


def _is_sound(page: Page) -> None:
    """See that axe finds nothing serious, and that nothing is wider than the screen."""
    found = Axe().run(page).response["violations"]
    assert not [
        (each["id"], node["html"], node["failureSummary"])
        for each in found
        for node in each["nodes"]
        if each["impact"] in ("serious", "critical")
    ]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keeps_still_for_those_who_want_it(visit: Visit) -> None:
    page = visit(reduced_motion="reduce")
    expect(instance(page, "sum-1")).to_contain_text("passing")
    assert page.evaluate("document.getAnimations().length") == 0
