"""The demo page in headless Chromium, driven by Playwright; skipped where one of them is absent."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

import pytest

from models import Free, SoftmaxGap, early_exit_decode, load_model
from util.demo_arguments import DemoArguments

ROOT = Path(__file__).resolve().parent.parent
FREE = ROOT / "checkpoints/debian-t5-free"
BUS = "Filternder D-Bus-Proxy - Tests für installierte Pakete"  # of which lossless takes drafts back
ASPELL = "Laufzeitbibliothek für die Rechtschreibprüfung GNU Aspell"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = {
    "Gradio (pip install -r requirements-demo.txt)": importlib.util.find_spec("gradio"),
    "Playwright (pip install -r tests/requirements-browser.txt)": importlib.util.find_spec("playwright"),
    "Chromium (apt-get install chromium)": CHROMIUM,
}
MISSING = [name for name, found in NEEDED.items() if not found]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"the page in a browser needs {', '.join(MISSING)}"),
    pytest.mark.slow,
]
PATIENCE = 30_000  # milliseconds that anything may take
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>${window.hacked=1}{{1}}'
CONTRASTS = """(selector) => [...document.querySelectorAll(selector)].map(element => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const luminance = color => {
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  let behind = element;
  const bare = node => ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(node).backgroundColor);
  while (bare(behind) && behind.parentElement) behind = behind.parentElement;
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
  return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
})"""  # WCAG 2.1's contrast ratio


@pytest.fixture(scope="module")
def address():
    """Of the page, served by this process to several visitors at once."""
    from util.demo.page import DemoPage, launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = DemoArguments(port=port, requests_at_once=2)
    app = DemoPage(flags).build()
    app.queue(default_concurrency_limit=flags.requests_at_once)
    launch(app, flags, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}/"
    app.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(address, browser):
    """Opens the page; nothing may be asked of other machines, and no script may fail."""
    requests, failures, contexts = [], [], []

    def open_page(viewport=DESKTOP, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#decode")
        contexts.append(context)
        return page

    yield open_page
    for context in contexts:
        context.close()
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and not outside and not failures


def set_field(page, name, value):
    """The number beside a slider, or the choice of a dropdown."""
    if name in ("method", "precision"):
        page.locator(f"#{name} input").click()
        page.get_by_role("option", name=value, exact=True).click()
    else:
        page.locator(f"#{name} input[type=number]").fill(str(value))
        page.locator(f"#{name} input[type=number]").press("Tab")


def set_slowness(page, seconds):
    page.get_by_text("More", exact=True).click()
    set_field(page, "slowness", seconds)


def decode(page, text):
    page.get_by_label("Text", exact=True).fill(text)
    page.locator("#decode").click()


def wait_for_end(page):
    """Until words are compared, which needs both outputs."""
    known = "row => /^Words that differ\\s+\\d/.test(row.innerText)"
    page.wait_for_function(f"[...document.querySelectorAll('#output tr')].some({known})")


def outputs(page):
    """Texts of both outputs, without what was taken back and the end."""
    return page.evaluate(
        """() => [...document.querySelectorAll('#output .tokens')].map(tokens => {
          const copy = tokens.cloneNode(true);
          copy.querySelectorAll('.gone, .special').forEach(token => token.remove());
          return copy.textContent.trim().replace(/\\s+/g, ' ');
        })"""
    )


def layers(page):
    tokens = page.locator("#output .output").first.locator(".token:not(.gone)")
    return {int(token.get_attribute("data-layer")) for token in tokens.all()}


def hugging_face(text, policy=None):
    loaded = load_model(str(FREE))
    own = {} if policy is None else {"custom_generate": early_exit_decode, "exit_policy": policy}
    inputs = loaded.tokenizer(text, return_tensors="pt")
    output = loaded.model.generate(**inputs, max_new_tokens=56, do_sample=False, **own)[0]
    return loaded.tokenizer.decode(output, skip_special_tokens=True)


def test_typed_text_streams_and_drafts_are_struck_out(visit):
    page = visit()
    set_slowness(page, 0.25)
    decode(page, BUS)
    page.wait_for_selector("#output .tokens .token.draft")
    assert page.locator("#output .tokens .token.gone").count() == 0
    before = page.locator("#output .tokens .token").count()
    page.wait_for_selector("#output .tokens .token.gone")
    wait_for_end(page)
    assert page.locator("#output .tokens .token").count() > before
    assert page.locator("#output .tokens .token.draft").count() == 0
    assert outputs(page) == [hugging_face(BUS)] * 2


def test_moving_the_slider_decodes_anew(visit):
    page = visit()
    set_field(page, "method", "FREE")
    decode(page, BUS)
    wait_for_end(page)
    assert outputs(page) == [hugging_face(BUS, Free(2, SoftmaxGap(), 0.3)), hugging_face(BUS)]
    assert 2 in layers(page)
    box = page.locator("#threshold input[type=range]").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    page.wait_for_function("document.querySelectorAll('#output .tokens [data-layer=\"2\"]').length === 0")
    wait_for_end(page)
    assert layers(page) == {8} and outputs(page) == [hugging_face(BUS)] * 2


def test_pointing_at_a_token_tells_its_layer(visit):
    page = visit()
    decode(page, ASPELL)
    wait_for_end(page)
    page.wait_for_selector("#output [data-detail*='last layer']")
    token = page.locator("#output .tokens .token").first
    token.hover()
    shown = token.evaluate("element => getComputedStyle(element, '::after').content")
    assert shown.startswith('"layer 2 of 8 · confidence ') and "the last layer says the same" in shown


def test_an_example_is_decoded_at_once(visit):
    page = visit()
    page.locator("#examples").get_by_text(ASPELL).click()
    wait_for_end(page)
    assert outputs(page) == [hugging_face(ASPELL)] * 2


def test_another_checkpoint_brings_its_layers_and_examples(visit):
    page = visit()
    page.locator("#checkpoint input").fill(str(FREE.parent / "none"))
    page.locator("#checkpoint input").press("Enter")
    page.wait_for_selector("#about [role=alert]")
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name="debian-t5-calm").click()
    page.wait_for_function("document.querySelector('#about').innerText.includes('after every layer')")
    set_field(page, "method", "CALM")
    decode(page, BUS)
    wait_for_end(page)
    assert len(layers(page)) > 1


def test_requests_at_once_do_not_mix(visit):
    pages = {text: visit() for text in (BUS, ASPELL)}
    for text, page in pages.items():
        set_slowness(page, 0.1)
        decode(page, text)
    for page in pages.values():
        wait_for_end(page)
    assert [outputs(page) for page in pages.values()] == [[hugging_face(text)] * 2 for text in pages]


def test_stop_stops(visit):
    page = visit()
    set_slowness(page, 0.5)
    decode(page, BUS)
    page.wait_for_selector("#output .tokens .token.draft")
    page.locator("#stop").click()
    page.wait_for_timeout(1000)
    seen = page.locator("#output").inner_html()
    page.wait_for_timeout(1500)
    assert page.locator("#output").inner_html() == seen and "Waiting" in seen
    decode(page, ASPELL)
    page.wait_for_function("document.querySelector('#output .tokens')?.innerText.includes('spell')")


@pytest.mark.parametrize("text", ["  ", HOSTILE])
def test_errors_and_markup_are_plain_lines(visit, text):
    page = visit()
    decode(page, text)
    if text == HOSTILE:
        wait_for_end(page)
        page.locator("#checkpoint input").fill(HOSTILE)
        page.locator("#checkpoint input").press("Enter")
        page.wait_for_selector("#about [role=alert]")
        assert "<img src=x" in page.locator("#about").inner_text()
    else:
        page.wait_for_selector("#output [role=alert]")
        assert page.locator("#output").inner_text().strip() == "Text: type one, or pick an example."
    assert page.evaluate("window.hacked") is None and page.locator("#output img, #about img").count() == 0
    assert "Traceback" not in page.inner_text("body")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_both_schemes(visit, scheme):
    page = visit(scheme=scheme)
    decode(page, BUS)
    wait_for_end(page)
    for selector in ("#output .token", "#output td", "#output .hint", "#output .note", "#about .note"):
        contrasts = page.evaluate(CONTRASTS, selector)
        assert contrasts and min(contrasts) >= 4.5, selector  # WCAG's level AA
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background[:3]) < 80) == (scheme == "dark")


def test_a_phone_shows_one_column_and_nothing_beyond_its_edge(visit):
    page = visit(viewport=PHONE)
    decode(page, BUS)
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    first, second = (box.bounding_box() for box in page.locator("#output .output").all())
    assert second["y"] >= first["y"] + first["height"] and first["x"] == second["x"]
    for name in ("#decode", "#threshold", "#output table", "#checkpoint"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], name
