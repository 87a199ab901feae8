"""Few labels: what students and teacher learn from."""

import pytest
import torch

from nst_det.distillation.dataloader import StageOneData, read_data
from nst_det.distillation.trainer import StudentTrainer
from nst_det.errors import UserError
from tests.helpers.stage_one import config, run


@pytest.mark.parametrize("rest", ["drop", "unlabelled"])
def test_a_run_with_few_labels(images, tmp_path, rest):
    keys = {"DATA.PER_CLASS": 2, "DATA.REST": rest, "SOLVER.MAX_ITER": 2, "TEACHER.SOLVER": {"MAX_ITER": 2}}
    data = StageOneData(config(images, tmp_path, **keys))
    labels, all_labels = torch.from_numpy(data.folder.train.labels), torch.from_numpy(data.whole.train.labels)
    assert labels[labels >= 0].bincount().tolist() == [2] * len(data.classes)
    assert len(labels) == (len(all_labels) if rest == "unlabelled" else 2 * len(data.classes))
    assert bool((all_labels >= 0).all())
    results = run(images, tmp_path, METHODS=["ce", "kd"], **keys)
    assert {result["steps"] for name, result in results.items() if name != "teacher"} == {2}


def test_too_few_images_are_named_with_the_keys_that_change_it(images, tmp_path):
    # 8 of each class to train on, beside a val folder
    with pytest.raises(UserError, match=r"'class0'.*DATA\.PER_CLASS 9$"):
        read_data(config(images, tmp_path, **{"DATA.PER_CLASS": 9}))
    with pytest.raises(UserError, match=r"'class0'.*DATA\.PER_CLASS 8, or DATA\.VAL_FRACTION 0\.25$"):
        read_data(
            config(images, tmp_path, **{"DATA.PER_CLASS": 8, "DATA.VAL_FROM": "train", "DATA.VAL_FRACTION": 0.25})
        )


@pytest.mark.parametrize(("labels", "expected"), [([1, -1, 0, -1], 2), ([-1] * 4, 0)])
def test_cross_entropy_is_the_mean_over_labelled_images(images, tmp_path, labels, expected):
    student = StudentTrainer.__new__(StudentTrainer)
    student.config = config(images, tmp_path, **{"DATA.PER_CLASS": 1, "DATA.REST": "unlabelled"})
    student.solver = student.config.SOLVER
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = [index for index, label in enumerate(labels) if label >= 0]
    by_hand = [-logits.detach().softmax(1)[index, labels[index]].log() for index in rows]
    loss = student._cross_entropy(logits, torch.tensor(labels))
    assert len(rows) == expected
    assert float(loss.detach()) == pytest.approx(float(sum(by_hand)) / max(len(rows), 1))
    loss.backward()
    assert logits.grad.any(1).nonzero().flatten().tolist() == rows
