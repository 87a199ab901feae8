"""A comparison from its config to its report."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode
from rich.table import Table

from nst_det.comparison.collect import build_results
from nst_det.comparison.config import BASELINE, Comparison, merge_stage
from nst_det.comparison.cost import measure_costs
from nst_det.comparison.display import ProgressDisplay, steps_done
from nst_det.comparison.estimate import STEPS, Estimate, cells, estimate, gpu_shortage, total, wall_seconds
from nst_det.comparison.launch_local import Command, Launcher, LocalLauncher, Machine, run_plan, this_machine
from nst_det.comparison.launch_ray import RayLauncher, connected
from nst_det.comparison.plan import (
    DATA,
    DETECTOR,
    STUDENTS,
    Run,
    make_plan,
    run_config,
    teacher_detector_name,
    total_steps,
)
from nst_det.comparison.result import ComparisonResult
from nst_det.comparison.stages import check_data_folders, check_detector_losses, check_distill_losses
from nst_det.engine.format import duration, print_table, size
from nst_det.engine.io import write_text
from nst_det.engine.run_dir import RunFolder

log = logging.getLogger(__name__)


def compare(
    comparison: Comparison, jobs: int = 0, command: Command | None = None, ray_address: str | None = None
) -> ComparisonResult:
    """Do what is not done yet, then write and print the report.

    Args:
        comparison: from :func:`~nst_det.comparison.config.load_comparison`.
        jobs: runs side by side; 0 takes the config's JOBS.
        command: gives the command line of a run, in place of this package's own.
        ray_address: of the Ray cluster that does the runs, "" for one on this machine; None does them here.

    Raises:
        UserError: the input of the comparison, or of one of its stages, can't be used.
        RunFailed: a run ended with an error; the same call resumes from what is done.
        Stopped: a signal asked to stop.
    """
    runs = make_plan(comparison)
    configs = checked_configs(comparison, runs)
    machine = this_machine(jobs or comparison.jobs)
    folder = comparison.folder
    with RunFolder(folder).opened(comparison.claim):
        if ray_address is None:
            launch(runs, configs, folder, machine, LocalLauncher(folder, machine, command))
        else:
            with connected(ray_address) as ray:
                launch(runs, configs, folder, machine, RayLauncher(ray, runs, folder, command))
        results = build_results(comparison, runs, measure_costs(runs, configs, folder))
        write_report(results, folder)
    return results


def launch(
    runs: Sequence[Run], configs: Mapping[str, CfgNode], folder: Path, machine: Machine, launcher: Launcher
) -> None:
    """Write the configs of the runs and do those that are not done."""
    for run in runs:
        if run.name in configs:
            write_text(run.config_path(folder), configs[run.name].dump())
    steps = {run.kind: total_steps(run, configs[run.name]) for run in runs if run.name in configs}
    with ProgressDisplay(runs, steps, lambda run: machine.weight(run) / machine.room(run)) as display:
        run_plan(runs, folder, launcher, display)


def checked_configs(comparison: Comparison, runs: Sequence[Run]) -> dict[str, CfgNode]:
    """Return the config of each run of a plan but the data's, by name; what can be checked before a start is."""
    students = next(run for run in runs if run.kind == STUDENTS)
    distill = merge_stage(comparison.distill, students.options, f"run {students.name}")
    check_distill_losses(distill, comparison.students, comparison.name)
    if not comparison.generate:
        check_data_folders(comparison.distill, comparison.detect, comparison.name)
    configs = run_configs(comparison, runs)
    # terms of stage two, once for each row that has some
    teacher = configs.get(teacher_detector_name(comparison))
    for run in runs:
        if run.kind == DETECTOR and run.seed == comparison.seeds[0] and configs[run.name].METHOD != BASELINE:
            check_detector_losses(configs[run.name], teacher, f"{comparison.name}: row {run.row}")
    return configs


def run_configs(comparison: Comparison, runs: Sequence[Run]) -> dict[str, CfgNode]:
    """Return the checked config of each run but the data's, by name."""
    return {run.name: run_config(comparison, run) for run in runs if run.kind != DATA}


def write_report(results: ComparisonResult, folder: Path) -> None:
    """``report/results.json`` and what the report room makes of it."""
    import nst_det.report

    report = folder / "report"
    results.save(report / "results.json")
    nst_det.report.write_report(results, report, folder)


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
    runs = make_plan(comparison)
    print_table(plan_table(comparison, runs))
    if all(run.done for run in runs):
        return
    checked_configs(comparison, runs)
    machine = this_machine(jobs or comparison.jobs)
    found = estimate(comparison, runs, machine)
    all_runs, wall = total(found, runs), wall_seconds(runs, found, machine)
    table = plan_table(comparison, runs, found)
    beside = f"{machine.gpu_jobs} on GPUs" if machine.gpus else f"{machine.jobs} threads"
    table.caption = (
        f"measured on {STEPS} steps of each kind of run: {duration(all_runs.seconds)} of runs, about {duration(wall)} "
        f"with {beside} side by side; {size(all_runs.disk)} on disk; up to {size(all_runs.memory)} of memory a run"
    )
    print_table(table)
    if line := gpu_shortage(all_runs, machine):
        print(line)


def results_table(results: ComparisonResult) -> Table:
    """The answer as a table: fractions with three digits."""
    rows, several = results.rows, len(results.seeds) > 1
    title = f"VOC mAP at IoU 0.5, 11-point; engine {results.engine}"
    caption = None if several else "One seed: there is no spread to judge differences by."
    table = Table(title=title, caption=caption)
    table.add_column("row")
    heads = ["mAP", "area", "vs ce", "top-1", "seconds"]
    heads = [*heads[:1], "±", *heads[1:3], "95 % interval", *heads[3:]] if several else heads
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("verdict")
    table.add_column("weights")
    for row, after in itertools.zip_longest(rows, rows[1:]):
        interval = row.delta_interval
        spread = ["-" if row.map_std is None else f"{row.map_std:.3f}"]
        between = ["-" if interval is None else f"{interval[0]:+.3f} .. {interval[1]:+.3f}"]
        top1 = "-" if row.top1 is None else f"{row.top1:.3f}"
        cells = [f"{row.map:.3f}", *(spread if several else []), f"{row.map_area:.3f}"]
        cells += [f"{row.delta_vs_ce:+.3f}", *(between if several else []), top1, f"{row.seconds:.0f}"]
        table.add_row(
            row.method, *cells, row.verdict, row.weights, end_section=bool(after and after.stage != row.stage)
        )
    return table
