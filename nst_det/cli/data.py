"""Commands that make and check data sets and projects."""

import argparse
import shlex
import time
from pathlib import Path

from nst_det.cli.command import argument, command, existing, flag, one_of
from nst_det.errors import UserError

INIT_IMAGES = (
    "with --coco: the folder of its images, or one for each file. With --voc: classification data for stage one, a "
    "folder per class (default: the objects are cut out of the images)"
)
INIT_NETWORK = "(published weights where timm has some; default: a small one on a CPU, on a GPU"


@command(
    argument("project", "NAME", "the folder to make"),
    one_of(
        argument("--voc", "PATH", "your data: a folder in VOC's, labelImg's, Roboflow's or YOLO's layout"),
        argument("--coco", "JSON", "your data: COCO's JSON, converted to VOC; two are to train and test on", nargs="+"),
    ),
    argument("--images", "PATH", INIT_IMAGES, nargs="+", default=[]),
    argument("--unlabelled", "DIR", "images without labels, at any depth, for stage one: a published network teaches"),
    argument("--train", "LIST", "list to train on (default: found, or cut 4:1)", default=""),
    argument("--test", "LIST", "list to test on", default=""),
    argument("--device", None, "to fit sizes and schedules to (default: cuda if there)", choices=("cpu", "cuda")),
    argument("--student", "NAME", f"timm's name of the students' network {INIT_NETWORK} resnet18)", default=""),
    argument("--teacher", "NAME", f"of the teacher's {INIT_NETWORK} resnet50)", default=""),
)
def init(args: argparse.Namespace) -> None:
    """Make a project for your own images with boxes: configs that fit, and data for stage one."""
    from nst_det import api
    from nst_det.data.safe_io import shown_path

    given = {key: getattr(args, key) for key in ("images", "train", "test", "unlabelled", "student", "teacher")}
    project = api.init(args.project, args.voc, coco=args.coco or (), device=args.device or "", **given)
    values, report = project.values, project.report
    root = shown_path(report.root)
    print(f"data      {root}: {report.summary()}")
    if values.voc != report.root:
        print(f"          read from its copy in VOC's layout, {shown_path(values.voc)}")
    if report.problems:
        for problem in {problem.kind: problem for problem in reversed(report.problems)}.values():
            print(f"          {problem.kind}: {problem.line()}")
        checked = shlex.join([*args.coco, "--images", *args.images]) if args.coco else root
        print(f"          runs go on in spite of these; nst-det check-data {checked} lists them all")
    for note in report.notes:
        print(f"note      {note}")
    names = ", ".join(values.classes[:10]) + (", ..." if len(values.classes) > 10 else "")
    print(f"classes   {len(values.classes)}: {names}")
    cut = " (lists written into ImageSets/Main)" if project.cut else ""
    val = f", {values.val} to validate on" if values.val else ""
    print(
        f"lists     {values.train} ({project.images[0]} images), {values.test} ({project.images[1]} images){val}{cut}"
    )
    print(f"networks  student {values.student_network.says}, teacher {values.teacher_network.says}")
    for line in project.to_bring:
        print(f"bring     {line}")
    print(f"stage one {values.images}: {values.images_note}")
    taught = f"{values.teacher.iterations} steps of the teacher, " if values.labels else ""
    print(f"          {taught}{values.student.iterations} {'of' if taught else 'steps of'} each student")
    print(f"stage two {values.size[0]} x {values.size[1]} pixels, anchors {', '.join(map(str, values.anchors))}")
    print(f"          {values.detection.iterations} steps of {values.detection.batch} images")
    if project.small > 0.1:
        print(f"          {project.small:.0%} of the {project.objects} objects are smaller than 8 pixels at this size;")
        print("          raise INPUT.MIN_SIZE_* and MAX_SIZE_* and the anchors in detect.yaml")
    compare = shlex.join(["nst-det", "compare", args.project])
    print(f"next      {compare} --seeds 0 --methods {'ce,' if values.labels else ''}nst-poly")
    print(f"          for a first look; {compare} adds all methods and seeds")
    print(f"then      nst-det predict IMAGES --run {args.project}/output/detect/seed0/nst-poly")


COUNTS = {
    "seed": "of all draws",
    "classification-images": "images to train the classifier on",
    "classification-val-images": "images to validate it on",
    "detection-images": "images in the VOC list trainval",
    "detection-test-images": "images in the VOC list test",
    "classification-classes": "classes of the image folder",
    "detection-classes": "how many of these the VOC folder has",
}
LOOKS = {
    "rotation": "largest turn of an object, degrees",
    "contrast": "smallest RGB distance of an object from the ground, 0 to 180",
    "texture": "amplitude of the textures, grey levels",
    "noise": "largest deviation of the pixel noise, grey levels",
    "clutter": "density of distractors; 1 is dense",
    "shift": "largest distance of an object to classify from the middle, pixels",
}


