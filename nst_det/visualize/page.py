"""The page of ``nst-det look``: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from nst_det.report.svg import INK, STYLE, method_color, to_svg
from nst_det.visualize.measures import Cka, Level, Looked, Plane

# sides of pictures on the page, pixels
IMAGE_SIDE, MAP_SIDE = 224, 72
TEACHER_MARK, STUDENT_MARK = "o", "^"


@dataclass(frozen=True)
class Heat:
    """One channel's map as a picture; ``text`` says whose and how near it is."""

    data: str
    text: str
    note: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one level."""

    level: Level
    rows: list[tuple[str, list[Heat]]]
    planes: list[tuple[str, list[Markup]]]


def render(
    networks: Sequence[Looked], levels: Sequence[Level], cka: Sequence[Cka], images: Tensor, names: Sequence[str]
) -> str:
    """The whole page.

    Args:
        networks: the teacher first.
        levels: measured, in the order of the networks.
        cka: of each student with the teacher.
        images: (I, 3, S, S) uint8, RGB; the maps of the first are shown.
        names: of the images.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("nst_det.visualize"), PackageLoader("nst_det.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style = environment.loader.get_source(environment, "style.css")[0]
    students = networks[1:]
    return environment.get_template("look.html").render(
        style=Markup(style),
        teacher=networks[0],
        students=students,
        levels=levels,
        images=[(name, _png(image.permute(1, 2, 0).numpy(), IMAGE_SIDE)) for name, image in zip(names[:1], images)],
        count=len(images),
        bars=Markup(mmd_bars(students, levels)),
        sections=[_section(networks, level, number) for number, level in enumerate(levels)],
        cka=[
            (student.name, Markup(cka_matrix([level.name for level in levels], one, student.name, number)))
            for number, (student, one) in enumerate(zip(students, cka))
        ],
    )


def _section(networks: Sequence[Looked], level: Level, number: int) -> Section:
    rows = []
    for network, channels, cosines in zip(networks, level.shown.tolist(), level.cosine.tolist()):
        maps = network.maps[level.name][0]
        is_teacher = network is networks[0]
        heats = []
        for channel, cosine in zip(channels, cosines):
            note = "" if is_teacher else f"{cosine:.2f}"
            text = f"{network.name}, {level.name}, channel {channel}" + (f", cosine {note}" if note else "")
            heats.append(Heat(_heat(maps[channel].numpy()), text, f"{channel}" + (f" · {note}" if note else "")))
        rows.append((network.name, heats))
    planes = []
    for word, plane in (("PCA", level.pca), ("t-SNE", level.tsne)):
        if plane is not None:
            share = "" if plane.share is None else f": {plane.share:.0%} of the variance"
            panels = [
                Markup(_scatter(networks, plane, student, f"{word.replace('-', '')}{number}-{student}", level.name))
                for student in range(1, len(networks))
            ]
            planes.append((f"{word}{share}", panels))
    return Section(level, rows, planes)


def _heat(map_: np.ndarray) -> str:
    """A map (H, W) as a data URI, dark where it is lowest."""
    import matplotlib

    low, high = float(map_.min()), float(map_.max())
    scaled = (map_ - low) / (high - low) if high > low else np.zeros_like(map_)
    colors = matplotlib.colormaps["viridis"](scaled)[:, :, :3]
    return _png((255 * colors).round().astype(np.uint8), MAP_SIDE)


def _png(pixels: np.ndarray, side: int) -> str:
    enlarged = cv2.resize(np.ascontiguousarray(pixels), (side, side), interpolation=cv2.INTER_NEAREST)
    done, data = cv2.imencode(".png", cv2.cvtColor(enlarged, cv2.COLOR_RGB2BGR))
    assert done, "OpenCV could not encode a picture"
    return f"data:image/png;base64,{base64.b64encode(data.tobytes()).decode()}"


def mmd_bars(students: Sequence[Looked], levels: Sequence[Level]) -> str:
    """MMD^2 with the polynomial kernel by level, a bar a student, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.7, 2.6))
        axes = figure.add_subplot()
        width = 0.8 / len(students)
        for number, student in enumerate(students):
            places = np.arange(len(levels)) + (number - (len(students) - 1) / 2) * width
            values = [level.mmd[number]["poly"] for level in levels]
            axes.bar(places, values, 0.9 * width, color=method_color(number + 1), label=student.name)
        axes.set_xticks(range(len(levels)), [level.name for level in levels])
        axes.set_ylabel("MMD², polynomial kernel")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        said = "; ".join(
            f"{student.name}: " + ", ".join(f"{level.name} {level.mmd[number]['poly']:.3g}" for level in levels)
            for number, student in enumerate(students)
        )
        return to_svg(figure, "mmd", f"MMD of the channel maps to the teacher's by level. {said}")


def _scatter(networks: Sequence[Looked], plane: Plane, student: int, name: str, level: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    everything = np.concatenate([points.numpy() for points in plane.points])
    low, high = everything.min(0), everything.max(0)
    margin = 0.06 * (high - low) + 1e-9
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 3.0))
        axes = figure.add_subplot()
        for index, mark in ((0, TEACHER_MARK), (student, STUDENT_MARK)):
            x, y = plane.points[index].numpy().T
            axes.plot(x, y, mark, ms=3.2, mew=0, alpha=0.65, color=method_color(index), label=networks[index].name)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        label = f"Channels of {networks[0].name} and {networks[student].name} at {level}, a point each"
        return to_svg(figure, name, label)


def cka_matrix(levels: Sequence[str], cka: Cka, student: str, number: int) -> str:
    """Linear CKA of a student's levels (rows) with the teacher's (columns) as SVG; a star where positions are few."""
    import matplotlib
    from matplotlib.figure import Figure

    values = cka.values.numpy()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.9))
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
        for row, column in np.ndindex(*values.shape):
            text = f"{values[row, column]:.2f}" + ("*" if cka.few[row, column] else "")
            ink = "#000000" if values[row, column] > 0.6 else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_yticks(range(len(levels)), levels)
        axes.set_xlabel("teacher")
        axes.set_ylabel("student")
        said = ", ".join(f"{name} {values[index, index]:.2f}" for index, name in enumerate(levels))
        return to_svg(figure, f"cka{number}", f"Linear CKA of {student} with the teacher; at equal levels {said}")
