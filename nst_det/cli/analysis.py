"""Commands that look at networks, methods and the machine."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nst_det.cli.command import BACKBONE, DEVICE, RUN, argument, command, existing, flag, one_of
from nst_det.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@command(
    argument("--root", "DIR", "a folder with backbone files instead of $NST_DET_BACKBONES"),
    argument("--check", "NAME", "load NAME or a file; print how far classifier's and bottom-up's maps differ"),
)
def backbones(args: argparse.Namespace) -> None:
    """List the backbones in the registry, or check one."""
    from nst_det.engine.format import print_table
    from nst_det.models.registry import PREFIX, registry_folders

    folders = [Path(args.root).expanduser()] if args.root else registry_folders()
    if args.root and not folders[0].is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    if args.check:
        name = args.check.removeprefix(PREFIX)
        path = name if "/" in name else f"{PREFIX}{name}"
        if args.root and path != name:
            path = str(folders[0] / f"{name.removesuffix('.safetensors')}.safetensors")
        BACKBONE(path).check()
        # torch takes seconds to import
        from nst_det.models.bottomup import prove_parity

        difference = prove_parity(path)
        print(f"{name}: classifier and bottom-up differ by at most {difference:.3g}")
        if difference > 0:
            raise UserError(f"{name}: the bottom-up doesn't compute what the classifier computes")
        return
    from nst_det.models.io import backbones_table, list_backbones

    entries, faults = list_backbones(folders)
    where = ", ".join(str(folder) for folder in folders)
    if entries:
        print_table(backbones_table(entries, f"backbones in {where}"))
    else:
        print(f"no backbones in {where} yet; nst-det distill makes them")
    for fault in faults:
        print(fault)


@command(
    argument("prefix", None, "only keys that begin so, for example SOLVER or DETECT.TEST", nargs="?", default=""),
    argument("--output", "FILE", "write all of them as a page of Markdown"),
)
def keys(args: argparse.Namespace) -> None:
    """List the keys of all configs, with their defaults and meanings."""
    from rich.markup import escape
    from rich.table import Column, Table

    from nst_det.engine.format import print_table
    from nst_det.engine.io import write_text
    from nst_det.keys import default_text, find_keys, meaning_text, page

    if args.output:
        write_text(args.output, page())
        return
    for group, found in find_keys(args.prefix):
        columns = (Column(name, overflow="fold") for name in ("key", "default", "meaning"))
        table = Table(*columns, title=f"{group.title}, {group.file}", title_justify="left")
        for name, key in found.items():
            table.add_row(name, *(escape(text) for text in (default_text(key.default), meaning_text(key))))
        print_table(table)


@command(argument("method", None, "only the terms of this method, for example kd+nst-poly", nargs="?"))
def methods(args: argparse.Namespace) -> None:
    """List the transfer terms, their default weights and where these are from."""
    from rich.table import Column, Table

    from nst_det.detection.config import detector_transfer_node
    from nst_det.engine.format import print_table
    from nst_det.losses.method import parse_method
    from nst_det.losses.registry import terms

    try:
        chosen: dict[str, float | None] = dict(parse_method(args.method)) if args.method else dict.fromkeys(terms())
    except ValueError as error:
        raise UserError(str(error)) from None
    columns = ("term", "reads", Column("weight", justify="right"), "the weight is from", "hands over", "options")
    table = Table(*columns, title="Transfer terms; join them with +, weigh them as in kd:0.9+nst-poly")
    for name, weight in chosen.items():
        term = terms()[name]
        reads = term.level if term.student_kind == term.level else f"{term.student_kind} to {term.level}"
        options = ", ".join(f"{key}={value}" for key, value in term.options.items())
        number, source = (term.weight, term.source) if weight is None else (weight, "the method itself")
        table.add_row(name, reads, f"{number:g}", source, term.summary, options)
    options = detector_transfer_node().OPTIONS
    there = "; ".join(f"{name} has {key}={value} there" for name, own in options.items() for key, value in own.items())
    table.caption = (
        "Maps are feature levels of both backbones. Logits and embedding are the classifiers' in stage one, in stage "
        f"two those of both box heads on the student's proposals ({there})."
    )
    print_table(table)


@command(
    one_of(
        argument("--arch", "NAME", "a timm architecture, with its classifier of 1000 classes"),
        argument("--weights", "FILE", "a backbone file, or backbone://NAME", type=BACKBONE),
        argument("--run", "DIR", "the detector of a finished train-det run", dest="run_folder", type=RUN),
        argument("--config-file", "FILE", "the detector of a stage-two YAML, with random weights"),
        required=False,
    ),
    argument("--exported", "FILE", "files of nst-det export; with --run also mAP, and PyTorch beside them", nargs="+"),
    argument("--batch", "N", "batch sizes (default: 1 8; a file has its own)", nargs="+", type=int, default=[1, 8]),
    argument("--size", "S", "224, or HEIGHTxWIDTH (default: 224; a detector's own test size)", default=""),
    DEVICE,
    argument("--threads", "N", "CPU threads (default: torch's)", type=int, default=0),
    argument("--repeats", "N", "timed passes a batch size (default: 20)", type=int, default=20),
    argument("--json", "FILE", "write the figures"),
    argument("opts", "KEY VALUE", "config values, with --config-file", nargs="*"),
)
def benchmark(args: argparse.Namespace) -> None:
    """Parameters, arithmetic, latency and throughput of a backbone or a detector."""
    import torch

    from nst_det.benchmark import benchmark
    from nst_det.engine.device import compute_line, gpu_errors_in_one_line, named_device
    from nst_det.engine.io import write_json
    from nst_det.engine.run_dir import provenance

    if min(args.batch) < 1 or args.repeats < 1 or args.threads < 0:
        raise UserError("--batch and --repeats must be at least 1, --threads at least 0")
    if args.exported:
        _benchmark_exported(args)
        return
    if not (args.arch or args.weights or args.run_folder or args.config_file):
        raise UserError("command line: name a network by --arch, --weights, --run, --config-file or --exported")
    if args.opts and not args.config_file:
        raise UserError(f"command line: '{args.opts[0]}': KEY VALUE pairs go with --config-file")
    size, device = parse_size(args.size), named_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    with gpu_errors_in_one_line("lower --batch or --size"):
        name, model, own_size = _load_network(args, device)
        print(compute_line(device, None))
        figures = {
            "name": name,
            "size": list(size or own_size),
            "device": str(device),
            "threads": torch.get_num_threads(),
            **benchmark(model, size or own_size, args.batch, args.repeats, device),
            "provenance": provenance(),
        }
    _print_figures(figures)
    if args.json:
        write_json(args.json, figures)


def _benchmark_exported(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from nst_det.engine.format import print_table
    from nst_det.engine.io import write_json
    from nst_det.exporting.measure import measure
    from nst_det.report.deployed import add_deployed, table

    for name in ("arch", "weights", "config_file", "size", "opts"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: not with --exported, whose files say it themselves")
    if args.device not in ("", "cpu"):
        raise UserError(f"--device {args.device}: exported files are measured on the CPU; leave it out")
    rows = measure(args.exported, args.run_folder or "", args.threads, args.repeats)
    if args.run_folder:
        rows = add_deployed(Path(args.run_folder), rows)
    print_table(table(rows, args.run_folder or "exported files, on noise"))
    if args.json:
        write_json(args.json, [asdict(row) for row in rows])


def parse_size(text: str) -> tuple[int, int] | None:
    """Return (height, width) of ``224`` or ``240x320``; None for ""."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or not 8 <= int(found[1]) <= 8192 or not 8 <= int(found[2] or found[1]) <= 8192:
        raise UserError(f"--size: '{text}'; give pixels such as 224, or HEIGHTxWIDTH such as 240x320, from 8 to 8192")
    return int(found[1]), int(found[2] or found[1])


