"""What each config key concerns: the one table of keys that may differ between two calls of a run, and that may not."""

from __future__ import annotations

# a run folder refuses to resume with another value; the rest are the runs of stage one whose results depend on the key
RESUME, STUDENT, TEACHER, TRAINED_TEACHER, CACHE = "resume", "student", "teacher", "trained teacher", "cache"

# what is concerned -> keys, or groups of keys, of any config
_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    # where, how fast and what is shown, and what is done about a step that failed
    (): (
        *("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "DATALOADER.CACHE_IMAGES_MB", "VIS_PERIOD"),
        *("TENSORBOARD", "WANDB", "SOLVER.NON_FINITE", "TRUST_PICKLE"),
    ),
    # a comparison keeps to them, while stage one may change them and add methods; the data and the teacher count by
    # their hashes, and a cache gives what the teacher would, unless it rounds
    (RESUME,): (
        *("METHODS", "REGISTRY", "SOLVER.CHECKPOINT_PERIOD", "LOG_PERIOD", "DATALOADER", "DATA.ROOT", "DATA.CACHE_GIB"),
        *("CACHE.DIR", "CACHE.MAX_GIB", "TEACHER"),
    ),
    (RESUME, STUDENT): ("",),
    (RESUME, STUDENT, TEACHER): ("NAME", "SEED", "TEST", "DATA"),
    (RESUME, STUDENT, TRAINED_TEACHER): ("SOLVER",),
    (RESUME, STUDENT, TRAINED_TEACHER, CACHE): ("FLOAT32_PRECISION",),
    (RESUME, STUDENT, CACHE): ("CACHE.VIEWS", "CACHE.VIEW_SEED", "CACHE.DTYPE"),
    (RESUME, STUDENT, TEACHER, CACHE): (
        *("DATA.IMAGE_SIZE", "DATA.CROP_RATIO", "DATA.MEAN", "DATA.STD", "DATA.AUGMENT"),
    ),
    (RESUME, TRAINED_TEACHER): ("TEACHER.ARCH", "TEACHER.ARCH_KWARGS", "TEACHER.PRETRAINED", "TEACHER.TRAIN"),
}
CONCERNS = {key: what for what, keys in _KEYS.items() for key in keys}


def concerns(key: str, *what: str) -> bool:
    """Return whether a dotted key concerns one of these; the longest group that it is in counts."""
    group = key
    while group not in CONCERNS:
        group = group.rpartition(".")[0]
    return bool(set(what) & set(CONCERNS[group]))
