"""Plots as PNG, each for a light and for a dark page, by matplotlib."""

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.reports.latent_space import Map

_DPI = 150
# Paper and ink of the pages, light and dark; see formats/html.py.
_LOOKS = (("#ffffff", "#1f2328", "#d8dee4"), ("#0d1117", "#e6edf3", "#30363d"))
# Classes that a legend has room for; more share a colour bar.
_MAX_LEGEND = 20


class Plot(NamedTuple):
    """One plot in both looks."""

    light: bytes
    dark: bytes


def _in_both_looks(draw: Callable[..., None]) -> Callable[..., Plot]:
    """Makes a function that draws on a figure into one that returns a Plot."""

    @functools.wraps(draw)
    def drawn(*args: Any, size: tuple[float, float] = (4.8, 3.9)) -> Plot:
        import matplotlib
        from matplotlib import figure

        found = []
        for paper, ink, line in _LOOKS:
            look = {
                "figure.facecolor": paper,
                "axes.facecolor": paper,
                "text.color": ink,
                "axes.labelcolor": ink,
                "xtick.color": ink,
                "ytick.color": ink,
                "axes.edgecolor": line,
                "grid.color": line,
                "legend.edgecolor": line,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "font.size": 10,
            }
            with matplotlib.rc_context(look), warnings.catch_warnings():
                # A script that its font lacks is boxes in a legend; the page has the names.
                warnings.filterwarnings("ignore", "Glyph .* missing from font")
                canvas = figure.Figure(figsize=size, dpi=_DPI, layout="constrained")
                draw(canvas, *args)
                buffer = io.BytesIO()
                # No name of a version, so that equal plots are equal bytes.
                canvas.savefig(buffer, format="png", metadata={"Software": None})
            found.append(buffer.getvalue())
        return Plot(*found)

    return drawn


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:count])
    if count <= _MAX_LEGEND:
        return list(matplotlib.colormaps["tab20"].colors[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


@_in_both_looks
def scatter(canvas: Any, found: Map, names: Mapping[int, str]) -> None:
    """Points coloured by class; `names` are the classes' as they are shown."""
    import matplotlib

    axes = canvas.add_subplot()
    classes = np.unique(found.labels)
    # Smaller where they are many, and always to be seen.
    area = float(np.clip(12_000 / len(found.labels), 3, 24))
    for label, colour in zip(classes.tolist(), _colours(len(classes)), strict=True):
        here = found.points[found.labels == label]
        name = _plain(names.get(label, str(label)))
        axes.scatter(*here.T, s=area, color=colour, label=name, linewidths=0, alpha=0.75)
    if len(classes) <= _MAX_LEGEND:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        for handle in legend.legend_handles:
            handle.set_sizes([24])
            handle.set_alpha(1)
    else:
        colours = matplotlib.colors.ListedColormap(_colours(len(classes)))
        scale = matplotlib.colors.Normalize(int(classes[0]), int(classes[-1]))
        bar = canvas.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=axes, label="label")
        bar.outline.set_visible(False)
    axes.set_xlabel(found.axes[0])
    axes.set_ylabel(found.axes[1])
    if not any(found.axes):
        axes.set_xticks([])
        axes.set_yticks([])


def _plain(text: str, longest: int = 24) -> str:
    """A name from outside for a legend: no formulas, no leading underscore that hides it."""
    text = "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return f" {text}" if text.startswith("_") else text


@_in_both_looks
def curves(canvas: Any, name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One number over the epochs, a line a split: split -> [(epoch, value)]."""
    axes = canvas.add_subplot()
    colours = dict(zip(("train", "validation", "test"), _colours(3), strict=True))
    for split, points in lines.items():
        marker = "o" if len(points) < 30 else None
        colour = colours.get(split)
        axes.plot(
            *zip(*points, strict=True), marker=marker, markersize=4, label=split, color=colour
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{name}, nats per image")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", linewidth=0.6)
    axes.legend(frameon=False)


@_in_both_looks
def bars(canvas: Any, values: Sequence[float], is_active: Sequence[bool]) -> None:
    """A bar a latent: its kl, in another colour where the latent is not in use."""
    axes = canvas.add_subplot()
    places = np.arange(len(values))
    active = np.asarray(is_active)
    in_use, idle = _colours(2)
    for chosen, colour, name in ((active, in_use, "in use"), (~active, idle, "not in use")):
        if chosen.any():
            axes.bar(places[chosen], np.asarray(values)[chosen], color=colour, label=name)
    axes.set_xlabel("latent")
    axes.set_ylabel("kl, nats per image")
    axes.set_xticks(places[:: -(-len(places) // 16)])
    if not active.all():
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
