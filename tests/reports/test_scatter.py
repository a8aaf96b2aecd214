"""The scatter of the report in a real browser: pointer, keys, touch, legend, and no script."""

import base64
import functools
import io
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.embeddings import absence
from pipeline.embeddings.rows import Rows
from pipeline.formats import projector
from pipeline.reports import page as report_page
from pipeline.reports import plots, scatter
from pipeline.reports.latent_space import Map
from tests.faults.hostile_source import IDS, NAMES
from tests.reports.browser import Browser, needs_browser

ATTACK = "<img src=x onerror=window.hacked=1>"
HOSTILE_IDS = [
    *IDS,
    f"</script>{ATTACK}",
    f"<!--<script>{ATTACK}",
    f'" onmouseover=window.hacked=1 x="{ATTACK}',
    "]}</script><script>window.hacked=1</script>",
]
HOSTILE_NAMES = [*NAMES, f"</script>{ATTACK}", ATTACK]
IS_STATIC = "return document.querySelector('.map') === null"
GRID = np.array([[x, y] for y in range(3) for x in range(3)], float)  # Record 4 is in the middle.
NINE = [f"record {i}" for i in range(9)]


def page_of(ids, labels, names, *, points=None, image_shape=(12, 8, 1), maps=("pca", "tsne")):
    """A report with nothing but maps; the picture of record i has the brightness i."""
    count = len(ids)
    if points is None:
        points = np.random.default_rng(0).normal(size=(count, 2))
    labels = np.asarray(labels)
    losses = np.arange(count, dtype=np.float32)
    rows = Rows(list(ids), labels, ["0" * 64] * count, {"reconstruction_loss": losses})
    sprite = projector.Sprite(range(count), image_shape, max_side=scatter.MAX_SIDE)
    for i in range(count):
        sprite.add(i, np.full(image_shape, i % 256, np.uint8))
    named = dict(enumerate(names))
    drawn = [
        Map(name, name, points if name == "pca" else -points, labels, ("x", "y")) for name in maps
    ]
    body = scatter.data(drawn, rows, class_name=named.__getitem__, sprite=sprite)
    figures = [(figure(), f"Scatter plot: {m.name}", m.name, m.name) for m in drawn]
    body += report_page.plots(*figures)
    section = report_page.Section("latent-space", "Latent space", body)
    return report_page.page(
        title="set: test", lead="", warnings=[], sections=[section], script=scatter.script()
    )


@functools.cache
def figure() -> plots.Plot:
    """A figure that is shown without scripts."""
    return plots.scatter(Map("pca", "PCA", GRID, np.zeros(9, np.int64), ("x", "y")), {0: "a"})