def _load_network(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, tuple[int, int]]:
    """Return the name, the network and its own image size."""
    from nst_det.benchmark import BACKBONE_SIZE, Batched, photo_size
    from nst_det.detection.config import load_detect_config, resolve_classes
    from nst_det.detection.data import data_classes
    from nst_det.detection.predict import load_run
    from nst_det.detection.torchvision import build_detector
    from nst_det.engine.device import set_float32_precision
    from nst_det.models import classifier_from_file, create_model

    if args.arch:
        try:
            return args.arch, create_model(args.arch, 1000), BACKBONE_SIZE
        except ValueError as error:
            raise UserError(f"--arch: {error}") from error
    if args.weights:
        model, card = classifier_from_file(args.weights)
        side = int(card.input.get("size", BACKBONE_SIZE[0]))
        return f"{card.arch} ({args.weights})", model, (side, side)
    if args.run_folder:
        detector, config, _ = load_run(args.run_folder, device)
        return args.run_folder, Batched(detector), photo_size(config)
    config = load_detect_config(args.config_file, args.opts)
    if not config.MODEL.ROI_HEADS.NUM_CLASSES:
        resolve_classes(config, data_classes(config))
    set_float32_precision(config.FLOAT32_PRECISION, device)
    return args.config_file, Batched(build_detector(config)), photo_size(config)


