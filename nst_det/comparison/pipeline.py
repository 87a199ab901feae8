"""A comparison from its config to its report."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fvcore.common.config import CfgNode
from rich.markup import escape
from rich.table import Table

import nst_det.report
from nst_det.comparison.collect import build_results
from nst_det.comparison.config import Comparison
from nst_det.comparison.cost import measure_costs
from nst_det.comparison.display import ProgressDisplay, steps_done
from nst_det.comparison.estimate import STEPS, Estimate, cells, estimate, gpu_shortage, total, wall_seconds
from nst_det.comparison.launch_local import Command, Launcher, LocalLauncher, Machine, run_plan, this_machine
from nst_det.comparison.launch_ray import RayLauncher, connected
from nst_det.comparison.plan import (
    DATA,
    STUDENTS,
    Run,
    backbone_folder,
    make_plan,
    run_config,
    teacher_detector_name,
    total_steps,
)
from nst_det.comparison.result import BASELINE, IMAGENET, MAP, PUBLISHED_STARTS, TOP1, ComparisonResult
from nst_det.comparison.stages import (
    check_backbones,
    check_classifier,
    check_data_folders,
    check_data_sets,
    check_detector_losses,
    check_distill_losses,
    check_published,
    merge_stage,
)
from nst_det.detection.fingerprint import of_weights
from nst_det.distillation.fingerprint import student_claim
from nst_det.engine.config import flat, plain, read_yaml
from nst_det.engine.format import duration, print_table, size
from nst_det.engine.io import read_json, write_text
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import RunFailed, UserError
from nst_det.losses import parse_method

log = logging.getLogger(__name__)


def compare(
    comparison: Comparison, jobs: int = 0, command: Command | None = None, ray_address: str | None = None
) -> ComparisonResult:
    """Do what is not done yet, then write the report.

    A row with a run whose loss or gradient is not finite is left out, and the result says why; without the baseline
    there is no result. ``jobs`` 0 takes the config's JOBS; ``command`` gives other command lines than this package's
    own; ``ray_address`` is that of the Ray cluster that does the runs, "" for one on this machine.
    """
    machine = this_machine(jobs or comparison.jobs)
    runs = make_plan(comparison)
    check_folders(comparison, runs)
    check_data(comparison)
    configs = checked_configs(comparison, runs)
    folder = comparison.folder
    with (
        RunFolder(folder).opened(comparison.claim, comparison.inputs()),
        nullcontext() if ray_address is None else connected(ray_address) as ray,
    ):
        for run in (run for run in runs if not run.done):
            for path in run.folders:
                # it may end otherwise now
                RunFolder(path).not_finite_path.unlink(missing_ok=True)
        missing: dict[str, str] = {}
        while True:
            launcher = RayLauncher(ray, runs, folder, command) if ray else LocalLauncher(folder, machine, command)
            ended = launch_rows(comparison, runs, configs, machine, launcher)
            if not ended:
                break
            missing |= ended
            comparison = without_rows(comparison, ended)
            runs = make_plan(comparison)
            configs = run_configs(comparison, runs)
        results = build_results(comparison, runs, measure_costs(runs, configs, folder), missing)
        results.save(folder / "report" / "results.json")
        nst_det.report.write_report(results, folder / "report", folder)
    return results


def launch_rows(
    comparison: Comparison, runs: Sequence[Run], configs: Mapping[str, CfgNode], machine: Machine, launcher: Launcher
) -> dict[str, str]:
    """Do the runs; return the rows of which one was not finite, and why, unless nothing could be compared without."""
    try:
        launch(runs, configs, comparison.folder, machine, launcher)
    except RunFailed as error:
        ended = not_finite_rows(comparison, runs)
        if not ended or comparison.baseline in ended or ended.keys() >= comparison.methods.keys():
            raise
        log.warning("%s; the other rows go on without %s", error, ", ".join(ended))
        return ended
    return {}


def not_finite_rows(comparison: Comparison, runs: Sequence[Run]) -> dict[str, str]:
    """Return the rows of which a run has ended by a loss or gradient that was not finite, and at which step of which.

    Without a student all rows end whose detectors begin with it.
    """
    found: dict[str, str] = {}
    for run in runs:
        for folder in run.folders:
            path = RunFolder(folder).not_finite_path
            if not path.exists():
                continue
            rows = [run.row] if run.row else []
            if run.kind == STUDENTS:
                rows = [row for row in comparison.all_rows if backbone_folder(comparison, row, run.seed or 0) == folder]
            where = folder.relative_to(comparison.folder).as_posix()
            found |= dict.fromkeys(rows, f"not finite at step {read_json(path)['step']} of {where}")
    return found


def without_rows(comparison: Comparison, rows: Collection[str]) -> Comparison:
    """Return the comparison of all rows but these."""
    return replace(
        comparison,
        methods={word: row for word, row in comparison.methods.items() if word not in rows},
        rows=tuple(row for row in comparison.rows if row not in rows),
    )


def check_folders(comparison: Comparison, runs: Sequence[Run]) -> None:
    """Refuse a folder that holds another comparison, or runs whose terms had other weights, levels or options."""
    RunFolder(comparison.folder).check(comparison.claim)
    for run in (run for run in runs if run.detects or run.kind == STUDENTS):
        held = [folder for folder in run.folders if RunFolder(folder).config_path.exists()]
        config = run_config(comparison, run) if held else CfgNode()
        for folder in held:
            claim = config if run.detects else student_claim(config, parse_method(folder.name), "", "")
            RunFolder(folder).check(claim, "TRANSFER.")
            if run.row in PUBLISHED_STARTS:
                _check_start(RunFolder(folder), run, config, run.config_path(comparison.folder))


def _check_start(folder: RunFolder, run: Run, config: CfgNode, written: Path) -> None:
    """Refuse a run that began with other weights, or with other keys of its row's own."""
    values = plain(flat(config))
    # as the call before wrote it: a pair that was taken out since is none of the row's own any more
    before = plain(flat(CfgNode(read_yaml(written)))) if written.exists() else {}
    own = {
        key: value
        for key, value in values.items()
        if key.startswith(run.options[::2]) or before.get(key, value) != value
    }
    folder.check({**folder.config(), **own})
    begun = read_json(folder.inputs_path).get("MODEL.WEIGHTS_SHA256") if folder.inputs_path.exists() else None
    weights = config.MODEL.WEIGHTS
    # a file that isn't on this machine any more can't be compared
    if begun and of_weights(weights, "MODEL.WEIGHTS") not in (begun, weights):
        raise UserError(f"{folder.path}: this run began with other weights than {weights}; name another --output")