@command(
    argument("--output", "DIR", "the folder to make", required=True),
    *(argument(f"--{name}", "N", text, type=int) for name, text in COUNTS.items()),
    *(argument(f"--{name}", "X", text, type=float) for name, text in LOOKS.items()),
    argument("--workers", "N", "processes; 0 takes all cores, at most 8", type=int, default=0),
)
def generate_data(args: argparse.Namespace) -> None:
    """Write a generated data set: an image folder to distill on and a VOC folder to detect on."""
    from nst_det.data import synthetic
    from nst_det.engine.progress import start_logging

    start_logging()
    given = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in (*COUNTS, *LOOKS)}
    settings = synthetic.settings_from({name: value for name, value in given.items() if value is not None})
    start = time.monotonic()
    output = synthetic.generate_data(args.output, settings, args.workers)
    seconds = time.monotonic() - start
    print(f"{output}: {synthetic.CLASSIFICATION} and {synthetic.DETECTION} are there ({seconds:.1f} s)")


@command(
    argument("--voc", "DIR", "a folder in VOC's layout", required=True, type=existing("a folder in VOC's layout")),
    argument("--split", "LIST", "the list whose images are taken; not the one to test on", default="train"),
    argument("--output", "DIR", "the image folder to make", required=True),
)
def crop_objects(args: argparse.Namespace) -> None:
    """Cut the objects of a VOC list out, into an image folder with a class each for stage one, as init does."""
    from nst_det.data.voc import VocDataset
    from nst_det.engine.io import atomic_folder
    from nst_det.scaffold.crops import write_crops

    if (output := Path(args.output)).exists():
        raise UserError(f"--output {output}: is there already; remove it, or name another folder")
    with atomic_folder(output, "name another --output") as made:
        counts = write_crops(VocDataset(args.voc, args.split), made)
    print(f"{output}: {counts.total()} crops of {len(counts)} classes, in train and val")


COCO_IMAGES = "of COCO's JSON: the folder of its images, or one for each file"
LOOKED_AT = "images with boxes (VOC, labelImg, Roboflow, YOLO), one folder of images per class, or COCO's JSON"


@command(
    argument("path", "PATH", LOOKED_AT, nargs="+", type=existing(LOOKED_AT)),
    argument("--images", "DIR", COCO_IMAGES, nargs="+", type=existing(COCO_IMAGES)),
    argument("--split", "NAME", "look at these lists only (default: everything)", nargs="+"),
    argument("--classes", "NAME", "the only class names that are right", nargs="+"),
    argument("--workers", "N", "threads that decode; 0 takes all cores", type=int, default=0),
    argument("--output", "FILE", "write the problems as JSON"),
    epilog="exit code: 0 if nothing is wrong, 2 if something is",
)
def check_data(args: argparse.Namespace) -> int:
    """List everything that is wrong with images with boxes, an image folder, or COCO's JSON."""
    from dataclasses import asdict

    from rich.table import Column, Table

    from nst_det.data import check
    from nst_det.data.coco import CocoSource
    from nst_det.data.safe_io import shown_path
    from nst_det.engine.format import print_table
    from nst_det.engine.io import write_json

    if len(args.path) > 1 and not args.images:
        raise UserError("name one folder; only COCO's JSON may be two files, with --images")
    data: str | CocoSource = args.path[0]
    if args.images:
        if args.split:
            raise UserError("--split: lists are for VOC folders, and COCO's JSON has none")
        data = CocoSource(tuple(map(Path, args.path)), tuple(map(Path, args.images)))
    report = check.check_data(data, args.split, args.classes, max(args.workers, 0))
    for problem in report.problems:
        print(f"{problem.kind}: {problem.line()}")
    if report.problems:
        table = Table("problem", Column("times", justify="right"))
        for kind, count in report.by_kind().items():
            table.add_row(kind, str(count))
        print_table(table)
    root = shown_path(report.root)
    for note in report.notes:
        print(f"note: {note}")
    print(f"{root}: {report.summary()}")
    if report.counts.get("lists") == 0:
        print("no lists in ImageSets/Main: nst-det init cuts them, or write ids into trainval.txt and test.txt")
    if args.output:
        tree = {"root": root, "layout": report.layout, "counts": report.counts, "notes": report.notes}
        write_json(args.output, {**tree, "problems": [asdict(problem) for problem in report.problems]})
    return 2 if report.problems else 0


@command(
    argument("name", None, "2007: trainval and test, 0.9 GB; 2012: trainval, 2.0 GB", choices=("voc2007", "voc2012")),
    argument("--output", "DIR", "parent of VOCdevkit (default: data)", default="data"),
    argument("--mirror", "URL", "folder with the archives, tried first; repeatable", action="append", default=[]),
    flag("--keep-archives", "leave the .tar files next to VOCdevkit"),
    epilog="After any stop the same command resumes.",
)
def download(args: argparse.Namespace) -> None:
    """Get PASCAL VOC 2007 or 2012 from the net, from several mirrors, resumed and checked."""
    from nst_det.data.download import RELEASES, download_voc
    from nst_det.data.safe_io import shown_path
    from nst_det.engine.progress import start_logging

    start_logging()
    release = RELEASES[args.name]
    root = download_voc(release, args.output, args.mirror, args.keep_archives)
    lists = ", ".join(f"{name} {count}" for name, count in release.splits.items())
    print(f"{shown_path(root)}: whole (images: {lists})")
    print(f"terms     {release.terms} (the images are under Flickr's)")
    print(f"next      nst-det check-data {shown_path(root)}")
    print(f"          the configs in configs/detect/voc read it by VOC_ROOT={shown_path(root.parent)}")
