"""Stage one: from a config to a backbone file for each method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from fvcore.common.config import CfgNode
from rich.table import Table
from rich.text import Text
from torch import nn

from nst_det.distillation.accuracy import Accuracy, measure
from nst_det.distillation.augment import Views
from nst_det.distillation.build import (
    Network,
    Teacher,
    build_losses,
    copy_of,
    initial_student,
    initial_teacher,
    same_labels,
)
from nst_det.distillation.cache import CacheWriter
from nst_det.distillation.config import check_config, teacher_augment, teacher_solver
from nst_det.distillation.dataloader import Normalizer, StageOneData
from nst_det.distillation.fingerprint import cache_claim, student_claim, teacher_claim
from nst_det.distillation.loop import Teaching, log_shapes, train_side_by_side, warn_of_neighbors
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import checkpoints, would_resume
from nst_det.engine.config import expand_path, plain
from nst_det.engine.device import (
    amp_dtype,
    autocast,
    compute_line,
    default_device,
    gpu_errors_in_one_line,
    loader_workers,
    set_float32_precision,
)
from nst_det.engine.distributed import (
    broadcast_from_rank0,
    copy_from_first,
    is_main_process,
    log_batch,
    start_processes,
    wait_for_all,
)
from nst_det.engine.io import write_text
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import LABELS_ONLY, Method, TransferLoss, build_transfer, parse_method
from nst_det.models import (
    Card,
    check_name,
    count_parameters,
    input_contract,
    load_into,
    registry_folders,
    save_backbone,
)
from nst_det.models.sync_norm import sync_batch_norm

log = logging.getLogger(__name__)


def card_of(network: Network, data: StageOneData, **fields: Any) -> Card:
    """The card of a network that was trained on ``data``."""
    node = data.config.DATA
    return Card(
        arch=network.arch,
        num_classes=len(data.classes),
        arch_kwargs=network.arch_kwargs,
        classes=data.classes,
        input=input_contract(node.MEAN, node.STD, "RGB", node.IMAGE_SIZE),
        data=data.description(),
        seed=data.config.SEED,
        **fields,
    )


def finish(student: StudentTrainer, network: Network, data: StageOneData, path: Path, **fields: Any) -> dict[str, Any]:
    """Write the backbone file of a student that did all its steps, then its result; drop its checkpoints.

    Args:
        student: evaluated after its last step.
        network: arch and arguments of its model.
        data: what it was trained on.
        path: of the backbone file.
        fields: further fields of the card.

    Returns:
        The result, as it stands in ``result.json``.
    """
    accuracy = student.accuracy
    assert accuracy is not None, "a student is evaluated before it is finished"
    card = card_of(network, data, method=student.word, weights=dict(student.transfer.weights), **fields)
    card.top1, card.top5, card.steps = accuracy.top1, accuracy.top5, student.step
    card = save_backbone(path, student.eval_model, card)
    result = {
        "method": student.word,
        "weights": card.weights,
        "backbone": str(path),
        "sha256": card.sha256,
        "name": path.stem,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "top1_best": student.best.top1,
        "step_best": student.best_step,
        "seconds": student.seconds,
        "steps": student.step,
        "seed": data.config.SEED,
        "params": count_parameters(student.model),
    }
    student.folder.finish(result)
    for checkpoint in checkpoints(student.folder.checkpoints):
        checkpoint.unlink(missing_ok=True)
    return result


def distill(config: CfgNode) -> dict[str, dict[str, Any]]:
    """Train the teacher, if it must be, and the students of all methods side by side.

    What is done already in OUTPUT_DIR is not done again; what was stopped resumes from its newest checkpoint, to
    the same bits on a CPU.  Under torchrun the processes share out every batch, and the first one alone reads and
    writes OUTPUT_DIR and the registry.

    Args:
        config: see :func:`nst_det.distillation.config.get_defaults`.

    Returns:
        ``result.json`` of the teacher (under ``teacher``, where there is one) and of every student, by method.

    Raises:
        UserError: something in config, data or weights can't be used, the teacher is worse than expected, or a GPU
            fails.
    """
    check_config(config)
    folder = Path(expand_path(config.OUTPUT_DIR, "OUTPUT_DIR"))
    smaller = "raise SOLVER.ACCUMULATE or lower SOLVER.IMS_PER_BATCH or DATA.IMAGE_SIZE, in another OUTPUT_DIR"

    def resumes() -> str:
        words = [f"students/{word}" for word in parse_methods(config.METHODS)]
        begun = [RunFolder(folder / name) for name in ("teacher", *words) if (folder / name).is_dir()]
        return would_resume([checkpoints(run.checkpoints) for run in begun if not run.done])

    with gpu_errors_in_one_line(f"{smaller}, or name fewer METHODS at a time", resumes):
        start_processes(on_cpu=False)
        return StageOne(config).run()


class StageOne:
    """What the steps of one call share."""

    def __init__(self, config: CfgNode) -> None:
        self.device = default_device()
        self.config = config = config.clone()
        config.defrost()
        config.DATALOADER.NUM_WORKERS = loader_workers(config.DATALOADER.NUM_WORKERS, self.device.type == "cpu")
        config.freeze()
        self.output = Path(expand_path(config.OUTPUT_DIR, "OUTPUT_DIR"))
        self.registry = Path(expand_path(config.REGISTRY, "REGISTRY")) if config.REGISTRY else registry_folders()[0]
        self.methods = parse_methods(config.METHODS)
        self.teacher_file = self._file(f"{config.NAME}-teacher")
        self.student_files = {word: self._file(f"{config.NAME}-{word}-s{config.SEED}") for word in self.methods}
        self.data = StageOneData(config)
        set_float32_precision(config.FLOAT32_PRECISION, self.device)
        self.normalize = Normalizer(config.DATA.MEAN, config.DATA.STD, self.device)

    def _file(self, name: str) -> Path:
        return self.registry / f"{check_name(name)}.safetensors"

    def run(self) -> dict[str, dict[str, Any]]:
        """All of it; see :func:`distill`."""
        amp, workers = self.config.SOLVER.AMP, self.config.DATALOADER.NUM_WORKERS
        log.info(compute_line(self.device, amp_dtype(amp, self.device), workers, amp.ENABLED))
        if is_main_process():
            write_text(self.output / "config.yaml", self.config.dump())
        classes = self.data.classes
        student = initial_student(self.config, len(classes))
        needed = not self.methods or any(method.names for method in self.methods.values())
        teacher = initial_teacher(self.config, classes) if needed else None
        # before hours of training, not after: every method's levels, terms and options
        labels_shared = teacher is not None and same_labels(teacher, classes)
        losses = build_losses(self.config, self.methods, student, teacher, labels_shared)
        if teacher is not None:
            log_shapes(losses, student, teacher, self.config.DATA.IMAGE_SIZE)
        results = {}
        if teacher is not None:
            results["teacher"] = self.prepare_teacher(teacher, labels_shared)
        return results | self.train_students(student, teacher, losses, results.get("teacher", {}))

    def prepare_teacher(self, network: Network, labels_shared: bool) -> dict[str, Any]:
        """Train or take the teacher, measure it, and stop if it is worse than expected.

        Raises:
            UserError: it is worse than TEACHER.EXPECTED_TOP1, or that can't be measured.
        """
        folder = RunFolder(self.output / "teacher")
        claim = teacher_claim(self.config, self.data.fingerprint, network.sha256)
        with folder.opened(claim) if is_main_process() else nullcontext():
            done = broadcast_from_rank0(lambda: folder.done)
            if not done and not network.sha256 and self.config.TEACHER.TRAIN:
                self._train_teacher(network, folder)
            elif not done:
                self._take_teacher(network, folder, labels_shared)
            result = broadcast_from_rank0(folder.result)
        if not network.sha256:
            if is_main_process():
                load_into(network.model, result["backbone"])
            copy_from_first(network.model.to(self.device))
            network.model.cpu()
        self._gate(result)
        return result

    def _train_teacher(self, network: Network, folder: RunFolder) -> None:
        solver, augment = teacher_solver(self.config), teacher_augment(self.config)
        teacher = self._student("teacher", network, build_transfer(LABELS_ONLY), solver, folder)
        self._train([teacher], None, solver, augment, "teacher")
        if is_main_process():
            finish(teacher, network, self.data, self.teacher_file, config=self._config())

    def _take_teacher(self, network: Network, folder: RunFolder, labels_shared: bool) -> None:
        """A teacher whose weights are there already: measure it, and give plain weights a card."""
        accuracy = None
        if labels_shared:
            model = copy_of(network, self.device)
            accuracy = self._measure({"teacher": model}, teacher_solver(self.config))["teacher"]
        if is_main_process():
            self._keep_teacher(network, folder, accuracy)

    def _keep_teacher(self, network: Network, folder: RunFolder, accuracy: Accuracy | None) -> None:
        path, sha256 = network.source, network.sha256
        if network.card is None:
            path = self.teacher_file
            source = "timm" if network.source is None else network.source.name
            card = card_of(network, self.data, method=f"weights of {source}", config=self._config())
            card.top1, card.top5 = (accuracy.top1, accuracy.top5) if accuracy else (None, None)
            sha256 = save_backbone(path, network.model, card).sha256
        folder.finish(
            {
                "method": "teacher",
                "backbone": str(path),
                "sha256": sha256,
                "name": path.stem if path else "",
                "top1": accuracy.top1 if accuracy else None,
                "top5": accuracy.top5 if accuracy else None,
                "seconds": 0.0,
                "steps": 0,
                "seed": self.config.SEED,
                "params": count_parameters(network.model),
            }
        )

    def _gate(self, result: dict[str, Any]) -> None:
        expected, top1 = self.config.TEACHER.EXPECTED_TOP1, result["top1"]
        if expected and top1 is None:
            raise UserError(
                "TEACHER.EXPECTED_TOP1: the teacher's classes are not those of the data, so its accuracy can't be "
                "measured; set it to 0 to take it anyway"
            )
        if expected and top1 < expected:
            raise UserError(
                f"TEACHER.EXPECTED_TOP1: the teacher {result['name']} has top-1 {top1:.4f} on the validation split, "
                f"at least {expected:.4f} is expected; train it longer, name other weights, or lower the expectation"
            )
        log.info("teacher %s: top-1 %s", result["name"], "not measured" if top1 is None else f"{top1:.4f}")

    def train_students(
        self,
        network: Network,
        teacher: Network | None,
        losses: Mapping[str, TransferLoss],
        teacher_result: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Train what isn't done; results of all methods by word."""
        sha256 = str(teacher_result.get("sha256", ""))
        about = {}
        if teacher is not None:
            about = {key: teacher_result[key] for key in ("name", "top1", "sha256")} | {"arch": teacher.arch}
        results: dict[str, dict[str, Any]] = {}
        with ExitStack() as held:
            unfinished: list[StudentTrainer] = []
            for word, method in self.methods.items():
                folder = RunFolder(self.output / "students" / word)
                if is_main_process():
                    held.enter_context(folder.opened(student_claim(self.config, method, self.data.fingerprint, sha256)))
                if broadcast_from_rank0(lambda folder=folder: folder.done):  # type: ignore[misc]
                    results[word] = broadcast_from_rank0(folder.result)
                else:
                    unfinished.append(self._student(word, network, losses[word], self.config.SOLVER, folder))
            if unfinished:
                asked = teacher is not None and any(student.needs_teacher for student in unfinished)
                teaching = self._teaching(teacher, network, losses, sha256) if teacher is not None and asked else None
                title = f"{len(unfinished)} students" if len(unfinished) > 1 else unfinished[0].word
                solver, augment = self.config.SOLVER, self.config.DATA.AUGMENT
                self._train(unfinished, teaching, solver, augment, title, self.data.views())
            for student in unfinished:
                path = self.student_files[student.word]
                fields = {"teacher": about if student.needs_teacher else {}, "config": self._config()}
                if is_main_process():
                    finish(student, network, self.data, path, **fields)
                results[student.word] = broadcast_from_rank0(student.folder.result)
        return {word: results[word] for word in self.methods}

    def _teaching(
        self, network: Network, student: Network, losses: Mapping[str, TransferLoss], sha256: str
    ) -> Teaching:
        """The teacher, or where CACHE.DIR is set, its cached outputs for every view."""
        precision = amp_dtype(self.config.SOLVER.AMP, self.device)
        reads = {level for loss in losses.values() for level in loss.teacher_levels}
        teacher = Teacher(copy_of(network, self.device), reads, precision)
        views = self.data.views()
        if not self.config.CACHE.DIR or views is None:
            return teacher
        arch = " ".join([network.arch, *(f"{key}={value}" for key, value in sorted(network.arch_kwargs.items()))])
        computed = str(precision or torch.float32).removeprefix("torch.")
        claim = cache_claim(self.config, self.data.fingerprint, sha256, arch, computed)
        writer = CacheWriter(self.config, views, teacher, copy_of(student, self.device), losses, claim)
        # the main process writes what isn't there; the others find all of it
        cache = writer.open() if is_main_process() else None
        wait_for_all()
        return cache or writer.open()

    def _student(
        self, word: str, network: Network, loss: TransferLoss, solver: CfgNode, folder: RunFolder
    ) -> StudentTrainer:
        model = copy_of(network, self.device)
        if solver.SYNC_BN:
            model, loss = sync_batch_norm(model), cast(TransferLoss, sync_batch_norm(loss))
        copy_from_first(model, loss.to(self.device))
        return StudentTrainer(
            word,
            model,
            network.levels,
            loss,
            solver,
            self.config.SEED,
            folder,
            amp_dtype(solver.AMP, self.device),
            self.config.TRANSFER.WARMUP_ITERS,
            {
                "arch": network.arch,
                "num_classes": network.num_classes,
                "arch_kwargs": network.arch_kwargs,
                "float32_precision": self.config.FLOAT32_PRECISION,
            },
        )

    def _train(
        self,
        students: Sequence[StudentTrainer],
        teacher: Teaching | None,
        solver: CfgNode,
        augment: CfgNode,
        title: str,
        views: Views | None = None,
    ) -> None:
        config = self.config
        with ExitStack() as opened:
            for student in students:
                opened.callback(student.close)
                student.start(config.TENSORBOARD, config.WANDB)
            log_batch(solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.BASE_LR)
            warn_of_neighbors(students, solver)
            train_side_by_side(
                students,
                teacher,
                self.data.train_steps(augment, solver.IMS_PER_BATCH, views, solver.ACCUMULATE),
                self.normalize,
                lambda active: self._measure({student.word: student.eval_model for student in active}, solver),
                last=solver.MAX_ITER,
                eval_period=config.TEST.EVAL_PERIOD,
                checkpoint_period=solver.CHECKPOINT_PERIOD,
                log_period=config.LOG_PERIOD,
                images=solver.IMS_PER_BATCH,
                title=title,
            )

    def _measure(self, networks: Mapping[str, nn.Module], solver: CfgNode) -> dict[str, Accuracy]:
        precision = amp_dtype(solver.AMP, self.device)
        return measure(networks, self.data.validation(), self.normalize, lambda: autocast(self.device, precision))

    def _config(self) -> dict[str, Any]:
        return dict(plain(self.config))