class Scatter:
    """A page in a browser, its pointer and keys."""

    def __init__(self, browser: Browser, directory, page: bytes):
        self.browser = browser
        path = directory / "report.html"
        path.write_bytes(page)
        browser.complaints()
        browser.open(path.as_uri())

    def input(self, command: str, **arguments):
        self.browser.driver.execute_cdp_cmd(f"Input.{command}", arguments)

    def place(self, record: int, *, number: int = 0) -> tuple[float, float]:
        """Where a record is on the screen, in the map of that number."""
        return tuple(
            self.browser.run(
                f"const map = document.querySelectorAll('.map canvas[role]')[{number}];"
                "map.scrollIntoView({block: 'center'});"
                "const data = JSON.parse(document.getElementById('scatter-data').textContent);"
                f"const [x, y] = Object.values(data.maps)[{number}]"
                f".points.slice({2 * record}, {2 * record + 2}).map(v => v / 10000);"
                "const box = map.getBoundingClientRect();"
                # Margins are 46 left and below, and 8 elsewhere.
                "return [box.x + 46 + x * (box.width - 54),"
                "  box.y + 8 + (1 - y) * (box.height - 54)]"
            )
        )

    def point_at(self, record: int, *, number: int = 0) -> None:
        x, y = self.place(record, number=number)
        self.input("dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        code = {"Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.input("dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def card(self) -> list[str] | None:
        """The texts of the visible card; None without one."""
        return self.browser.run(
            "const cards = [...document.querySelectorAll('.card')].filter(c => !c.hidden);"
            "if (cards.length > 1) throw cards.length;"
            "return cards.length ? [...cards[0].children].filter(e => e.localName !== 'canvas')"
            ".map(e => e.textContent) : null"
        )

    def brightness(self) -> int:
        """That of the picture on the card."""
        return self.browser.run(
            "const picture = document.querySelector('.card:not([hidden]) canvas');"
            "const { width, height } = picture;"
            "const pixels = picture.getContext('2d').getImageData(0, 0, width, height).data;"
            "const shades = new Set(pixels.filter((_, i) => i % 4 === 0));"
            "return shades.size === 1 ? [...shades][0] : -1"
        )

    def click(self, button: str) -> None:
        self.browser.run(
            "[...document.querySelectorAll('.legend button')]"
            f".find(b => b.textContent === {button!r}).click()"
        )

    def pressed(self) -> list[str]:
        return self.browser.run(
            "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.textContent)"
        )


@pytest.fixture(scope="module")
def browser():
    needs_browser()
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def nine(browser, tmp_path) -> Scatter:
    page = page_of(NINE, [i % 3 for i in range(9)], ["a", "b", "c"], points=GRID)
    return Scatter(browser, tmp_path, page)


def test_the_pointer_shows_a_record_in_each_map(nine):
    for number in (0, 1):
        for record in (0, 4, 8):
            nine.point_at(record, number=number)
            name = "abc"[record % 3]
            assert nine.card() == [NINE[record], name, f"reconstruction_loss {record}"]
            assert nine.brightness() == record
    nine.input("dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert nine.card() is None
    assert nine.browser.complaints() == []


def test_a_click_keeps_a_record_until_escape(nine):
    x, y = nine.place(4)
    for kind in ("mousePressed", "mouseReleased"):
        nine.input("dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    nine.point_at(8)
    nine.input("dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert nine.card()[0] == NINE[4]
    nine.press("Escape")
    assert nine.card() is None


def test_keys_walk_from_record_to_record(nine):
    nine.browser.run("document.querySelectorAll('.legend button')[4].focus()")  # The last one.
    nine.press("Tab")
    assert nine.card()[0] == NINE[4]
    nine.press("ArrowRight")
    assert nine.card()[0] == NINE[5]
    nine.press("ArrowRight")  # There is none.
    nine.press("ArrowUp")
    nine.press("ArrowLeft")
    assert nine.card()[0] == NINE[7]
    nine.press("Tab")
    assert nine.card()[0] == NINE[4]  # In the next map.


def test_the_legend_switches_classes(nine):
    assert nine.pressed() == ["a", "b", "c"]
    nine.click("b")
    assert nine.pressed() == ["a", "c"]
    nine.point_at(4)
    assert nine.card() is None
    nine.point_at(3)
    assert nine.card()[1] == "a"
    nine.click("none")
    assert nine.pressed() == [] and nine.card() is None
    nine.point_at(3)
    assert nine.card() is None
    nine.click("c")
    nine.point_at(5)
    assert nine.pressed() == ["c"] and nine.card()[1] == "c"
    nine.click("all")
    assert nine.pressed() == ["a", "b", "c"]


def test_a_hundred_classes_on_a_phone(tmp_path):
    needs_browser()
    phone = Browser(width=360, height=740, dark=True)
    try:
        phone.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        names = [f"a class with a long name, {i}" for i in range(100)]
        ids = [f"train/{'folder ' * 9}/{i}.png" for i in range(200)]
        points = np.random.default_rng(0).normal(size=(200, 2))
        page = page_of(ids, np.arange(200) % 100, names, points=points)
        scattered = Scatter(phone, tmp_path, page)
        assert phone.run("return document.documentElement.scrollWidth") <= 360
        assert len(scattered.pressed()) == 100
        assert phone.run("return document.querySelector('.legend').clientHeight") < 370
        for record in (points[:, 0].argmin(), points[:, 0].argmax()):
            x, y = scattered.place(record)
            touches = [{"x": x, "y": y}]
            scattered.input("dispatchTouchEvent", type="touchStart", touchPoints=touches)
            scattered.input("dispatchTouchEvent", type="touchEnd", touchPoints=[])
            assert scattered.card()[0] == ids[record]
            left, right = phone.run(
                "const box = document.querySelector('.card:not([hidden])').getBoundingClientRect();"
                "return [box.left, box.right]"
            )
            assert 0 <= left < right <= 360
        looks = phone.run(
            "return [...document.querySelectorAll('.legend polygon')]"
            ".map(p => p.getAttribute('fill') + p.getAttribute('points'))"
        )
        assert len(set(looks)) == 70
    finally:
        phone.close()


def test_ids_and_names_from_outside_are_text(browser, tmp_path):
    labels = [i % len(HOSTILE_NAMES) for i in range(len(HOSTILE_IDS))]
    page = page_of(HOSTILE_IDS, labels, HOSTILE_NAMES)
    scattered = Scatter(browser, tmp_path, page)
    assert scattered.pressed() == HOSTILE_NAMES
    shown = set()
    for record in range(len(HOSTILE_IDS)):
        scattered.point_at(record)
        shown.add(scattered.card()[0])
    assert shown <= set(HOSTILE_IDS) and {*HOSTILE_IDS[-4:]} <= shown
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.querySelectorAll('script, [onerror], b > *').length") == 2
    assert browser.complaints() == []
    path = tmp_path / "report.html"
    wanted = absence.Wanted(frozenset(HOSTILE_IDS), frozenset())
    [finding] = absence.find(str(tmp_path), wanted)
    assert (finding.path, finding.num_records) == (str(path), len(HOSTILE_IDS))


def test_the_policy_blocks_every_other_script(browser, tmp_path):
    page = page_of(NINE, [0] * 9, ["a"], points=GRID)
    injected = f"{ATTACK}<script>window.hacked=1</script>".encode()
    Scatter(browser, tmp_path, page.replace(b"<h1>", injected + b"<h1>", 1))
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in message for message in browser.complaints())
    assert browser.run(IS_STATIC) is False  # The page's own script ran.
    # A changed script does not run, and the page shows its figures.
    Scatter(browser, tmp_path, page.replace(b"const REACH = 24", b"const REACH = 25", 1))
    assert browser.run(IS_STATIC) is True
    assert any("Content Security Policy" in message for message in browser.complaints())
    assert_figures_are_shown(browser, 2)


def assert_figures_are_shown(browser: Browser, count: int) -> None:
    widths = browser.run(
        "return [...document.querySelectorAll('figure[data-map] img')].map(i => i.clientWidth)"
    )
    assert len(widths) == count and min(widths) > 200
    assert browser.run("return document.querySelector('.legend').clientHeight") == 0


def test_without_scripts_the_figures_are_shown(browser, tmp_path):
    disable = "Emulation.setScriptExecutionDisabled"
    browser.driver.execute_cdp_cmd(disable, {"value": True})
    try:
        scattered = Scatter(browser, tmp_path, page_of(NINE, [0] * 9, ["a"], points=GRID))
        assert scattered.browser.complaints() == []
    finally:
        browser.driver.execute_cdp_cmd(disable, {"value": False})
    assert_figures_are_shown(browser, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_exact_if_they_are_small_and_bounded_if_not(channels):
    """2,000 pictures of noise are the worst case."""
    count, generator = scatter.MAX_POINTS + 10, np.random.default_rng(0)
    labels, points = np.zeros(count, np.int64), generator.normal(size=(count, 2))
    latent_map = Map("pca", "PCA", points, labels, ("x", "y"))
    rows = Rows([f"{i}" for i in range(count)], labels, [""] * count, {})
    for noise, kind in ((1, "png"), (256, "jpeg")):
        sprite = projector.Sprite(range(2_000), (64, 48, channels), max_side=scatter.MAX_SIDE)
        pixels = generator.integers(0, noise, sprite.pixels.shape, np.uint8)
        sprite.pixels[:] = pixels
        page = scatter.data([latent_map], rows, class_name=str, sprite=sprite)
        assert len(page) < 1_900_000
        [data] = re.findall(f'"url":"data:image/{kind};base64,([^"]*)"', page)
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert np.asarray(image).shape[:2] == pixels.shape[:2] == (45 * 32, 45 * 24)
        assert f'"{scatter.MAX_POINTS - 1}"' in page and f'"{scatter.MAX_POINTS}"' not in page


def test_a_picture_that_is_missing_and_equal_coordinates():
    rows = Rows(["1", "2"], np.array([3, 5]), [""] * 2, {"reconstruction_loss": np.ones(2)})
    sprite = projector.Sprite(["1", "2"], (12, 8, 1))
    sprite.add("1", np.ones((12, 8, 1), np.uint8))
    latent_map = Map("pca", "PCA", np.array([[1.0, 0], [1, 2]]), rows.labels, ("x", ""))
    page = scatter.data([latent_map], rows, class_name=str, sprite=sprite)
    assert '"missing":[1]' in page and '"names":["3","5"]' in page
    assert '"points":[5000,283,5000,9717]' in page