def launch(
    runs: Sequence[Run], configs: Mapping[str, CfgNode], folder: Path, machine: Machine, launcher: Launcher
) -> None:
    """Write the configs of the runs and do those that are not done."""
    for run in runs:
        if run.name in configs:
            write_text(run.config_path(folder), configs[run.name].dump())
    steps = {run.kind: total_steps(run, configs[run.name]) for run in runs if run.name in configs}
    with ProgressDisplay(runs, steps, lambda run: float(machine.share(run)), folder) as display:
        run_plan(runs, folder, launcher, display)


def check_data(comparison: Comparison) -> None:
    """Refuse data that the runs would refuse, some of them after a training."""
    check_data_sets(comparison.detect, comparison.engine, comparison.name)
    if not comparison.generate:
        check_data_folders(comparison.distill, comparison.detect, comparison.engine, comparison.name)


def checked_configs(comparison: Comparison, runs: Sequence[Run]) -> dict[str, CfgNode]:
    """Return the config of each run of a plan but the data's, by name, after all checks that need no training."""
    if students := [run for run in runs if run.kind == STUDENTS and not run.done]:
        distill = merge_stage(comparison.distill, students[0].options, f"run {students[0].name}")
        check_distill_losses(distill, comparison.students, comparison.name)
    configs = run_configs(comparison, runs)
    detectors = [configs[run.name] for run in runs if run.detects and run.name in configs]
    if comparison.engine == "torchvision":
        check_backbones(detectors, comparison.name)
    for run in runs:
        if run.row in PUBLISHED_STARTS and run.seed == comparison.seeds[0] and not run.done:
            config, where = configs[run.name], f"{comparison.name}: ROWS: {run.row}"
            if run.row == IMAGENET:
                check_classifier(config, where)
            if comparison.engine == "torchvision":
                check_published(config, where)
    # a teacher detector of the user's own is left to its run, and Detectron2 to itself
    teacher = configs.get(teacher_detector_name(comparison))
    for run in runs if teacher is not None and comparison.engine == "torchvision" else ():
        if run.detects and run.seed == comparison.seeds[0] and configs[run.name].METHOD != BASELINE:
            check_detector_losses(configs[run.name], teacher, f"{comparison.name}: row {run.row}")
    return configs


def run_configs(comparison: Comparison, runs: Sequence[Run]) -> dict[str, CfgNode]:
    """Return the checked config of each run but the data's, by name."""
    return {run.name: run_config(comparison, run) for run in runs if run.kind != DATA}


def print_plan(comparison: Comparison) -> list[Run]:
    """Print the runs and what is done of them; what the comparison itself refuses is refused."""
    runs = make_plan(comparison)
    check_folders(comparison, runs)
    print_table(plan_table(comparison, runs))
    if not all(run.done for run in runs):
        check_data(comparison)
        checked_configs(comparison, runs)
    return runs


