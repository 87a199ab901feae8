"""Detectron2's trainer around a student that learns from a teacher detector."""

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator, verify_results
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, TensorboardXWriter
from torch import Tensor, nn

from nst_det.detection.checkpoint import keep_best, patience_is_over, settle
from nst_det.detection.config import validates
from nst_det.detection.data import StepBatchSampler
from nst_det.detection.distiller import DistilledDetector, backbone_of
from nst_det.detection.solver import is_backbone
from nst_det.detection.trainer import broken_in, step_content, transfer_of
from nst_det.detection.zoo import ClassNames
from nst_det.detectron2.api import distill_from_config, student_of
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import class_list, validation_config
from nst_det.detectron2.data import ImageMapper, build_train_loader
from nst_det.detectron2.evaluator import VocEvaluator
from nst_det.detectron2.modeling import check_frozen_random
from nst_det.engine import distributed
from nst_det.engine.device import amp_dtype, autocast, cast_frozen, compute_line, train_depthwise_in_float32
from nst_det.engine.distributed import broadcast_from_rank0, wait_for_all
from nst_det.engine.io import read_json
from nst_det.engine.keys import FULL_MODEL
from nst_det.engine.loader import end_workers_with_us
from nst_det.engine.metrics import SPEED
from nst_det.engine.nan_guard import SKIP, NonFiniteGuard, NotFinite, gradient_norm, raise_together
from nst_det.engine.progress import waiting
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import seed_everything, seeded
from nst_det.engine.solver import clip_gradients
from nst_det.engine.train_state import AveragedWeights, TrainState
from nst_det.engine.trainer import MetricsHook, RollbackStep, SpeedHook, StopWhenAsked, TrainLoop, WallTime
from nst_det.errors import UserError

log = logging.getLogger(__name__)


def reduce_backbones(model: nn.Module, dtype: torch.dtype, test: bool) -> None:
    """Let the backbones compute in lower precision on the CPU, where Detectron2's mixed precision doesn't work.

    The student's does so in training, and with ``test`` (TEST.AMP) in evaluation too.
    """
    student: Any = student_of(model)
    train_depthwise_in_float32(student.backbone)
    # the heads stay in float32: in bfloat16 a coordinate above 128 has steps of a whole pixel
    detectors: list[tuple[Any, bool]] = [(student, test)]
    if isinstance(model, DistilledDetector):
        detectors.append((model.teacher, True))
    for detector, always in detectors:
        backbone = detector.backbone
        backbone.forward = partial(_reduced, backbone, backbone.forward, dtype, always)


