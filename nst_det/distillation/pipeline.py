"""Stage one: from a config to a backbone file for each method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from rich.table import Table
from rich.text import Text
from torch import nn

from nst_det.distillation.accuracy import Scores, measure
from nst_det.distillation.build import (
    Network,
    Teacher,
    TeacherView,
    build_losses,
    copy_of,
    image_size,
    initial_student,
    initial_teacher,
    log_shapes,
    student_classes,
    teacher_pixels,
    warn_of_few,
    warn_of_unread,
    without_head,
)
from nst_det.distillation.cache import CacheWriter
from nst_det.distillation.config import HEADS, check_config, teacher_augment, teacher_solver
from nst_det.distillation.dataloader import StageOneData, TrainingBatches
from nst_det.distillation.fingerprint import cache_claim, student_claim, teacher_claim
from nst_det.distillation.loop import StageOneTrainer, Teaching, warn_of_neighbors
from nst_det.distillation.trainer import StudentTrainer
from nst_det.distillation.validation import Validation
from nst_det.engine.checkpoint import checkpoints, would_resume
from nst_det.engine.compilation import check_compile
from nst_det.engine.config import expand_path, plain
from nst_det.engine.device import (
    amp_dtype,
    compute_line,
    default_device,
    gpu_errors_in_one_line,
    loader_workers,
    set_cudnn_benchmark,
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
from nst_det.engine.keys import OFF
from nst_det.engine.progress import waiting
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import LABELS_ONLY, Method, TransferLoss, build_transfer, parse_method
from nst_det.models import (
    Card,
    check_name,
    count_parameters,
    input_contract,
    load_card,
    load_into,
    registry_folders,
    save_backbone,
)

log = logging.getLogger(__name__)


def distill(config: CfgNode) -> dict[str, dict[str, Any]]:
    """Train the teacher, if it must be, and the students of all methods; return ``result.json`` of each by method.

    What is done already in OUTPUT_DIR is not done again; what was stopped resumes from its newest checkpoint, to
    the same bits on a CPU.  Under torchrun the processes share out every batch, and the main process alone reads and
    writes OUTPUT_DIR and the registry.
    """
    check_config(config)
    folder = Path(expand_path(config.OUTPUT_DIR, "OUTPUT_DIR"))
    smaller = "raise SOLVER.ACCUMULATE or lower SOLVER.IMS_PER_BATCH or DATA.IMAGE_SIZE, in another OUTPUT_DIR"

    def resumes() -> str:
        names = ["teacher", *(f"students/{name}" for name in parse_methods(config.METHODS))]
        begun = [RunFolder(folder / name) for name in names if (folder / name).is_dir()]
        return would_resume([checkpoints(run.checkpoints) for run in begun if not run.done])

    with gpu_errors_in_one_line(f"{smaller}, or name fewer METHODS at a time", resumes):
        start_processes(on_cpu=False)
        return StageOne(config).run()


class StageOne:
    """One call of :func:`distill`."""

    def __init__(self, config: CfgNode) -> None:
        self.device = default_device()
        self.config = config = config.clone()
        config.defrost()
        config.DATALOADER.NUM_WORKERS = loader_workers(config.DATALOADER.NUM_WORKERS)
        config.freeze()
        for solver in (config.SOLVER, teacher_solver(config)):
            check_compile(solver.COMPILE, self.device)
        self.output = Path(expand_path(config.OUTPUT_DIR, "OUTPUT_DIR"))
        self.registry = Path(expand_path(config.REGISTRY, "REGISTRY")) if config.REGISTRY else registry_folders()[0]
        self.methods = parse_methods(config.METHODS)
        # of a head that learns from a teacher of images without labels
        self.class_names: list[str] = []
        self.teacher_file = self._file("teacher")
        self.student_files = {name: self._file(f"{name}-s{config.SEED}") for name in self.methods}
        with waiting("loading data"):
            self.data = StageOneData(config)
        set_float32_precision(config.FLOAT32_PRECISION, self.device)
        set_cudnn_benchmark(config.CUDNN_BENCHMARK, self.device)

    def _file(self, name: str) -> Path:
        return self.registry / f"{check_name(f'{self.config.NAME}-{name}')}.safetensors"

    def run(self) -> dict[str, dict[str, Any]]:
        """Return ``result.json`` of the teacher, where there is one, and of all students, by method."""
        amp, workers = self.config.SOLVER.AMP, self.config.DATALOADER.NUM_WORKERS
        log.info(compute_line(self.device, amp_dtype(amp, self.device), workers, amp.ENABLED))
        classes, labelled = self.data.classes, self.config.DATA.LABELS
        needed = not self.methods or any(method.names for method in self.methods.values())
        teacher = initial_teacher(self.config, classes) if needed else None
        labels_shared = teacher is not None and teacher.shares_labels(classes, labelled)
        if not labelled and teacher is not None and teacher.card is not None:
            self.class_names = teacher.card.classes
        names = classes if labelled else self.class_names
        student = initial_student(self.config, student_classes(self.config, classes, teacher), names)
        # before hours of training, not after: every method's levels, terms and options
        losses = build_losses(self.config, self.methods, student, teacher, labels_shared)
        if teacher is None:
            return self.train_students(student, None, losses, {})
        log_shapes(losses, student, teacher, self.config.DATA.IMAGE_SIZE, image_size(self.config, "TEACHER"))
        if not labelled:
            warn_of_unread(losses, student)
            warn_of_few(self.data.folder)
        result = self.prepare_teacher(teacher, labels_shared)
        return {"teacher": result, **self.train_students(student, teacher, losses, result)}

    def prepare_teacher(self, network: Network, labels_shared: bool) -> dict[str, Any]:
        """Train the teacher, or take it as it is and measure it; refuse one that is worse than expected."""
        folder = RunFolder(self.output / "teacher")
        inputs = (self.data.whole_fingerprint, network.sha256, network.to_train, self.data.probe_fingerprint)
        claim = teacher_claim(self.config, *inputs)
        with folder.opened(claim) if is_main_process() else nullcontext():
            if not broadcast_from_rank0(lambda: folder.done):
                if network.to_train:
                    solver, augment = teacher_solver(self.config), teacher_augment(self.config)
                    teacher = self._student("teacher", network, build_transfer(LABELS_ONLY), solver, folder)
                    batches = self.data.training(augment, solver, whole=True)
                    self._train([teacher], None, batches, solver, Validation(self.data))
                    self._finish(teacher, network, self.teacher_file)
                else:
                    self._take_teacher(network, folder, labels_shared)
            result = broadcast_from_rank0(folder.result)
        if network.to_train or not network.sha256:
            if is_main_process():
                load_into(network.model, _finished(folder, self.teacher_file)["backbone"])
            copy_from_first(network.model.to(self.device))
            network.model.cpu()
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
        judge = result["measure"]
        measured = f"{HEADS[judge]} {result[judge]:.4f}" if judge else "top-1 not measured"
        log.info("teacher %s: %s", result["name"], measured)
        return result

    def _take_teacher(self, network: Network, folder: RunFolder, labels_shared: bool) -> None:
        """Measure a teacher whose weights are there already, and give plain weights a card."""
        scores, view = Scores(), TeacherView(self.config).to(self.device)
        precision = amp_dtype(teacher_solver(self.config).AMP, self.device)
        if not self.config.DATA.LABELS:
            asked = Teacher(copy_of(network, self.device), (), precision, view)
            scores = Validation(self.data).without_labels({"": asked.raw})[""]
        elif labels_shared:
            model = nn.Sequential(view, copy_of(network, self.device))
            scores = measure({"": model}, self.data.evaluation("val"), self.data.normalize, precision)[""]
        if not is_main_process():
            return
        path, card = network.source, network.card
        if path is None or card is None:
            method, path = f"weights of {path.name if path else 'timm'}", self.teacher_file
            card = save_backbone(path, network.model, self._card(network, scores, method))
        params = count_parameters(network.model)
        taken = self._card(network, scores, "teacher", sha256=card.sha256, params=params, steps=0)
        folder.finish(result_of(taken, path, 0.0, scores))

    def train_students(
        self,
        network: Network,
        teacher: Network | None,
        losses: Mapping[str, TransferLoss],
        teacher_result: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Train the students that aren't done; return the results of all by method."""
        config, data, sha256 = self.config, self.data, str(teacher_result.get("sha256", ""))
        # of a method that reads no logits
        headless = network if config.DATA.LABELS else without_head(network)
        networks = {name: network if "logits" in loss.reads("student") else headless for name, loss in losses.items()}
        results: dict[str, dict[str, Any]] = {}
        with ExitStack() as held:
            unfinished: list[StudentTrainer] = []
            for name, method in self.methods.items():
                folder, file = RunFolder(self.output / "students" / name), self.student_files[name]
                if is_main_process():
                    inputs = (data.fingerprint, sha256, network.sha256, data.probe_fingerprint)
                    held.enter_context(folder.opened(student_claim(config, method, *inputs)))
                result = broadcast_from_rank0(
                    lambda run=folder, file=file: _finished(run, file) if run.done else None  # type: ignore[misc]
                )
                if result is None:
                    unfinished.append(self._student(name, networks[name], losses[name], config.SOLVER, folder))
                else:
                    results[name] = result
            if is_main_process():
                # none of its folders has refused it
                write_text(self.output / "config.yaml", config.dump())
            if unfinished:
                asked = teacher is not None and any(student.needs_teacher for student in unfinished)
                one = self._teacher(teacher, losses) if teacher is not None and asked else None
                teaching = self._teaching(teacher, one, network, losses, sha256) if teacher and one else None
                batches = self.data.training(config.DATA.AUGMENT, config.SOLVER, self.data.views())
                self._train(unfinished, teaching, batches, config.SOLVER, Validation(self.data, one))
            for student in unfinished:
                about = {}
                if teacher is not None and student.needs_teacher:
                    about = {key: teacher_result[key] for key in ("name", "top1", "sha256")} | {"arch": teacher.arch}
                self._finish(student, networks[student.name], self.student_files[student.name], teacher=about)
                results[student.name] = broadcast_from_rank0(student.folder.result)
        return {name: results[name] for name in self.methods}

    def _teacher(self, network: Network, losses: Mapping[str, TransferLoss]) -> Teacher:
        precision = amp_dtype(self.config.SOLVER.AMP, self.device)
        reads = {level for loss in losses.values() for level in loss.teacher_levels}
        view = None if network.to_train else TeacherView(self.config).to(self.device)
        # a cache has the outputs of the network as it is
        mode = OFF if self.config.CACHE.DIR else self.config.SOLVER.COMPILE
        return Teacher(copy_of(network, self.device), reads, precision, view, mode)

    def _teaching(
        self, network: Network, teacher: Teacher, student: Network, losses: Mapping[str, TransferLoss], sha256: str
    ) -> Teaching:
        """Return the teacher, or where CACHE.DIR is set, its cached outputs for every view."""
        views = self.data.views()
        if not self.config.CACHE.DIR or views is None:
            return teacher
        arch = " ".join([network.arch, *(f"{key}={value}" for key, value in sorted(network.arch_kwargs.items()))])
        computed = str(teacher.precision or torch.float32).removeprefix("torch.")
        claim = cache_claim(self.config, self.data.fingerprint, sha256, arch, computed)
        writer = CacheWriter(self.config, views, teacher, copy_of(student, self.device), losses, claim)
        # the main process writes what isn't there; the others find all of it
        cache = writer.open() if is_main_process() else None
        wait_for_all()
        return cache or writer.open()

    def _student(
        self, name: str, network: Network, loss: TransferLoss, solver: CfgNode, folder: RunFolder
    ) -> StudentTrainer:
        return StudentTrainer(name, network, loss, self.config, solver, amp_dtype(solver.AMP, self.device), folder)

    def _train(
        self,
        students: Sequence[StudentTrainer],
        teacher: Teaching | None,
        batches: TrainingBatches,
        solver: CfgNode,
        validate: Validation,
    ) -> None:
        with ExitStack() as opened:
            for student in students:
                opened.callback(student.close)
                student.resume()
            log_batch(solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.BASE_LR)
            warn_of_neighbors(students, solver)
            StageOneTrainer(self.data, batches, students, teacher, solver, validate).train()

    def _finish(self, student: StudentTrainer, network: Network, path: Path, **fields: Any) -> None:
        """Write the backbone file of a student that made all its steps, then its result; drop its checkpoints."""
        if not is_main_process():
            return
        weights = dict(student.transfer.weights)
        card = self._card(network, student.scores, student.name, weights=weights, steps=student.step, **fields)
        card = save_backbone(path, student.eval_model, card)
        result = result_of(card, path, student.seconds, student.scores)
        judge = result["measure"]
        best = {f"{judge}_best": student.best.get(judge, 0.0), "step_best": student.best_step}
        start = {f"{name}_start": value for name, value in student.start.items()}
        student.folder.finish(result | {"weights": weights} | best | start)
        for checkpoint in checkpoints(student.folder.checkpoints):
            checkpoint.unlink(missing_ok=True)

    def _card(self, network: Network, scores: Scores, method: str, **fields: Any) -> Card:
        taken = not network.to_train and method not in self.methods
        mean, std = teacher_pixels(self.config) if taken else (self.config.DATA.MEAN, self.config.DATA.STD)
        size = image_size(self.config, "TEACHER" if taken else "STUDENT")
        classes = self.data.classes if network.has_labels(self.data.classes) else []
        if not self.config.DATA.LABELS and network.num_classes:
            classes = self.class_names
        return Card(
            arch=network.arch,
            num_classes=network.num_classes,
            arch_kwargs=network.arch_kwargs,
            start=network.start,
            classes=classes,
            input=input_contract(mean, std, "RGB", size),
            method=method,
            data=self.data.description(whole=method not in self.methods),
            top1=scores.get("top1"),
            top5=scores.get("top5"),
            measured={name: value for name, value in scores.items() if name not in ("top1", "top5")},
            seed=self.config.SEED,
            config=dict(plain(self.config)),
            **fields,
        )