def parse_methods(words: Sequence[str]) -> dict[str, Method]:
    """The methods of METHODS by their canonical words.

    Raises:
        UserError: a word that isn't a method, or one method twice.
    """
    methods: dict[str, Method] = {}
    for word in words:
        try:
            method = parse_method(word)
        except ValueError as error:
            raise UserError(f"METHODS: {error}") from error
        if method.word in methods:
            raise UserError(f"METHODS: {method.word} stands there twice; leave one out")
        methods[method.word] = method
    return methods


def results_table(results: Mapping[str, Mapping[str, Any]], folder: str) -> Table:
    """One row for the teacher and each method.

    Args:
        results: ``result.json`` by method, ``teacher`` among them.
        folder: named in the title.
    """
    table = Table(title=Text(f"stage one in {folder}"), title_justify="left")
    table.add_column("method")
    for heading in ("top-1", "top-5", "best top-1", "steps", "seconds", "params"):
        table.add_column(heading, justify="right")
    table.add_column("backbone", overflow="fold")
    for word, result in results.items():
        table.add_row(
            Text(word),
            _percent(result["top1"]),
            _percent(result["top5"]),
            _percent(result.get("top1_best")),
            str(result["steps"]),
            f"{result['seconds']:.1f}",
            f"{result['params'] / 1e6:.2f} M",
            Text(result["name"]),
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
