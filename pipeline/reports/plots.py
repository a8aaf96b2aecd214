"""Plots as PNG by matplotlib, each in a light and a dark version."""

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.formats.tf_example import UNLABELLED
from pipeline.reports.latent_space import Map

_DPI = 150
# Colours of background, text and lines, light and dark; the same as in formats/html.py.
_THEMES = (("#ffffff", "#1f2328", "#d8dee4"), ("#0d1117", "#e6edf3", "#30363d"))
# The most classes in a legend; more classes get a colour bar.
_MAX_LEGEND = 20


class Plot(NamedTuple):
    """One plot as PNG, in two themes."""

    light: bytes
    dark: bytes


def _in_both_themes(draw: Callable[..., None]) -> Callable[..., Plot]:
    """Decorates a function that draws on a figure: the result draws twice and returns a Plot."""

    @functools.wraps(draw)
    def plot(*args: Any, size: tuple[float, float] = (4.8, 3.9)) -> Plot:
        import matplotlib
        from matplotlib import figure

        versions = []
        for background, text, line in _THEMES:
            settings = {
                "figure.facecolor": background,
                "axes.facecolor": background,
                "text.color": text,
                "axes.labelcolor": text,
                "xtick.color": text,
                "ytick.color": text,
                "axes.edgecolor": line,
                "grid.color": line,
                "legend.edgecolor": line,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "font.size": 10,
            }
            with matplotlib.rc_context(settings), warnings.catch_warnings():
                # Characters that the font lacks become boxes; the page has the class names.
                warnings.filterwarnings("ignore", "Glyph .* missing from font")
                canvas = figure.Figure(figsize=size, dpi=_DPI, layout="constrained")
                draw(canvas, *args)
                buffer = io.BytesIO()
                # Without matplotlib's version in the metadata, equal plots have equal bytes.
                canvas.savefig(buffer, format="png", metadata={"Software": None})
            versions.append(buffer.getvalue())
        return Plot(*versions)

    return plot


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:count])
    if count <= _MAX_LEGEND:
        return list(matplotlib.colormaps["tab20"].colors[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


@_in_both_themes
def scatter(canvas: Any, latent_map: Map, class_names: Mapping[int, str]) -> None:
    """Points coloured by class."""
    import matplotlib

    axes = canvas.add_subplot()
    classes = np.unique(latent_map.labels)
    # The more points, the smaller they are, but they stay visible.
    area = float(np.clip(12_000 / len(latent_map.labels), 3, 24))
    for label, colour in zip(classes.tolist(), _colours(len(classes)), strict=True):
        points = latent_map.points[latent_map.labels == label]
        name = _plain(class_names.get(label, str(label)))
        axes.scatter(*points.T, s=area, color=colour, label=name, linewidths=0, alpha=0.75)
    if classes.tolist() == [UNLABELLED]:
        pass
    elif len(classes) <= _MAX_LEGEND:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        for handle in legend.legend_handles:
            handle.set_sizes([24])
            handle.set_alpha(1)
    else:
        colours = matplotlib.colors.ListedColormap(_colours(len(classes)))
        scale = matplotlib.colors.Normalize(int(classes[0]), int(classes[-1]))
        bar = canvas.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=axes, label="label")
        bar.outline.set_visible(False)
    axes.set_xlabel(latent_map.axes[0])
    axes.set_ylabel(latent_map.axes[1])
    if not any(latent_map.axes):
        axes.set_xticks([])
        axes.set_yticks([])


def _plain(text: str, max_length: int = 24) -> str:
    """Escapes a class name for a legend: "$" starts a formula, a leading "_" hides the entry."""
    text = "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")
    text = text if len(text) <= max_length else f"{text[: max_length - 1]}…"
    return f" {text}" if text.startswith("_") else text


@_in_both_themes
def curves(canvas: Any, name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One metric over the epochs, a line for each split: split -> [(epoch, value)]."""
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


@_in_both_themes
def bars(canvas: Any, values: Sequence[float], is_active: Sequence[bool]) -> None:
    """The kl of each latent, in another colour if the latent is inactive."""
    axes = canvas.add_subplot()
    latents = np.arange(len(values))
    active = np.asarray(is_active)
    active_colour, inactive_colour = _colours(2)
    bars_by_state = ((active, active_colour, "active"), (~active, inactive_colour, "inactive"))
    for mask, colour, name in bars_by_state:
        if mask.any():
            axes.bar(latents[mask], np.asarray(values)[mask], color=colour, label=name)
    axes.set_xlabel("latent")
    axes.set_ylabel("kl, nats per image")
    axes.set_xticks(latents[:: -(-len(latents) // 16)])
    if not active.all():
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