def result_of(card: Card, path: Path, seconds: float, scores: Scores) -> dict[str, Any]:
    """Return the content of ``result.json`` for a backbone file; ``measure`` names what of it the network is judged by.

    It is "" for a teacher of which nothing was measured.
    """
    keys = ("method", "sha256", "top1", "top5", "steps", "seed", "params")
    about = {"backbone": str(path), "name": path.stem, "val_images": card.data["validation_images"], "seconds": seconds}
    return {key: getattr(card, key) for key in keys} | scores | {"measure": next(iter(scores), "")} | about


def _finished(folder: RunFolder, path: Path) -> dict[str, Any]:
    """Return a run's result with the backbone's path as it is now, if the folders were moved; refuse another's file."""
    result = folder.result()
    if not path.is_file():
        return result
    if load_card(path).sha256 != result["sha256"]:
        raise UserError(
            f"{path}: not the file that {folder.path} wrote: a run of the same NAME in another OUTPUT_DIR has written "
            f"it since; put that file back, or remove {folder.path} to make it again with a NAME of its own"
        )
    return result | {"backbone": str(path)}


def parse_methods(names: Sequence[str]) -> dict[str, Method]:
    """Return the methods of METHODS by their canonical names."""
    methods: dict[str, Method] = {}
    for name in names:
        try:
            method = parse_method(name)
        except ValueError as error:
            raise UserError(f"METHODS: {error}") from error
        if method.word in methods:
            raise UserError(f"METHODS: {method.word} is named twice; leave one out")
        methods[method.word] = method
    return methods


def results_table(results: Mapping[str, Mapping[str, Any]], folder: str) -> Table:
    """Return one row for the teacher and each method, from each one's ``result.json``."""
    table = Table(title=Text(f"stage one in {folder}"), title_justify="left")
    table.add_column("method")
    # what all are judged by comes first
    names = [name for name in HEADS if any(result.get(name) is not None for result in results.values())]
    names = names or ["top1"]
    more = {f"{names[0]}_start": "at the start", f"{names[0]}_best": "best"}
    heads = {name: HEADS[name] for name in names} | {key: f"{HEADS[names[0]]} {word}" for key, word in more.items()}
    heads = {key: head for key, head in heads.items() if any(key in result for result in results.values())}
    for heading in (*heads.values(), "steps", "seconds", "params"):
        table.add_column(heading, justify="right")
    table.add_column("backbone", overflow="fold")
    for name, result in results.items():
        accuracies = [result.get(key) for key in heads]
        table.add_row(
            Text(name),
            *("" if value is None else f"{100 * value:.1f} %" for value in accuracies),
            str(result["steps"]),
            f"{result['seconds']:.1f}",
            f"{result['params'] / 1e6:.2f} M",
            Text(result["name"]),
        )
    return table
