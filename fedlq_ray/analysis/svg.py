"""A matplotlib figure as SVG to stand in a page: text stays text, and colours are the page's own, light or dark."""

import io
import re
from collections.abc import Mapping
from html import escape

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fedlq_ray.plots import COLOURS, MUTED, STEPS

INK = "#000000"  # matplotlib's for text and axes


def palette() -> Mapping[str, str]:
    """What stands in a figure, in lower case, and the page's variable for it."""
    runs = {colour: f"run-{index}" for index, colour in enumerate(COLOURS)}
    names = {**runs, **{colour: step for step, colour in STEPS.items()}, MUTED: "muted", INK: "ink"}
    return {colour.lower(): f"var(--{name})" for colour, name in names.items()}


def inline(figure: Figure, name: str, alt: str, *, themed: bool = True) -> str:
    """The figure as an svg element that scales with the page; it is closed.

    Args:
        name: distinct in the page, for the ids of what the SVG refers to.
        alt: what is to be seen, for who does not see it.
        themed: in the variables of the page (report.css), else in matplotlib's own colours.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # nothing refers to groups, and every figure has the same names
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # of drawing, not of text
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib writes one
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">', text, count=1)
    text = re.sub(r"<style.*?</style>|; font-family: [^;\"]*", "", text, flags=re.DOTALL)  # the page has its own
    for colour, variable in palette().items() if themed else ():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
