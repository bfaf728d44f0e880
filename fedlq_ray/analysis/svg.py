"""Converts a matplotlib figure to inline SVG: text stays text, and colours are the page's own, light or dark."""

import io
import re
from collections.abc import Mapping
from html import escape

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fedlq_ray.plots import COLOURS, MUTED, STEPS

INK = "#000000"  # matplotlib's for text and axes
PAPER = "#ffffff"  # behind names in a figure, and between bars


def palette() -> Mapping[str, str]:
    """Maps each colour of a figure, in lower case, to the page's variable for it."""
    runs = {colour: f"run-{index}" for index, colour in enumerate(COLOURS)}
    names = {**runs, **{colour: step for step, colour in STEPS.items()}, MUTED: "muted", INK: "ink", PAPER: "card"}
    return {colour.lower(): f"var(--{name})" for colour, name in names.items()}


def inline(figure: Figure, name: str, alt: str, *, themed: bool = True) -> str:
    """Returns the figure as an svg element that scales with the page, and closes the figure.

    Args:
        name: unique in the page; it makes the SVG's internal ids distinct.
        alt: description of the figure for readers that cannot see it.
        themed: whether to use the page's colour variables (report.css) instead of matplotlib's own colours.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # nothing refers to groups, and every figure has the same names
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # in tags, not in text
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib writes one
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">', text, count=1)
    text = re.sub(r"<style.*?</style>|; font-family: [^;\"]*", "", text, flags=re.DOTALL)  # the page has its own
    for colour, variable in palette().items() if themed else ():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
