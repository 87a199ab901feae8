import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nst_det.detection.pipeline import train_detector
from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError


def test_tensorboard_has_the_numbers_of_the_metrics(on_shapes, tmp_path):
    train_detector(on_shapes(changes={"TENSORBOARD": True, "SOLVER.MAX_ITER": 3}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", speed=True)
    (event,) = events.Scalars("speed/images_per_second")
    assert (event.step, event.value) == (2, pytest.approx(rows[2]["speed/images_per_second"], rel=1e-6))
    for name in ("loss_cls", "loss_rpn_loc", "total_loss", "lr"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [0, 1, 2]
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_nothing_more_is_written_unless_asked_and_a_done_run_may_be_asked_again(on_shapes, tmp_path):
    result = train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 1}))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb").exists()
    assert train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 1, "TENSORBOARD": True})) == result


def test_wandb_is_refused_before_anything_is_started_where_it_is_not_installed(on_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("nst_det.engine.metrics.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="WANDB 'shapes': wandb is not installed"):
        on_shapes(changes={"WANDB": "shapes"})
    assert not (tmp_path / "run").exists()
