"""SOLVER.EMA_DECAY with Detectron2's trainer: what is evaluated and written, stops and faults."""

import json

import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from safetensors.torch import load_file  # noqa: E402

from nst_det.detectron2 import DistillTrainer  # noqa: E402
from nst_det.detectron2.config import load_config, register_datasets  # noqa: E402
from nst_det.engine.metrics import read_metrics  # noqa: E402
from nst_det.errors import UserError  # noqa: E402

# reached at the fourth of six steps
DECAY = 0.6
AVERAGED = ["SOLVER.EMA_DECAY", DECAY]


@pytest.fixture
def trained(monkeypatch):
    """Step -> the weights in training after it, where the optimizer made it."""
    states, run_step = {}, DistillTrainer.run_step

    def recorded(self):
        before = self.state.average.steps
        run_step(self)
        if self.state.average.steps > before:
            states[self.iter + 1] = {name: value.clone() for name, value in self.student.state_dict().items()}

    monkeypatch.setattr(DistillTrainer, "run_step", recorded)
    return states


def taught(tiny_teacher):
    return [
        *("METHOD", "fitnet:1+nst-poly:1", "TRANSFER.LEVELS", "['p2', 'p3']"),
        *("TEACHER.CONFIG_FILE", tiny_teacher[0], "TEACHER.WEIGHTS", tiny_teacher[1]),
    ]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_is_evaluated_chosen_and_written(
    command, tiny_yaml, tiny_teacher, tmp_path, trained, averaged_in_float64, monkeypatch
):
    evaluated, test = [], DistillTrainer.test.__func__

    def seen(cls, cfg, model, evaluators=None):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(DistillTrainer, "test", classmethod(seen))
    folder = tmp_path / "run"
    opts = [*AVERAGED, *taught(tiny_teacher), "DATASETS.VAL_FRACTION", 0.25, "TEST.EVAL_PERIOD", 3]
    assert command("--config-file", tiny_yaml, *opts, "OUTPUT_DIR", folder) == 0
    expected = {done: averaged_in_float64([trained[s] for s in range(1, done + 1)], DECAY) for done in (3, 6)}
    # in the middle, at the end, and on the test set
    assert len(evaluated) == 3
    for done, found in zip((3, 6, 6), evaluated):
        assert_close(found, expected[done])
    best = json.loads((folder / "result.json").read_text())["checkpoints"]["best"]["step"]
    assert_close(load_file(folder / "model_best.safetensors"), expected[best])
    assert_close(load_file(folder / "model.safetensors"), expected[6])
    # the model in a checkpoint is the one to use; what goes on being trained stands beside it
    saved = torch.load(folder / "model_final.pth")
    assert all(torch.equal(saved["model"][name], value) for name, value in evaluated[-1].items())
    assert saved["trainer"]["averaged"]["steps"] == 6
    assert all(torch.equal(saved["trainer"]["averaged"]["trained"][name], value) for name, value in trained[6].items())


def test_training_is_as_without(command, tiny_yaml, whole, tmp_path):
    opts = [*AVERAGED, "DATASETS.TEST", "[]", "OUTPUT_DIR", tmp_path / "run"]
    assert command("--config-file", tiny_yaml, *opts) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    averaged, plain = (torch.load(folder / "model_final.pth") for folder in (tmp_path / "run", whole))
    in_training = averaged["trainer"]["averaged"]["trained"]
    assert all(torch.equal(in_training[name], value) for name, value in plain["model"].items())
    assert "averaged" not in plain["trainer"]


def test_a_run_that_goes_on_ends_with_the_same_bits(command, tiny_yaml, tiny_teacher, tmp_path, monkeypatch):
    words = ["--config-file", tiny_yaml, *AVERAGED, *taught(tiny_teacher), "DATASETS.TEST", "[]", "OUTPUT_DIR"]
    assert command(*words, tmp_path / "one") == 0
    run_step = DistillTrainer.run_step

    def stopped(self):
        if self.iter == 4:
            raise UserError("stopped")
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "run_step", stopped)
        assert command(*words, tmp_path / "two") == 2
    assert (tmp_path / "two" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert command(*words, tmp_path / "two") == 0
    one, two = (torch.load(tmp_path / name / "model_final.pth") for name in ("one", "two"))
    averaged = [saved["trainer"]["averaged"] for saved in (one, two)]
    assert averaged[0]["steps"] == averaged[1]["steps"] == 6
    for first, second in ((one["model"], two["model"]), (averaged[0]["trained"], averaged[1]["trained"])):
        assert all(torch.equal(second[name], value) for name, value in first.items())
    assert read_metrics(tmp_path / "one" / "metrics.jsonl") == read_metrics(tmp_path / "two" / "metrics.jsonl")


@pytest.mark.parametrize("policy", ["skip", "back"])
def test_a_step_that_failed_is_not_in_it(command, tiny_yaml, tmp_path, trained, averaged_in_float64, poisoned, policy):
    poisoned(step=4)
    opts = [*AVERAGED, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", policy, "OUTPUT_DIR", tmp_path / "run"]
    assert command("--config-file", tiny_yaml, *opts) == 0
    steps = [1, 2, 3, 4, 6] if policy == "skip" else [1, 2, 3, 4, 5, 6]
    assert sorted(trained) == steps
    expected = averaged_in_float64([trained[step] for step in steps], DECAY)
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), expected)


def test_before_the_first_step_it_is_what_was_loaded(tiny_yaml, tmp_path):
    opts = ["SOLVER.EMA_DECAY", "0.6", "MODEL.WEIGHTS", "backbone://small", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(tiny_yaml, opts)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    found = trainer.state.eval_model.state_dict()
    assert trainer.state.eval_model is not trainer.student
    assert all(torch.equal(found[name], value) for name, value in trainer.student.state_dict().items())


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["SOLVER.EMA_DECAY", "1.5"], "SOLVER.EMA_DECAY is 1.5; set it to 0 for no average"),
        (
            ["SOLVER.EMA_DECAY", "0.9", "TEST.PRECISE_BN.ENABLED", "True"],
            "SOLVER.EMA_DECAY 0.9: TEST.PRECISE_BN measures the statistics of the weights in training",
        ),
    ],
)
def test_what_can_not_be_followed_is_refused(tiny_yaml, opts, said):
    with pytest.raises(UserError, match=said):
        load_config(tiny_yaml, opts)
