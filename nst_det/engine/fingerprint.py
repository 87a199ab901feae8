"""What each config key concerns: the one table of keys that may differ between two calls of a run, and that may not."""

from __future__ import annotations

# a run folder refuses to resume with another value; the rest are the runs of stage one whose results depend on the key
RESUME, STUDENT, TEACHER, TRAINED_TEACHER, CACHE = "resume", "student", "teacher", "trained teacher", "cache"
_PIXELS = (RESUME, STUDENT, TEACHER, CACHE)
_VIEWS = (RESUME, STUDENT, CACHE)

# key, or group of keys, of any config -> what it concerns; the longest match counts
CONCERNS: dict[str, tuple[str, ...]] = {
    "": (RESUME, STUDENT),
    # where, how fast and what is shown, and what is done about a step that failed
    "OUTPUT_DIR": (),
    "MODEL.DEVICE": (),
    "DATALOADER.NUM_WORKERS": (),
    "DATALOADER.CACHE_IMAGES_MB": (),
    "VIS_PERIOD": (),
    "TENSORBOARD": (),
    "WANDB": (),
    "SOLVER.NON_FINITE": (),
    "TRUST_PICKLE": (),
    # a comparison keeps to them; in stage one methods may be added and these may change
    "METHODS": (RESUME,),
    "REGISTRY": (RESUME,),
    "LOG_PERIOD": (RESUME,),
    "DATALOADER": (RESUME,),
    # the data's fingerprint stands for the folder
    "DATA.ROOT": (RESUME,),
    "DATA.CACHE_GIB": (RESUME,),
    # a cache gives what the teacher would, unless it rounds
    "CACHE.DIR": (RESUME,),
    "CACHE.MAX_GIB": (RESUME,),
    "CACHE.VIEWS": _VIEWS,
    "CACHE.VIEW_SEED": _VIEWS,
    "CACHE.DTYPE": _VIEWS,
    "NAME": (RESUME, STUDENT, TEACHER),
    "SEED": (RESUME, STUDENT, TEACHER),
    "TEST": (RESUME, STUDENT, TEACHER),
    "DATA": (RESUME, STUDENT, TEACHER),
    "DATA.IMAGE_SIZE": _PIXELS,
    "DATA.CROP_RATIO": _PIXELS,
    "DATA.MEAN": _PIXELS,
    "DATA.STD": _PIXELS,
    "DATA.AUGMENT": _PIXELS,
    "SOLVER": (RESUME, STUDENT, TRAINED_TEACHER),
    "SOLVER.CHECKPOINT_PERIOD": (RESUME,),
    "FLOAT32_PRECISION": (RESUME, STUDENT, TRAINED_TEACHER, CACHE),
    # a student depends on the teacher's weights, by their hash
    "TEACHER": (RESUME,),
    "TEACHER.ARCH": (RESUME, TRAINED_TEACHER),
    "TEACHER.ARCH_KWARGS": (RESUME, TRAINED_TEACHER),
    "TEACHER.PRETRAINED": (RESUME, TRAINED_TEACHER),
    "TEACHER.TRAIN": (RESUME, TRAINED_TEACHER),
}


def concerns(key: str, *what: str) -> bool:
    """Whether a dotted key concerns one of these."""
    group = key
    while group not in CONCERNS:
        group = group.rpartition(".")[0]
    return bool(set(what) & set(CONCERNS[group]))