def plan_table(comparison: Comparison, runs: Sequence[Run], found: Mapping[str, Estimate] | None = None) -> Table:
    """Return the runs, what is done of them already, and what they take by ``found``, where that is known."""
    done = sum(run.done for run in runs)
    table = Table(caption=f"{len(runs)} runs, {done} done, {len(runs) - done} to do")
    on_gpu = found and any(one.gpu_memory for one in found.values())
    measured = ("time", "disk", "memory", *(("GPU memory",) if on_gpu else ())) if found else ()
    for name in ("run", "state", "steps", "threads", *measured, "needs"):
        table.add_column(name, justify="left" if name in ("run", "state", "needs") else "right")
    for run in runs:
        steps = 0 if run.kind == DATA else total_steps(run, run_config(comparison, run))
        made, _ = steps_done(run)
        state = "done" if run.done else f"stopped at {made}" if made else "to do"
        takes = cells(found[run.name])[: len(measured)] if found and not run.done else ("-",) * len(measured)
        table.add_row(run.name, state, str(steps or "-"), str(run.threads), *takes, ", ".join(run.needs) or "-")
    return table


def dry_run(comparison: Comparison, jobs: int = 0) -> None:
    """Print the plan at once, then what it takes, measured on a few steps of each kind of run."""
    machine = this_machine(jobs or comparison.jobs)
    runs = print_plan(comparison)
    if all(run.done for run in runs):
        return
    found = estimate(comparison, runs, machine)
    all_runs, wall = total(found, runs), wall_seconds(runs, found, machine)
    table = plan_table(comparison, runs, found)
    beside = f"{machine.gpu_jobs} runs on GPUs" if machine.gpus else f"{machine.jobs} threads"
    table.caption = (
        f"measured on {STEPS} steps of each kind of run: {duration(all_runs.seconds)} in total, about {duration(wall)} "
        f"when {beside} run side by side; {size(all_runs.disk)} on disk; up to {size(all_runs.memory)} of memory a run"
    )
    print_table(table)
    if line := gpu_shortage(all_runs, machine):
        print(line)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else "{:+.3f} .. {:+.3f}".format(*interval)


def results_table(results: ComparisonResult) -> Table:
    """Return the rows as a table: fractions with three digits."""
    rows, several = results.rows, len(results.seeds) > 1
    measure = results.measure
    of_detectors = measure is MAP
    stage_one, of_stage_one = results.stage_one, f"{measure.name[0].upper()}{measure.name[1:]} of stage one"
    title = f"VOC mAP at IoU 0.5, 11-point; engine {results.engine}" if of_detectors else of_stage_one
    versus = f"vs {results.baseline}"
    notes = [] if several else ["One seed: there is no spread to judge differences by."]
    notes += [f"{row}: no result, {reason}" for row, reason in (results.missing or {}).items()]
    notes += [f"{row.method}: {'; '.join(row.differs)}" for row in rows if row.differs]
    table = Table(title=title, caption=escape("\n".join(notes)) or None)
    spread, interval = (["±"], ["95 % interval"]) if several else ([], [])
    beside, below = (("area",), (stage_one.head,)) if of_detectors else (("error",) if measure is TOP1 else (), ())
    judged = measure.name if of_detectors else measure.head
    other = ("vs imagenet", *(f"its {head}" for head in (*interval, "verdict")))
    other = other if results.compared_with_imagenet else ()
    left = ("row", "verdict", "its verdict", "weights")
    heads = ("row", judged, *spread, *beside, versus, *interval, *below, "seconds", "verdict", *other, "weights")
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right")
    for row, after in itertools.zip_longest(rows, rows[1:]):
        cells = {
            "row": row.method,
            "±": "-" if row.score_std is None else f"{row.score_std:.3f}",
            "area": "-" if row.map_area is None else f"{row.map_area:.3f}",
            "error": "-" if row.top1 is None else f"{100 * (1 - row.top1):.2f} %",
            versus: f"{row.delta_vs_ce:+.3f}",
            "95 % interval": _interval(row.delta_interval),
            "vs imagenet": f"{to.mean:+.3f}" if (to := row.vs_imagenet) else "-",
            "its 95 % interval": _interval(to.interval if to else None),
            "its verdict": to.verdict if to else "-",
            stage_one.head: "-" if (value := row.value(stage_one)) is None else f"{value:.3f}",
            judged: f"{row.score:.3f}",
            "seconds": f"{row.seconds:.0f}",
            "verdict": row.verdict,
            "weights": row.weights_text,
        }
        shown = [cells[str(column.header)] for column in table.columns]
        table.add_row(*shown, end_section=bool(after and after.stage != row.stage))
    return table