def _print_figures(figures: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from nst_det.engine.format import print_table

    height, width = figures["size"]
    where = f"{height}x{width} pixels, {figures['device']}, {figures['threads']} threads"
    columns = (Column(name, justify="right") for name in ("batch", "median ms", "p10 ms", "p90 ms", "images/s"))
    table = Table(*columns, title=escape(f"{figures['name']}, {where}"))
    for row in figures["latency"]:
        cells = [f"{1000 * row[key]:.1f}" for key in ("median", "p10", "p90")]
        table.add_row(str(row["batch"]), *cells, f"{row['images_per_second']:.1f}")
    print_table(table)
    print(f"parameters {figures['parameters'] / 1e6:.3f} M")
    counts = f"{figures['macs'] / 1e9:.3f} GMACs, {figures['flops'] / 1e9:.3f} GFLOPs"
    print(f"one image  {counts} (a multiply-add is 1 MAC = 2 FLOPs; papers often print MACs as FLOPs)")
    passes = figures["latency"][0]["repeats"]
    print(f"latency    of {passes} passes on noise; it moves with a detector's boxes and the machine's other work")


LOOK_WEIGHTS, LOOK_IMAGES = "a backbone; repeat, the teacher's first", "images, or folders of images"


@command(
    argument("--weights", "FILE", LOOK_WEIGHTS, action="append", required=True, type=BACKBONE),
    argument("--image", "PATH", LOOK_IMAGES, nargs="+", required=True, type=existing(LOOK_IMAGES)),
    argument("--output", "FILE", "the page (default: look.html)", default="look.html"),
    argument("--levels", "NAME", "of res2 .. res5 (default: all they have in common)", nargs="+", default=[]),
    argument("--size", "N", "side of the images, pixels (default: as the teacher's card says)", type=int, default=0),
    flag("--tsne", "embed by t-SNE as well (needs scikit-learn)"),
    epilog="The first --weights is the teacher's, then the students': say, before and after transfer.",
)
def look(args: argparse.Namespace) -> None:
    """See what a teacher and students look at: channel maps, MMD by level, PCA or t-SNE, CKA; one HTML file."""
    if len(args.weights) < 2:
        raise UserError("--weights: give it twice or more: the teacher's, then each student's")
    from nst_det.engine.io import write_text
    from nst_det.models import load_card
    from nst_det.visualize import measures
    from nst_det.visualize.page import render

    size = args.size or int(load_card(args.weights[0]).input.get("size") or 224)
    if not 32 <= size <= 2048:
        raise UserError(f"--size: {size}; give 32 to 2048 pixels")
    names, images = measures.read_squares(args.image, size)
    teacher, *students = networks = [measures.feature_maps(weights, images) for weights in args.weights]
    level_names = measures.common_levels(networks, args.levels)
    levels = [measures.compare_level(networks, level, args.tsne) for level in level_names]
    cka = [measures.cka_of_levels(student, teacher, level_names) for student in students]
    write_text(args.output, render(networks, levels, cka, images, names))
    print(f"{len(images)} images of {size} pixels; against {teacher.name}:")
    for row, level in enumerate(levels):
        for student, mmd, nearest, (values, few) in zip(students, level.mmd, level.nearest, cka):
            near = f"MMD (poly) {mmd['poly']:.4g}, nearest channel {nearest:.3f}"
            cka_text = f"CKA {float(values[row, row]):.3f}{'*' if few[row, row] else ''}"
            print(f"{level.name}  {student.name}: {near}, {cka_text}")
    if any(bool(few.any()) for _, few in cka):
        print("* fewer positions than channels: give more images for a CKA that says something")
    print(f"page: {args.output}")


@command(
    argument("--data", None, "folders of data sets to check as well", type=Path, nargs="*", default=[]),
    argument("--output", None, "where runs would be written", type=Path, default=Path("output")),
)
def doctor(args: argparse.Namespace) -> int:
    """Look at versions, hardware, disk, data sets and backbones; say how to mend each fault."""
    from rich.markup import escape
    from rich.table import Table

    from nst_det.doctor import FAULT, OK, examine
    from nst_det.engine.format import print_table

    findings = examine(args.data, args.output)
    table = Table("what", "state", "found", "remedy")
    for finding in findings:
        color = {OK: "green", FAULT: "red"}.get(finding.state, "yellow")
        state = f"[{color}]{finding.state}[/]"
        table.add_row(finding.what, state, escape(finding.found), escape(finding.remedy))
    print_table(table)
    return 2 if any(finding.state == FAULT for finding in findings) else 0
