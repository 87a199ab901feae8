"""What each config key affects: the one table of which may differ between two calls of a run, and which may not."""

import re

# a run folder refuses to resume with another value; the rest are the runs of stage one whose results depend on the key
RESUME, STUDENT, TEACHER, TRAINED_TEACHER, CACHE = "resume", "student", "teacher", "trained teacher", "cache"
# a comparison sets it for each run; how fast a run learns, not what a step takes; what a forward pass of a detector is
RUN, RATE, FORWARD = "run", "rate", "forward"
_PIXELS = (RESUME, STUDENT, TEACHER, CACHE)
_VIEWS = (RESUME, STUDENT, CACHE)

# key, or group of keys, of any config -> what it concerns; the longest match counts
CONCERNS: dict[str, tuple[str, ...]] = {
    "": (RESUME, STUDENT),
    # where, how fast and what is shown, and what is done about a step that failed; data and weights are known by their
    # fingerprints, wherever they are
    "OUTPUT_DIR": (RUN,),
    "REGISTRY": (RUN,),
    "DATA.ROOT": (),
    "DATA.MORE_ROOTS": (),
    "DATASETS.VOC.*.ROOT": (),
    "CACHE.DIR": (),
    "MODEL.WEIGHTS": (RUN,),
    "TEACHER.WEIGHTS": (),
    "TEST.PROBE.ROOT": (),
    "STUDENT.WEIGHTS": (),
    "TEACHER.CONFIG_FILE": (),
    "MODEL.DEVICE": (),
    "DATALOADER.NUM_WORKERS": (),
    "DATALOADER.CACHE_IMAGES_MB": (),
    "VIS_PERIOD": (),
    "TENSORBOARD": (),
    "WANDB": (),
    "SOLVER.NON_FINITE": (),
    "TRUST_PICKLE": (),
    # of a comparison or a search: more of them, or others, may be asked for
    "SEEDS": (RESUME, RUN),
    "ROWS": (),
    "PUBLISHED": (),
    "TUNED": (),
    "TRIALS": (),
    "JOBS": (),
    "COMPARE": (),
    "DISTILL": (),
    "DETECT.CONFIG": (),
    "DETECT.OPTS": (),
    # known by the configs of these rows' runs
    "DETECT.IMAGENET_OPTS": (),
    "DETECT.COCO_OPTS": (),
    # a comparison keeps to them; in stage one methods may be added and these may change
    "METHODS": (RUN,),
    "LOG_PERIOD": (RESUME,),
    "DATALOADER": (RESUME,),
    "DATA.CACHE_GIB": (RESUME,),
    # a cache gives what the teacher would, unless it rounds
    "CACHE.MAX_GIB": (RESUME,),
    "CACHE.VIEWS": _VIEWS,
    "CACHE.VIEW_SEED": _VIEWS,
    "CACHE.DTYPE": _VIEWS,
    "NAME": (RESUME, STUDENT, TEACHER, RUN),
    "SEED": (RESUME, STUDENT, TEACHER, RUN),
    "ENGINE": (RESUME, STUDENT, RUN),
    "MODEL": (RESUME, STUDENT, FORWARD),
    "MODEL.TIMM.PRETRAINED": (RESUME, STUDENT),
    "MODEL.BACKBONE.FREEZE_AT": (RESUME, STUDENT),
    "MODEL.KEEP_CLASSES": (RESUME, STUDENT),
    "MODEL.CLASS_ALIASES": (RESUME, STUDENT),
    "MODEL.WEIGHTS_CLASSES": (RESUME, STUDENT),
    "INPUT.MIN_SIZE_TEST": (RESUME, STUDENT, FORWARD),
    "INPUT.MAX_SIZE_TEST": (RESUME, STUDENT, FORWARD),
    "TEST": (RESUME, STUDENT, TEACHER),
    "TEST.DETECTIONS_PER_IMAGE": (RESUME, STUDENT, TEACHER, FORWARD),
    "DATA": (RESUME, STUDENT, TEACHER),
    # in the fingerprint of the students' data; a teacher learns from all
    "DATA.PER_CLASS": (RESUME, STUDENT),
    "DATA.REST": (RESUME, STUDENT),
    "DATA.IMAGE_SIZE": _PIXELS,
    "DATA.CROP_RATIO": _PIXELS,
    "DATA.MEAN": _PIXELS,
    "DATA.STD": _PIXELS,
    "DATA.AUGMENT": _PIXELS,
    "SOLVER": (RESUME, STUDENT, TRAINED_TEACHER),
    "SOLVER.BASE_LR": (RESUME, STUDENT, TRAINED_TEACHER, RATE),
    "SOLVER.BACKBONE_MULTIPLIER": (RESUME, STUDENT, TRAINED_TEACHER, RATE),
    "SOLVER.CHECKPOINT_PERIOD": (RESUME,),
    "FLOAT32_PRECISION": (RESUME, STUDENT, TRAINED_TEACHER, CACHE),
    # a student depends on the teacher's weights, by their hash
    "TEACHER": (RESUME,),
    # compared with the teacher's accuracy at each start
    "TEACHER.EXPECTED_TOP1": (),
    "TEACHER.ARCH": (RESUME, TRAINED_TEACHER),
    "TEACHER.ARCH_KWARGS": (RESUME, TRAINED_TEACHER),
    "TEACHER.IMAGE_SIZE": _PIXELS,
    "TEACHER.MEAN": _PIXELS,
    "TEACHER.STD": _PIXELS,
    "TEACHER.PRETRAINED": (RESUME, TRAINED_TEACHER),
    "TEACHER.TRAIN": (RESUME, TRAINED_TEACHER),
}


def concerns(key: str, *what: str) -> bool:
    """Return whether a dotted key concerns one of these; the longest group that it is in counts."""
    group = re.sub(r"^(DATASETS\.VOC)\.[^.]+\.", r"\1.*.", key)
    while group not in CONCERNS:
        group = group.rpartition(".")[0]
    return bool(set(what) & set(CONCERNS[group]))
