"""``nst-det init``: a project on one's own images."""

from __future__ import annotations

import argparse

HELP = "make a project for your own VOC folder: three configs with values that fit, and data for stage one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("project", metavar="NAME", help="the folder to make")
    parser.add_argument("--voc", required=True, metavar="PATH", help="your data: Annotations and JPEGImages")
    parser.add_argument(
        "--images",
        metavar="PATH",
        help="classification data for stage one, a folder a class (default: the objects are cut out of the images)",
    )
    parser.add_argument("--train", default="", metavar="LIST", help="list to train on (default: found, or cut 4:1)")
    parser.add_argument("--test", default="", metavar="LIST", help="list to test on")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="what sizes and schedules are for (default: cuda if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Make it, say what was seen and chosen, and what to type next."""
    from nst_det.data.reading import shown_path
    from nst_det.project.init import init_project
    from nst_det.runtime.device import default_device

    project = init_project(
        args.project, args.voc, args.images, args.train, args.test, args.device or default_device().type
    )
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
    print(f"next      nst-det compare --config-file {args.project}/compare.yaml")
    print(f"then      nst-det predict IMAGES --run {args.project}/output/detect/seed0/ce")
    return 0
