"""The page of images before and after: what is on it, and what it does in a browser, where there is one."""

import base64
import io
import json
import re

import numpy as np
import pytest
from helpers.images import pixels
from PIL import Image

from seemore_fast.errors import ImageError
from seemore_fast.upscale import compare


def images_of(page):
    """Return [(class, image)] of a page."""
    found = re.findall(r'<img class="(\w+)" alt="[^"]*" src="data:image/webp;base64,([^"]+)">', page.read_text())
    return [(name, Image.open(io.BytesIO(base64.b64decode(data)))) for name, data in found]


def test_the_page_shows_each_image_before_and_after(photos, upscale):
    Image.fromarray(pixels(4)).save(photos / "a <b> & c.png")
    page = photos / "page.html"
    status, printed = upscale(photos / "photo.png", photos / "a <b> & c.png", "-o", photos / "out/", "--compare", page)
    assert status == 0 and f"comparison page: {page}" in printed
    shown = images_of(page)
    assert [name for name, _ in shown] == 2 * ["before", "after"]
    assert {image.size for _, image in shown} == {(40, 32)}
    Image.open(photos / "out" / "photo_x2.png").save(photos / "same.webp", quality=compare.QUALITY)
    np.testing.assert_array_equal(shown[1][1], Image.open(photos / "same.webp"))
    text = page.read_text()
    assert "a &lt;b&gt; &amp; c.png" in text and "<b>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http:" not in text and "https:" not in text


def test_what_was_there_already_is_shown_and_a_failure_is_not(photos, upscale):
    (photos / "text.png").write_text("hello")
    arguments = photos / "photo.png", photos / "text.png", "-o", photos / "out/"
    assert upscale(*arguments)[0] == 1
    status, printed = upscale(*arguments, "--compare", photos / "page.html", "--json")
    assert status == 1
    assert len(images_of(photos / "page.html")) == 2
    assert json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["page"] == str(photos / "page.html")


def test_of_a_large_image_the_part_with_most_detail_is_shown(tmp_path):
    image = np.full((800, 1500), 128, np.uint8)
    image[500:700, 1000:1400] = np.random.default_rng(0).integers(0, 256, (200, 400))
    Image.fromarray(image).save(tmp_path / "small.png")
    Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(tmp_path / "large.png")
    assert not compare.write_page(tmp_path / "page.html", [(tmp_path / "small.png", tmp_path / "large.png")])
    shown = dict(images_of(tmp_path / "page.html"))
    for image in shown.values():
        assert image.size == (compare.MAX_WIDTH, compare.MAX_HEIGHT)
        noisy = np.abs(np.diff(np.asarray(image.convert("L"), int), axis=0)) > 8
        assert noisy.mean() > 0.2  # 400 of 720 rows and 800 of 960 columns at best
    assert "960x720 of them shown" in (tmp_path / "page.html").read_text()
    before, after = (np.asarray(shown[name].convert("L"), float) for name in ("before", "after"))
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.8  # the same part


def test_many_images_and_files_that_are_gone(photos, monkeypatch):
    monkeypatch.setattr(compare, "MAX_IMAGES", 2)
    pairs = [(photos / "photo.png", photos / name) for name in ("photo.png", "none.png", "c.png", "d.png")]
    calls = []
    (warning,) = compare.write_page(photos / "page.html", pairs, done=lambda: calls.append(1))
    assert warning == f"not on the page: {photos / 'none.png'}: does not exist"
    assert len(images_of(photos / "page.html")) == 2 and len(calls) == 2
    assert "And 2 more" in (photos / "page.html").read_text()


def test_deep_images_are_shown_in_8_bits(tmp_path):
    pytest.importorskip("pyvips")
    from seemore_fast.io.images import Picture, write_image

    write_image(Picture(np.full((20, 30, 3), 32896, np.uint16)), tmp_path / "deep.png")
    compare.write_page(tmp_path / "page.html", [(tmp_path / "deep.png", tmp_path / "deep.png")])
    for _, image in images_of(tmp_path / "page.html"):
        assert np.abs(np.asarray(image.convert("RGB"), int) - 128).max() <= 2


def test_pages_that_cannot_be_written(photos, upscale):
    for page, message in {"page.png": "expected a name that ends in .html", "none/a.html": "does not exist"}.items():
        status, printed = upscale(photos / "photo.png", "-o", photos / "big.png", "--compare", photos / page)
        assert status == 2 and message in printed
        assert not (photos / "big.png").exists()
    with pytest.raises(ImageError, match=r"a\.html: cannot be written: No such file"):
        compare.write_page(photos / "none" / "a.html", [])


@pytest.mark.parametrize("width", [420, 1280])
def test_the_slider_in_a_browser(browser, tmp_path, width):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "small.png")
    Image.new("RGB", (600, 400), "blue").save(tmp_path / "large.png")
    compare.write_page(tmp_path / "page.html", 2 * [(tmp_path / "small.png", tmp_path / "large.png")])
    browser.open(tmp_path / "page.html", width, 800)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    left, top, wide, high = browser.evaluate(
        "(box => [box.x, box.y, box.width, box.height])(document.querySelector('.pair').getBoundingClientRect())"
    )
    assert wide == pytest.approx(min(600, width - 32), abs=1) and high == pytest.approx(wide * 2 / 3, abs=1)

    def boundary():
        """Return where the line is, as a share of the width, on a row of the screenshot below the labels."""
        line = np.asarray(browser.screenshot().convert("RGB"), int)[round(top + high / 2)]
        line = line[round(left) : round(left + wide)]  # beside it is the frame that tells what has the focus
        is_red = (line[:, 0] > 200) & (line[:, 2] < 60)
        is_blue = (line[:, 2] > 200) & (line[:, 0] < 60)
        assert not is_blue.any() or not is_red.any() or is_red.nonzero()[0].max() < is_blue.nonzero()[0].min()
        return is_red.sum() / (is_red.sum() + is_blue.sum())

    assert boundary() == pytest.approx(0.5, abs=0.02)
    x, y = left + 0.8 * wide, top + high / 2
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert boundary() == pytest.approx(0.8, abs=0.02)
    for kind in 10 * ["keyDown", "keyUp"]:  # a press of the mouse gave it the focus
        browser.send("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    assert boundary() == pytest.approx(0.75, abs=0.02)
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left + 0.75 * wide, "y": y}])
    for share in (0.6, 0.4, 0.2):
        browser.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": left + share * wide, "y": y}])
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert boundary() == pytest.approx(0.2, abs=0.03)
    values = browser.evaluate("[...document.querySelectorAll('input')].map(input => +input.value)")
    assert values == [pytest.approx(20, abs=3), 50]  # each has its own
    assert not browser.errors()
