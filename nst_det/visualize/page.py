"""The page of ``nst-det look``: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import cv2
import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from torch import Tensor

from nst_det.report.svg import INK, STYLE, method_color, to_svg
from nst_det.visualize.measures import FeatureMaps, Level, Plane

# sides of pictures on the page, pixels
IMAGE_SIDE, MAP_SIDE = 224, 72


def render(
    networks: Sequence[FeatureMaps],
    levels: Sequence[Level],
    cka: Sequence[tuple[Tensor, Tensor]],
    images: Tensor,
    names: Sequence[str],
) -> str:
    """Return the whole page.

    Args:
        networks: the teacher first.
        levels: measured, in the order of the networks.
        cka: of each student with the teacher, from :func:`~nst_det.visualize.measures.cka_of_levels`.
        images: (I, 3, S, S) uint8, RGB; the maps of the first are shown.
        names: of the images.
    """
    loader = ChoiceLoader([PackageLoader("nst_det.visualize"), PackageLoader("nst_det.report")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    students = networks[1:]
    return environment.get_template("look.html").render(
        style=Markup(loader.get_source(environment, "style.css")[0]),
        teacher=networks[0],
        students=students,
        levels=levels,
        image=(names[0], _png(images[0].permute(1, 2, 0).numpy(), IMAGE_SIDE)),
        count=len(images),
        bars=mmd_bars(students, levels),
        maps={level.name: _shown_maps(networks, level) for level in levels},
        planes={
            level.name: [
                (plane.title, [scatter(networks, plane, student, level.name) for student in range(1, len(networks))])
                for plane in level.planes
            ]
            for level in levels
        },
        cka=[
            (student.name, cka_matrix(levels, values, few, student.name, f"cka{number}"))
            for number, (student, (values, few)) in enumerate(zip(students, cka))
        ],
    )


def _shown_maps(networks: Sequence[FeatureMaps], level: Level) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return by network the shown channels on the first image: picture, what it shows, and a note."""
    rows = []
    for network, channels, cosines in zip(networks, level.shown.tolist(), level.cosine.tolist()):
        cells = []
        for channel, cosine in zip(channels, cosines):
            near = "" if network is networks[0] else f"{cosine:.2f}"
            text = f"{network.name}, {level.name}, channel {channel}" + (f", cosine {near}" if near else "")
            note = f"{channel} · {near}" if near else f"{channel}"
            cells.append((_heat(network.maps[level.name][0, channel].numpy()), text, note))
        rows.append((network.name, cells))
    return rows


def _heat(map_: np.ndarray) -> str:
    """Return a map (H, W) as a picture, dark where it is lowest."""
    low, high = float(map_.min()), float(map_.max())
    scaled = (map_ - low) / (high - low) if high > low else np.zeros_like(map_)
    return _png((255 * colormaps["viridis"](scaled)[:, :, :3]).round().astype(np.uint8), MAP_SIDE)


def _png(pixels: np.ndarray, side: int) -> str:
    """Return (H, W, 3) RGB pixels as a data URI."""
    enlarged = cv2.resize(np.ascontiguousarray(pixels), (side, side), interpolation=cv2.INTER_NEAREST)
    done, data = cv2.imencode(".png", cv2.cvtColor(enlarged, cv2.COLOR_RGB2BGR))
    assert done, "OpenCV could not encode a picture"
    return f"data:image/png;base64,{base64.b64encode(data.tobytes()).decode()}"


def mmd_bars(students: Sequence[FeatureMaps], levels: Sequence[Level]) -> Markup:
    """Draw MMD^2 with the polynomial kernel by level, a bar a student."""
    values = {student.name: [level.mmd[number]["poly"] for level in levels] for number, student in enumerate(students)}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.7, 2.6))
        axes = figure.add_subplot()
        width = 0.8 / len(students)
        for number, (name, heights) in enumerate(values.items()):
            places = np.arange(len(levels)) + (number - (len(students) - 1) / 2) * width
            axes.bar(places, heights, 0.9 * width, color=method_color(number + 1), label=name)
        axes.set_xticks(range(len(levels)), [level.name for level in levels])
        axes.set_ylabel("MMD², polynomial kernel")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        words = "; ".join(
            f"{name}: " + ", ".join(f"{level.name} {height:.3g}" for level, height in zip(levels, heights))
            for name, heights in values.items()
        )
        return Markup(to_svg(figure, "mmd", f"MMD of the channel maps to the teacher's by level. {words}"))


def scatter(networks: Sequence[FeatureMaps], plane: Plane, student: int, level: str) -> Markup:
    """Draw the channels of the teacher and of one student on a plane whose axes all networks share."""
    everything = np.concatenate([points.numpy() for points in plane.points])
    low, high = everything.min(0), everything.max(0)
    margin = 0.06 * (high - low) + 1e-9
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5, 3.0))
        axes = figure.add_subplot()
        for index, mark in ((0, "o"), (student, "^")):
            x, y = plane.points[index].numpy().T
            axes.plot(x, y, mark, ms=3.2, mew=0, alpha=0.65, color=method_color(index), label=networks[index].name)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        label = f"Channels of {networks[0].name} and {networks[student].name} at {level}, a point each"
        return Markup(to_svg(figure, f"{plane.method}-{level}-{student}", label))


def cka_matrix(levels: Sequence[Level], values: Tensor, few: Tensor, student: str, name: str) -> Markup:
    """Draw (L, L) linear CKA of a student's levels (rows) with the teacher's; a star where positions are few."""
    names = [level.name for level in levels]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.9))
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis")
        for row, column in np.ndindex(*values.shape):
            text = f"{values[row, column]:.2f}" + ("*" if few[row, column] else "")
            ink = "#000000" if values[row, column] > 0.6 else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("teacher")
        axes.set_ylabel("student")
        words = ", ".join(f"{level} {value:.2f}" for level, value in zip(names, values.diagonal().tolist()))
        return Markup(to_svg(figure, name, f"Linear CKA of {student} with the teacher; at equal levels {words}"))
