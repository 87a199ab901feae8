"""The page of ``nst-det look``: one HTML file that needs nothing but itself."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.image import imsave
from torch import Tensor

from nst_det.report.svg import METHOD_COLORS, STYLE, new_axes, to_svg
from nst_det.visualize.measures import FeatureMaps, Level, Plane


def render(
    networks: Sequence[FeatureMaps],
    levels: Sequence[Level],
    cka: Sequence[tuple[Tensor, Tensor]],
    images: Tensor,
    names: Sequence[str],
) -> str:
    """Return the page: ``networks`` are the teacher first, ``cka`` is of each student, maps are of the first image."""
    loader = ChoiceLoader([PackageLoader("nst_det.visualize"), PackageLoader("nst_det.report")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    teacher, *students = networks
    with rc_context(fname=STYLE):
        return environment.get_template("look.html").render(
            style=Markup(loader.get_source(environment, "style.css")[0]),
            teacher=teacher,
            students=students,
            levels=levels,
            image=(names[0], _png(images[0].permute(1, 2, 0).numpy())),
            count=len(images),
            bars=_mmd_bars(students, levels),
            shown_maps=lambda level: _shown_maps(networks, level),
            scatter=lambda plane, student, level: _scatter(networks, plane, student, level.name),
            cka=[
                (student.name, _cka_matrix(levels, values, few, student.name, f"cka{number}"))
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
            cells.append((_png(network.maps[level.name][0, channel].numpy()), text, note))
        rows.append((network.name, cells))
    return rows


def _png(pixels: np.ndarray) -> str:
    """Return (H, W, 3) RGB pixels, or a map (H, W), dark where it is lowest, as a data URI."""
    out = io.BytesIO()
    imsave(out, pixels, cmap="viridis", format="png")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _mmd_bars(students: Sequence[FeatureMaps], levels: Sequence[Level]) -> Markup:
    """Draw MMD^2 with the polynomial kernel by level, a bar a student."""
    axes = new_axes(4.7, 2.6)
    width = 0.8 / len(students)
    parts = []
    for number, student in enumerate(students):
        heights = [level.mmd[number]["poly"] for level in levels]
        places = np.arange(len(levels)) + (number - (len(students) - 1) / 2) * width
        axes.bar(places, heights, 0.9 * width, color=_color(number + 1), label=student.name)
        values = ", ".join(f"{level.name} {height:.3g}" for level, height in zip(levels, heights))
        parts.append(f"{student.name}: {values}")
    axes.set_xticks(range(len(levels)), [level.name for level in levels])
    axes.set_ylabel("MMD², polynomial kernel")
    axes.legend()
    return to_svg(axes, "mmd", f"MMD of the channel maps to the teacher's by level. {'; '.join(parts)}")


def _scatter(networks: Sequence[FeatureMaps], plane: Plane, student: int, level: str) -> Markup:
    """Draw the channels of the teacher and of one student on a plane whose axes all networks share."""
    axes = new_axes(3.5, 3.0)
    for index, mark in ((0, "o"), (student, "^")):
        x, y = plane.points[index].numpy().T
        axes.plot(x, y, mark, ms=3.2, mew=0, alpha=0.65, color=_color(index), label=networks[index].name)
    everything = np.concatenate([points.numpy() for points in plane.points])
    low, high = everything.min(0), everything.max(0)
    margin = 0.06 * (high - low) + 1e-9
    xlim, ylim = np.stack([low - margin, high + margin], axis=1)
    axes.set(xlim=xlim, ylim=ylim, xticks=[], yticks=[])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    label = f"Channels of {networks[0].name} and {networks[student].name} at {level}, a point each"
    return to_svg(axes, f"{plane.method}-{level}-{student}", label)


def _cka_matrix(levels: Sequence[Level], values: Tensor, few: Tensor, student: str, name: str) -> Markup:
    """Draw (L, L) linear CKA of a student's levels (rows) with the teacher's; a star where positions are few."""
    names = [level.name for level in levels]
    axes = new_axes(3.5, 2.9)
    axes.grid(visible=False)
    axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis")
    for row, column in np.ndindex(*values.shape):
        text = f"{values[row, column]:.2f}" + ("*" if few[row, column] else "")
        ink = "#000000" if values[row, column] > 0.6 else "#ffffff"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="teacher", ylabel="student")
    diagonal = ", ".join(f"{level} {value:.2f}" for level, value in zip(names, values.diagonal().tolist()))
    return to_svg(axes, name, f"Linear CKA of {student} with the teacher; at equal levels {diagonal}")


def _color(network: int) -> str:
    return METHOD_COLORS[network % len(METHOD_COLORS)]
