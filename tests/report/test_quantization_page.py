"""The quantization report: complete in itself, and readable on screens of all kinds."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from effnet_quant.quantization.ptq.sensitivity import LayerSensitivity, SensitivityTable
from effnet_quant.report.charts import bar_chart, histogram
from effnet_quant.report.quantization_page import Layer, Page, Values, Variant, quantization_page

VALUES = Values("int8, per tensor", (5, 40, 100, 60, 3), (-2.0, 3.0), (-1.5, 1.5), 0.03, 31.25)


def page(**changes):
    rows = tuple(LayerSensitivity(f"blocks.{n}.conv", "conv", 10.0 + n, 99.0, 0.5) for n in range(12))
    parts = {
        "title": "net <b>: report",
        "facts": [("runtime", "onnxruntime")],
        "score": "top-1 %",
        "judged_on": "On the validation images.",
        "summary": [
            Variant("float", 89.5, 100.0, 20.25, 18_600_000),
            Variant("simulation", 88.75, None, None, None),
            Variant("engine", 88.5, 97.25, 9.5, 4_900_000),
        ],
        "sensitivity": SensitivityTable(rows, "top-1, %", 200, 89.5, 7.0),
        "layers": [Layer(f"blocks.{n}.conv", VALUES, None if n == 3 else VALUES) for n in range(12)],
        "in_float": [("blocks.3.conv (conv): input", "the quantization spec says float")],
        "tried": [("step", "top-1 %", "note"), ("minmax", "87.00", ""), ("reconstruct", "88.50", "best")],
        "ended": "The target is met.",
    }
    return quantization_page(Page(**{**parts, **changes}))


class Reader(HTMLParser):
    """Checks that tags close, and collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_page_says_what_it_was_given():
    words = read(page()).text
    for expected in (
        "89.50",
        "97.25",
        "9.50",
        "18.60",
        "blocks.11.conv",
        "31.2 dB",
        "3 % clipped",
        "reconstruct",
        "best",
    ):
        assert any(expected in word for word in words), expected
    assert "net <b>: report" in words
    assert "activations: float" in words
    assert "Not measured: why" in read(page(sensitivity="Not measured: why")).text
    assert "What was tried" not in read(page(tried=[])).text


def test_the_page_loads_nothing():
    html = page()
    names = {name for name, _ in read(html).attributes}
    assert not names & {"src", "href", "srcset", "data", "xlink:href", "onload"}
    assert not re.search(r"https?:|url\(|@import|<script", html)
    assert "prefers-color-scheme: dark" in html


def test_clipped_values_have_their_own_colour():
    picture = histogram((5, 40, 100, 60, 3), (-2.0, 3.0), (-1.5, 1.2), "weights")
    bins = {colour: path.count("M") for colour, path in re.findall(r'<path class="(\w+)" d="([^"]+)"', picture)}
    assert bins == {"first": 3, "second": 2}  # the middles are -1.5, -0.5, 0.5, 1.5 and 2.5
    edges = re.findall(r'class="edge" x1="([\d.]+)"', picture)
    assert edges == ["10.0", "64.0"]


def test_bars_are_as_long_as_their_values():
    picture = bar_chart([("a", 10.0, "10"), ("b", 40.0, "40"), ("c", float("inf"), "none")], "title", "dB")
    assert [float(width) for width in re.findall(r'<rect class="first"[^>]* width="([\d.]+)"', picture)] == [
        105,
        420,
        420,
    ]


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize(("scheme", "paper", "bar"), [(1, "#ffffff", "#0072B2"), (0, "#15181c", "#56B4E9")])
def test_a_browser_shows_it(tmp_path, width, scheme, paper, bar):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no headless browser: apt-get install chromium")
    (tmp_path / "index.html").write_text(page())
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1400",
            f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={picture}", (tmp_path / "index.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (1400, width)

    def share(colour, part=pixels):
        wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
        return np.mean(np.all(part == wanted, axis=2))

    assert share(paper) > 0.5
    assert share(bar) > 0.01
    assert share(paper, pixels[:, -10:]) == 1.0  # nothing runs over the edge