def _reduced(
    backbone: nn.Module,
    forward: Callable[[Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    always: bool,
    images: Tensor,
) -> dict[str, Tensor]:
    with autocast(images.device, dtype if always or backbone.training else None):
        maps = forward(images)
    return {name: map_.float() for name, map_ in maps.items()}


def propose_together(student: nn.Module) -> None:
    """Let proposals that are not finite end the pass in all processes, named; in Detectron2 they end it in one."""
    proposer = getattr(student, "proposal_generator", None)
    if proposer is None:
        return
    forward = proposer.forward

    def propose(images: ImageList, *args: Any, **kwargs: Any) -> Any:
        if not proposer.training:
            return forward(images, *args, **kwargs)
        found, what = None, ""
        try:
            found = forward(images, *args, **kwargs)
        except FloatingPointError as error:
            what = f"the RPN's proposals ({' '.join(str(error).split())})"
        raise_together(bool(what), what)
        return found

    proposer.forward = propose


class FiniteCheck(HookBase):
    """Keeps batch and losses of a pass, and ends the step in all processes where a loss or gradient is not finite.

    A hook of the inner trainer, as only its hooks are called between the backward pass and the optimizer.  It also
    clips the norm of all gradients, which Detectron2's optimizer can't.
    """

    def __init__(self, model: nn.Module, parallel: nn.Module, clip: CfgNode) -> None:
        self.parameters, self.clip = list(model.parameters()), clip
        self.batch: list[dict[str, Any]] = []
        self.losses: dict[str, Any] = {}
        parallel.register_forward_pre_hook(self.see_batch)
        parallel.register_forward_hook(self.see_losses)

    def see_batch(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.batch, self.losses = inputs[0], {}

    def see_losses(self, _: nn.Module, __: Any, losses: Any) -> None:
        self.losses = losses if isinstance(losses, dict) else {}

    def after_backward(self) -> None:
        norm = gradient_norm(self.parameters)
        total = sum(value.detach() for value in self.losses.values()) + norm
        raise_together(not math.isfinite(total))
        if self.clip.CLIP_TYPE == FULL_MODEL:
            clip_gradients(self.parameters, self.clip, norm)


class EvalHook(hooks.EvalHook):
    """Detectron2's, which evaluates after the last step also where that was not made."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class DistillTrainer(TrainLoop, DefaultTrainer):
    """Detectron2's DefaultTrainer; the model it trains is the student inside a ``DistilledDetector``.

    Hooks, data parallelism, schedule, evaluation and events are Detectron2's.  What differs:

    - the model in a checkpoint is the student alone, or with ``SOLVER.EMA_DECAY`` the average of its weights; adapters
      of transfer terms, and the weights in training, are saved with the optimizer's state
    - batches and all random draws depend on the seed and the step, so that a resumed run repeats the undisturbed one
      (``SEED`` not negative)
    - several processes and mixed precision work on the CPU too
    - a loss or gradient that is not finite is handled by ``SOLVER.NON_FINITE``, in all processes alike

    ``cfg`` is from :func:`~nst_det.detectron2.config.load_config`, with its data sets registered; ``student`` is the
    detector alone, ``state`` what a checkpoint has of it besides Detectron2's part.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer makes all of this in its constructor, for a GPU in each process and with the wrapped model
        # in the checkpoint, so its constructor is not called
        TrainLoop.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.distilled = model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.student = student_of(model)
        decay = cfg.SOLVER.EMA_DECAY
        # a copy of the student would have the teacher's hooks
        average = AveragedWeights(self.student, decay, self.build_student(cfg)) if decay else None
        guard = NonFiniteGuard(cfg.SOLVER.NON_FINITE, Path(cfg.OUTPUT_DIR), model)
        self.state = TrainState(self.student, transfer_of(model), guard, average)
        self.device = next(model.parameters()).device
        on_cpu = self.device.type == "cpu"
        dtype = amp_dtype(cfg.SOLVER.AMP, self.device)
        log.info(compute_line(self.device, dtype, cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.AMP.ENABLED))
        if dtype is not None and on_cpu:
            for network in [model] if average is None else [model, average.network]:
                reduce_backbones(network, dtype, cfg.TEST.AMP)
        elif isinstance(model, DistilledDetector):
            cast_frozen(backbone_of(model.teacher), dtype, (nn.Conv2d, nn.Linear, Conv2d))
        parallel = create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {}))
        if dtype is None or on_cpu:
            self._trainer = SimpleTrainer(parallel, data_loader, optimizer)
        else:
            # bf16 has the range of float32, so that no loss needs a scale
            unscaled = torch.amp.GradScaler(enabled=False)
            self._trainer = AMPTrainer(parallel, data_loader, optimizer, grad_scaler=unscaled, precision=dtype)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = BackboneCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            classes=class_list(cfg),
            names=ClassNames.of(cfg.MODEL),
            trainer=weakref.proxy(self),
        )
        self.checkpointer.written = self.state.eval_model
        self.finite = FiniteCheck(model, parallel, cfg.SOLVER.CLIP_GRADIENTS)
        self._trainer.register_hooks([self.finite])
        propose_together(self.student)
        # of a training with a validation split, see settle
        self.validated: dict[str, Any] = {}
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The student, in a ``DistilledDetector`` unless ``METHOD`` is ``ce``."""
        return distill_from_config(cls.build_student(cfg), cfg)

    @classmethod
    def build_student(cls, cfg: CfgNode) -> nn.Module:
        """The detector, drawn under the seed, so that all methods of one seed begin with the same heads."""
        with seeded(cfg.SEED, "init") if cfg.SEED >= 0 else nullcontext():
            student: nn.Module = build_model(cfg)
        return student

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``SOLVER.OPTIMIZER`` and ``BACKBONE_MULTIPLIER``; with their defaults, Detectron2's own optimizer."""
        solver = cfg.SOLVER
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if is_backbone(name) else 1.0,
        )
        on_gpu = next(model.parameters()).is_cuda
        common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "fused": on_gpu, "foreach": not on_gpu}
        if solver.OPTIMIZER == "SGD":
            momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, **common, **momentum)
        else:
            optimizer = torch.optim.AdamW(groups, **common)
        # which clips entries, or each parameter by itself; the norm of all is clipped by a hook
        by_hook = solver.CLIP_GRADIENTS.CLIP_TYPE == FULL_MODEL
        return optimizer if by_hook else maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's, with :class:`~nst_det.detectron2.data.ImageMapper`."""
        return end_workers_with_us(build_detection_test_loader(cfg, dataset_name, mapper=ImageMapper(cfg, False)))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Ours for data sets in ``DATASETS.VOC``; Detectron2's for what Detectron2 registers."""
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind == "nst_voc":
            return VocEvaluator(dataset_name, inference_folder(cfg, dataset_name))
        if kind == "coco":
            return COCOEvaluator(dataset_name, output_dir=str(inference_folder(cfg, dataset_name)))
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise UserError(f"DATASETS.TEST: no evaluator for '{dataset_name}'; name its folder in DATASETS.VOC")

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """As Detectron2's; with TEST.AMP in the training's precision, which on a CPU the backbone has by itself."""
        device = next(model.parameters()).device
        dtype = amp_dtype(cfg.SOLVER.AMP, device) if cfg.TEST.AMP and device.type == "cuda" else None
        with autocast(device, dtype):
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[Any]:
        """Detectron2's hooks, and those that all trainers share; the writers of metrics and checkpoints come last."""
        cfg = self.cfg
        # evaluations during training are made on the validation split where there is one
        evaluation = EvalHook(cfg.TEST.EVAL_PERIOD, self._validate if validates(cfg) else self._test)
        own = [evaluation if isinstance(hook, hooks.EvalHook) else hook for hook in super().build_hooks() if hook]
        saving = [hook for hook in own if isinstance(hook, hooks.PeriodicCheckpointer)]
        return [
            # before the writers of Detectron2's events
            SpeedHook(cfg.SOLVER.IMS_PER_BATCH, self.device),
            *(hook for hook in own if hook not in saving),
            MetricsHook(RunFolder(cfg.OUTPUT_DIR), wandb=cfg.WANDB),
            WallTime(self.state),
            # behind all that writes about a step, so that no kill leaves a gap
            *saving,
            StopWhenAsked(),
        ]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, without TensorBoard's where TENSORBOARD is False."""
        writers: list[EventWriter] = super().build_writers()
        return [one for one in writers if self.cfg.TENSORBOARD or not isinstance(one, TensorboardXWriter)]

    def train(self) -> Any:
        """As Detectron2's; SIGTERM and SIGINT end it after the step, saved."""
        if self.state.guard.needs_first_checkpoint and not self.checkpointer.has_checkpoint():
            self.iter = -1
            self.save_step()
        with EventStorage(self.start_iter) as self.storage:
            super().train()
        if not (self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()):
            return None
        verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def before_step(self) -> None:
        self.storage.iter = self.iter
        super().before_step()

    def after_train(self) -> None:
        self.storage.iter = self.iter
        super().after_train()

    def run_step(self) -> None:
        """As Detectron2's; where a loss or a gradient is not finite, in any process, the optimizer never sees it."""
        if self.cfg.SEED >= 0:
            seed_everything(self.cfg.SEED, "step", self.iter, comm.get_rank())
        self.state.guard.keep_buffers(self.iter)
        try:
            DefaultTrainer.run_step(self)
        except NotFinite as error:
            self._skip_or_roll_back(str(error))
        else:
            # each process saw its own part of the batch
            distributed.average(distributed.running_statistics(self.student))
            if self.state.average is not None:
                self.state.average.update()

    @property
    def scalars(self) -> Mapping[str, float]:
        """Losses, learning rate, validation and speed of this step among Detectron2's events."""
        latest = {name: value for name, (value, at) in self.storage.latest().items() if at == self.iter}
        kept = ("val/", SPEED, "transfer")
        return {k: v for k, v in latest.items() if k == "lr" or "loss" in k or k.startswith(kept)}

    def put_scalars(self, **values: float) -> None:
        self.storage.put_scalars(smoothing_hint=False, **values)

    @property
    def data_seconds(self) -> float:
        """What Detectron2 measured; the main process alone knows how long all wait for data."""
        seconds, at = self.storage.latest().get("data_time", (0.0, -1))
        # a step that was skipped has no events
        return seconds if at == self.iter else 0.0

    def save_step(self) -> None:
        """Save a checkpoint of the step that was made last, by Detectron2's name."""
        self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def _skip_or_roll_back(self, what: str) -> None:
        losses = {name: float(value.detach()) for name, value in self.finite.losses.items()}
        broken = [what] if what else broken_in(self.distilled, losses)
        self.optimizer.zero_grad()
        batch = self.finite.batch
        content = partial(step_content, self.distilled, self.cfg, self.cfg.SEED, batch, losses)
        images = [str(item.get("image_id", item.get("file_name", "?"))) for item in batch]
        if self.state.guard.handle(self.iter, broken, images, content) == SKIP:
            return
        self.state.guard.roll_back(self._load_last, self.save_step)
        self._trainer._data_loader_iter_obj = None
        self.iter = self.start_iter
        raise RollbackStep

    def _load_last(self) -> None:
        self.resume_or_load(resume=True)
        factor = self.cfg.SOLVER.NON_FINITE.LR_FACTOR
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        # the main process will write what the others still read
        wait_for_all()

    def _scores(self, cfg: CfgNode) -> dict[str, Any]:
        # the student alone would still ask the teacher
        model = self.model if self.state.average is None else self.state.eval_model
        with waiting("evaluation") if comm.is_main_process() else nullcontext():
            return dict(self.test(cfg, model))

    def _test(self) -> dict[str, Any]:
        self._last_eval_results = self._scores(self.cfg)
        return self._last_eval_results

    def _validate(self) -> dict[str, Any]:
        """On the validation split; after the last step on ``DATASETS.TEST`` too, with the weights of TEST.SELECT."""
        own = validation_config(self.cfg)
        assert own is not None, "made a hook only where there is a validation split"
        found = self._scores(own)
        folder, done = Path(self.cfg.OUTPUT_DIR), min(self.iter + 1, self.max_iter)
        last: dict[str, Any] = {"step": done}
        if comm.is_main_process():
            figures = read_json(inference_folder(own, own.DATASETS.TEST[0]) / "result.json")
            last = keep_best(folder, self.state.eval_model, class_list(self.cfg), done, figures)
            self.put_scalars(**{f"val/{name}": last[name] for name in ("map", "map_area") if last[name] is not None})
        if done == self.max_iter:
            comm.synchronize()
            self.validated = settle(folder, self.state.eval_model, last, self.cfg.TEST.SELECT)
            self._test()
        self._stop_early(done)
        return {f"validation/{name}": values for name, values in found.items()}

    def _stop_early(self, step: int) -> None:
        if broadcast_from_rank0(lambda: patience_is_over(Path(self.cfg.OUTPUT_DIR), step, self.cfg.TEST)):
            self.max_iter = step
            for hook in self._hooks:
                if isinstance(hook, hooks.PeriodicCheckpointer):
                    # for model_final.pth
                    hook.max_iter = step

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; ``MODEL.WEIGHTS`` may be ``backbone://NAME``, and the loader begins at the right step."""
        super().resume_or_load(resume)
        if self.state.average is not None and not self.state.average.steps:
            self.state.average.restart()
        if self.start_iter:
            log.info("%s: resumed at step %d", self.cfg.OUTPUT_DIR, self.start_iter)
        check_frozen_random(self.student, filled=bool(self.cfg.MODEL.WEIGHTS) or self.start_iter > 0)
        sampler = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(sampler, StepBatchSampler):
            sampler.start = self.start_iter
        self._stop_early(self.start_iter)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.state.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state.load_state_dict(state_dict)
        super().load_state_dict(state_dict)


def inference_folder(cfg: CfgNode, dataset_name: str) -> Path:
    """Return where the evaluation on one of ``DATASETS.TEST`` is written."""
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    return folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder
