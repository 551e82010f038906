"""The page of a run: what strangers get of it, and what a browser shows."""

import shutil
import time

import httpx
import page_data
import pytest
import toy_run
from server_process import Client

from edgefed.aggregator.page import HEADERS, MEDIA_TYPES, STATIC
from edgefed.protocol import routes
from edgefed.protocol.messages import Heartbeat, encode_message

TOKEN = "a-token-that-nobody-guesses"
HOSTILE = "<img src=x onerror=document.title='owned'>"
LOSSES = {"train_loss": 3.25, "held_out_loss_before": 3.5, "held_out_loss_after": 3.0}


def federation(start_server, state, rounds: int = 3, **options: object):
    """A real server whose three clients have sent the updates of all rounds but the last, each with its own experts."""
    server = start_server(state, token=TOKEN, **options)
    clients = [Client(server.url, name, token=TOKEN) for name in ("anna", "bob", "carl")]
    for client in clients:
        client.register(name=HOSTILE if client.client_id == "bob" else f"{client.client_id}'s laptop")
    for server_round in range(1, rounds):
        manifest = clients[0].wait_for_round(server_round)
        units = [unit for unit in manifest.units if unit.trainable]
        for at, client in enumerate(clients):
            while "Assignment" not in type(client.assignment(wait_s=1.0)).__name__:
                time.sleep(0.02)
            mine = [unit for unit in units if unit.kind != "expert" or unit.expert % 3 >= at]
            metrics = {name: value - 0.25 * server_round for name, value in LOSSES.items()}
            client.send(toy_run.make_update(manifest, client.client_id, toy_run.trained(mine, at), metrics=metrics))
    clients[0].wait_for_round(rounds)
    for client in clients:
        client.assignment()
    heartbeat = encode_message(Heartbeat(phase="train", fraction=0.4, server_round=rounds))
    clients[0].request("POST", routes.HEARTBEAT, content=heartbeat)
    return server, clients


def test_the_page_needs_no_token_and_tells_nothing_of_the_run(state, start_server):
    server = start_server(state, token=TOKEN)
    with httpx.Client(base_url=server.url, trust_env=False) as stranger:
        for path in (routes.PAGE, *(f"/{name}" for name in routes.PAGE_FILES)):
            answer = stranger.get(path)
            assert answer.status_code == 200
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert "run-1" not in answer.text
            again = stranger.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for path in (routes.STATUS, routes.COVERAGE, "/page.html", "/static/page.js"):
            assert stranger.get(path).status_code == 401


def test_pages_of_other_sites_get_nothing_from_a_server_without_a_token(state, start_server):
    server = start_server(state)
    own = [("accept", "*/*"), ("origin", server.url), ("sec-fetch-site", "same-origin"), ("host", "localhost:1")]
    foreign = [("origin", "https://evil.example"), ("origin", "null"), ("sec-fetch-site", "cross-site")]
    foreign += [("host", name) for name in ("evil.example", "10.0.0.1:80", "[", "localhost.evil.example")]
    with httpx.Client(base_url=server.url, trust_env=False) as browser:
        for header in [*own, ("host", "[::1]:8470"), ("host", "run.localhost")]:
            assert browser.get(routes.STATUS, headers=[header]).status_code == 200, header
    for header in foreign:
        with httpx.Client(base_url=server.url, trust_env=False) as browser:
            answer = browser.post(routes.REGISTER, content=b"{}", headers=[header])
            assert answer.status_code in (401, 429), header


def test_the_page_loads_nothing_from_elsewhere_and_parses_no_text_as_html():
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http" not in text.replace('"http://www.w3.org/2000/svg"', ""), path
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
            assert word not in text, f"{path}: {word}"
    assert {path.name for path in STATIC.iterdir()} == {"page.html", *routes.PAGE_FILES}


def test_coverage_says_who_holds_and_trains_what(toy):
    assert toy.service.coverage().server_round == 0
    toy.join("anna", "bob")
    manifest = toy.manifest()
    units = [unit for unit in manifest.units if unit.trainable]
    frozen = (toy_run.report(0, 2, steps=0),)
    first = [unit for unit in units if unit.kind == "expert" and unit.expert == 0]
    toy.send(toy_run.make_update(manifest, "anna", toy_run.trained(units, 1)))
    held = (*(toy_run.report(unit.layer, 0) for unit in first), *frozen)
    toy.send(toy_run.make_update(manifest, "bob", toy_run.trained(first, 2), experts=held))
    toy.run.fold_pending()
    found = toy.service.coverage()
    assert found.updates == ((2, 1, 1), (2, 1, 1))
    assert found.trained_in == ((1, 1, 1), (1, 1, 1))
    assert found.clients["bob"].resident == ((0, 2), (0,))
    assert found.clients["bob"].trained == ((1.0, 0.0), (1.0,))
    second = toy.reopen()
    assert second.service.coverage() == found, "it survives a restart"
    second.close()


# --- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium in PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


on_screens = pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)], ids=["desktop", "phone"])
in_themes = pytest.mark.parametrize("theme", ["light", "dark"])


@pytest.mark.full
@on_screens
@in_themes
def test_a_large_run_fits_and_costs_each_refresh_little(browser, width, height, theme):
    """The page over answers that a server would give: 200 clients, 50 rounds, 16 layers of 64 experts."""
    page, asked = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme), []

    def answer(route):
        path = route.request.url.partition("://page.test/")[2]
        asked.append(path)
        if path in ("v1/status", "v1/coverage"):
            data = page_data.large_run(page_data.ROUNDS + (asked.count("v1/status") > 2))
            route.fulfill(body=data[path == "v1/coverage"], content_type="application/json")
        else:
            file = STATIC / (path or "page.html")
            route.fulfill(body=file.read_bytes(), content_type=MEDIA_TYPES[file.suffix])

    page.route("**/*", answer)
    page.goto("http://page.test/")
    rows, incidents = page.locator("#clients tbody tr"), page.locator("#incidents li")
    rows.first.wait_for()
    assert (rows.count(), incidents.count()) == (25, 5)
    assert incidents.first.inner_text().startswith("Round 49"), "the newest one comes first"
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    page.click("#more-clients")
    page.click("#more-incidents")
    assert (rows.count(), incidents.count()) == (200, 49)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    page.select_option("#map-client", index=123)
    page.wait_for_selector("#map-summary:has-text('held 256 experts')")
    page.wait_for_selector("#facts:has-text('round 51 of 100')")  # after a refresh
    page.wait_for_selector("#incidents li >> nth=49")
    assert rows.count() == 200, "a refresh does not close what was opened"
    assert page.locator("#map-summary").inner_text().startswith("In round 50 it held 256 experts")
    page.click("#more-clients")
    assert rows.count() == 25
    page.close()


@pytest.mark.full
@on_screens
@in_themes
def test_the_page_shows_a_run(tmp_path, start_server, browser, width, height, theme):
    state = toy_run.make_run(tmp_path / "state", rounds=3, min_clients=3, experts=9)
    server, clients = federation(start_server, state)
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.set_default_timeout(15_000)
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))

    page.goto(server.url)
    page.wait_for_selector("#door:not([hidden])")
    page.fill("#token", "a-token-that-is-not-the-one")
    page.click("#door button")
    page.wait_for_selector("#refusal:has-text('not the token')")
    assert all("401" in problem for problem in problems), problems
    problems.clear()
    page.goto(f"{server.url}/#token={TOKEN}")
    page.reload()  # an address that differs in its fragment only is not loaded again
    page.wait_for_selector("#clients tbody tr")

    assert page.title() == "mean on toy"
    assert page.url == f"{server.url}/", "the token does not stay in the address"
    assert not [url for url in requests if not url.startswith(server.url) or "token-that" in url.partition("#")[0]]
    rows = page.locator("#clients tbody tr")
    assert rows.count() == 3
    assert HOSTILE in page.locator("#clients").inner_text()
    assert page.locator("#clients img").count() == 0
    assert page.locator(".chart").count() == 6
    assert page.locator(".chart .value").nth(0).inner_text().startswith("2.750")
    assert page.locator(".chart .value").nth(1).inner_text().startswith("3.000 → 2.500")
    assert page.locator("#map-summary").inner_text() == "Round 2 trained 18 of 18 experts."
    page.select_option("#map-client", "carl")
    page.wait_for_selector("#map-summary:has-text('held 6 experts')")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    assert page.locator("#cell").inner_text() == "layer 0, expert 0: not on this device"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (theme == "dark")

    manifest = clients[0].manifest()
    for at, client in enumerate(clients):
        tensors = toy_run.trained([unit for unit in manifest.units if unit.trainable], at)
        client.send(toy_run.make_update(manifest, client.client_id, tensors, metrics=LOSSES))
    page.wait_for_selector("#now:has-text('The run is finished.')")  # without a reload
    server.kill()
    page.wait_for_selector("#silence:not([hidden])")
    assert not [problem for problem in problems if "ERR_CONNECTION_REFUSED" not in problem]
    page.close()
