"""``nst-det`` as the guide's commands call it in the test: the real one, with few steps and little data."""

from pathlib import Path

import yaml

from nst_det.cli import main

# generate-data
DATA = {
    "classification-images": 24, "classification-val-images": 12, "classification-classes": 3,
    "detection-images": 8, "detection-test-images": 4, "detection-classes": 3,
}  # fmt: skip
DISTILL = {
    "TEACHER.ARCH": "resnet10t", "TEACHER.EXPECTED_TOP1": 0.0, "TEACHER.SOLVER": {"MAX_ITER": 2},
    "DATA.IMAGE_SIZE": 32, "DATA.AUGMENT.SHIFT": 2, "SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 8,
}  # fmt: skip
DETECT = {
    "SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
}  # fmt: skip


COMPARE = {"SEEDS": [0], "METHODS": ["ce", "nst-poly"]}


def words(settings):
    return [str(word) for pair in settings.items() for word in pair]


def shrink(project):
    """Give the configs that ``nst-det init`` wrote the settings above."""
    for name, settings in (("distill", DISTILL), ("detect", DETECT), ("compare", COMPARE)):
        file = Path(project) / f"{name}.yaml"
        tree = yaml.safe_load(file.read_text())
        for key, value in settings.items():
            *above, last = key.split(".")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
        file.write_text(yaml.safe_dump(tree))


def run(typed):
    """The command line after ``nst-det``."""
    word, *rest = typed
    added = {
        "generate-data": [f"--{name}={count}" for name, count in DATA.items()],
        "distill": words(DISTILL),
        "train-det": words(DETECT),
    }.get(word, [])
    try:
        main([word, *rest, *added])
    except SystemExit as left:
        if word == "init" and left.code == 0:
            shrink(rest[0])
        raise
