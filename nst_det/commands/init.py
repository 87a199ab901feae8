"""``nst-det init``: a project on one's own images."""

from __future__ import annotations

import argparse

HELP = "make a project for your own VOC folder or COCO JSON: three configs with values that fit, and data for stage one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("project", metavar="NAME", help="the folder to make")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--voc", metavar="PATH", help="your data: Annotations and JPEGImages")
    data.add_argument(
        "--coco",
        nargs="+",
        metavar="JSON",
        help="your data: COCO's object detection JSON; two files are to train and to test on. Converted to VOC layout",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="with --coco: the folder of its images, or one for each file. With --voc: classification data for stage "
        "one, a folder a class (default: the objects are cut out of the images)",
    )
    parser.add_argument("--train", default="", metavar="LIST", help="list to train on (default: found, or cut 4:1)")
    parser.add_argument("--test", default="", metavar="LIST", help="list to test on")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="what sizes and schedules are for (default: cuda if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Make it, say what was seen and chosen, and what to type next."""
    from pathlib import Path

    from nst_det.data.coco import CocoSource
    from nst_det.data.safe_io import shown_path
    from nst_det.engine.device import default_device
    from nst_det.errors import UserError
    from nst_det.scaffold.init import init_project

    images = args.images or []
    data: str | CocoSource = args.voc
    if args.coco:
        if not images:
            raise UserError("--coco: name the folder of its images by --images")
        data = CocoSource(tuple(map(Path, args.coco)), tuple(map(Path, images)))
        images = []
    if len(images) > 1:
        raise UserError("--images: one folder of classification data; with --coco there may be two")
    device = args.device or default_device().type
    project = init_project(args.project, data, images[0] if images else None, args.train, args.test, device)
    values, report = project.values, project.report
    root = shown_path(report.root)
    print(f"data      {root}: {report.summary()}")
    if report.problems:
        print(f"          a run goes on with these problems; nst-det check-data {root} lists them")
    names = ", ".join(values.classes[:10]) + (", ..." if len(values.classes) > 10 else "")
    print(f"classes   {len(values.classes)}: {names}")
    said = " (lists written into ImageSets/Main)" if project.cut else ""
    print(f"lists     {values.train} ({project.images[0]} images), {values.test} ({project.images[1]} images){said}")
    print(f"stage one {values.images}: {values.images_note}")
    print(f"          {values.teacher.iterations} steps of the teacher, {values.student.iterations} of each student")
    print(f"stage two {values.size[0]} x {values.size[1]} pixels, anchors {', '.join(map(str, values.anchors))}")
    print(f"          {values.detection.iterations} steps of {values.detection.batch} images")
    if project.small > 0.1:
        print(
            f"          {project.small:.0%} of the {project.objects} objects are smaller than 8 pixels at this size; "
            "raise INPUT.MIN_SIZE_* and MAX_SIZE_* and the anchors in detect.yaml"
        )
    command = f"nst-det compare --config-file {args.project}/compare.yaml"
    print(f'next      {command} SEEDS "[0]" METHODS "[ce, nst-poly]"')
    print(f"          for a first look; {command} adds all methods and seeds")
    print(f"then      nst-det predict IMAGES --run {args.project}/output/detect/seed0/nst-poly")
    return 0
