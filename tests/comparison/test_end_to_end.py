"""The whole way with the real stages, on a little generated data: killed and started again, and undisturbed."""

import json
import random
import time

import pytest
import yaml

from nst_det.comparison.result import comparable

DISTILL = {
    "DATA": {"ROOT": "generated", "IMAGE_SIZE": 64},
    "TEACHER": {"ARCH": "nst_resnet10_w32", "SOLVER": {"MAX_ITER": 4}},
    # the network of configs/detect/shapes.yaml
    "STUDENT": {
        "ARCH": "resnet10t",
        "ARCH_KWARGS": {"channels": [32, 64, 128, 256], "stem_width": 16, "zero_init_last": False},
    },
    "SOLVER": {
        "OPTIMIZER": "ADAMW",
        "BASE_LR": 0.004,
        "MAX_ITER": 6,
        "IMS_PER_BATCH": 8,
        "LR_SCHEDULER_NAME": "OneCycleLR",
        "CHECKPOINT_PERIOD": 2,
    },
    "LOG_PERIOD": 1,
}
COMPARE = {
    "NAME": "tiny",
    "METHODS": ["kd+nst-poly"],
    "ENGINE": "torchvision",
    "THREADS": 2,
    "DATA": {
        "GENERATE": {
            "classification_images": 40,
            "classification_val_images": 20,
            "detection_images": 8,
            "detection_test_images": 4,
            "classification_classes": 4,
            "detection_classes": 3,
        }
    },
    "DISTILL": {"CONFIG": "distill.yaml"},
    "DETECT": {"OPTS": ["SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2]},
}


@pytest.fixture
def start(tmp_path, pytestconfig, forked):
    """Starts ``nst-det compare`` on a folder, in a process."""
    detect = pytestconfig.rootpath / "configs" / "detect" / "shapes.yaml"
    compare = {**COMPARE, "DETECT": {**COMPARE["DETECT"], "CONFIG": str(detect)}}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(DISTILL))
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(compare))
    config = tmp_path / "compare.yaml"
    return lambda folder, *words: forked(["compare", "--config-file", config, "--output", folder, *words])


def steps_in(folder):
    return sum(path.read_text().count("\n") for path in folder.rglob("metrics.jsonl"))


def written(folder):
    """When each run ended."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}


def finish(start, folder, said, *words):
    process = start(folder, *words)
    process.join(300)
    assert process.exitcode == 0, said.read_text()[-2000:]
    return json.loads((folder / "report" / "results.json").read_text())


@pytest.mark.slow
def test_killed_at_random_and_started_again_equals_undisturbed(start, tmp_path):
    said = tmp_path / "output.txt"
    undisturbed = finish(start, tmp_path / "undisturbed", said, "--jobs", "2")
    assert [row["method"] for row in undisturbed["rows"]] == ["scratch", "ce", "kd+nst-poly"]
    whole = steps_in(tmp_path / "undisturbed")
    assert whole >= 4 + 2 * 6 + 3 * 6
    seed = int(time.time())
    draw = random.Random(seed)
    for _ in range(2):
        process = start(tmp_path / "killed")
        enough = min(steps_in(tmp_path / "killed") + draw.randint(1, whole // 2), whole - 1)
        while process.is_alive() and steps_in(tmp_path / "killed") < enough:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -9
    # one at a time: how many run at once must not matter
    resumed = finish(start, tmp_path / "killed", said, "--jobs", "1")
    assert comparable(resumed) == comparable(undisturbed), f"seed {seed}"
    assert {path.name for path in (tmp_path / "killed" / "report").iterdir()} >= {
        "results.json", "results.csv", "table.md", "index.html",
    }  # fmt: skip
    # what is done is not done again: the last call only reads
    before = written(tmp_path / "killed")
    assert before
    assert comparable(finish(start, tmp_path / "killed", said)) == comparable(undisturbed)
    assert written(tmp_path / "killed") == before
