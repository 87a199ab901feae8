"""The same plan on a Ray cluster of two nodes; ``make test-ray``."""

import importlib.util
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.display import last_metrics
from nst_det.comparison.launch_local import RunFailed
from nst_det.comparison.launch_ray import RayLauncher, needed_environment, run_on_node
from nst_det.comparison.pipeline import compare
from nst_det.comparison.plan import Run, make_plan
from nst_det.comparison.result import ComparisonResult, comparable
from tests.helpers.small_comparison import fake_command, starts

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")


@pytest.fixture
def cluster(monkeypatch, no_report):
    """Two nodes of two cores each, the second one by itself."""
    from ray.cluster_utils import Cluster

    # what a node's processes inherit
    monkeypatch.setenv("FAKE_PARENT_DIES", "any")
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = made.add_node(num_cpus=2)
    yield made, second
    made.shutdown()


@needs_ray
@pytest.mark.ray
@pytest.mark.parametrize("killed", [False, True])
def test_a_cluster_gives_the_same_results_also_when_a_node_dies(config_file, tmp_path, cluster, killed, monkeypatch):
    made, second = cluster
    here = load_comparison(config_file, tmp_path / "here")
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_STEP_SECONDS", "0")
        expected = compare(here, jobs=4, command=fake_command)
    there = load_comparison(config_file, tmp_path / "there")
    runs = make_plan(there)
    lost = []

    def kill():
        # both runs of a seed's students are under way: one on each node, since each takes two cores
        students = [run for run in runs if run.kind == "students"]
        while not all((last_metrics(run.folders[0] / "metrics.jsonl") or {"step": 0})["step"] > 1 for run in students):
            time.sleep(0.05)
        made.remove_node(second, allow_graceful=False)
        lost.extend(students)

    killer = threading.Thread(target=kill, daemon=True)
    if killed:
        killer.start()
    found = compare(there, command=fake_command, ray_address=made.address)
    assert comparable(found) == comparable(expected)
    assert ComparisonResult.load(there.folder / "report" / "results.json") == found
    if killed:
        killer.join()
        logs = [[starts(folder) for folder in run.folders] for run in lost]
        # one went on, not from the beginning; the other was left alone
        again = [[lines for lines in run if len(lines) > 1] for run in logs]
        assert sorted(map(len, again)) == [0, 1]
        (lines,) = again[0] or again[1]
        assert int(lines[1].split()[0]) > 1


@needs_ray
@pytest.mark.ray
def test_a_run_that_fails_stops_the_others_and_is_named(config_file, tmp_path, cluster, monkeypatch):
    made, _ = cluster
    comparison = load_comparison(config_file, tmp_path / "out")

    def failing(run, folder):
        if run.name == "detect/seed0/scratch":
            return [sys.executable, "-c", "import sys; print('nst-det: the images are gone'); sys.exit(2)"]
        return fake_command(run, folder)

    with pytest.raises(RunFailed, match="detect/seed0/scratch .*the images are gone") as failed:
        compare(comparison, command=failing, ray_address=made.address)
    assert failed.value.code == 2


@pytest.mark.parametrize(("gpu_threads", "seen"), [(0, " 2"), (6, "3 6")])
def test_a_task_takes_ray_s_gpu_only_where_it_gets_one_and_its_own_threads(tmp_path, monkeypatch, gpu_threads, seen):
    # what a worker that Ray uses again has from its first task
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = Run("a", "detector", (), (tmp_path / "a",), {}, threads=2)
    note = "import os; print('{CUDA_VISIBLE_DEVICES} {OMP_NUM_THREADS}'.format(**os.environ))"
    code, said = run_on_node(run, str(tmp_path), [sys.executable, "-c", note], gpu_threads)
    assert (code, said.removesuffix("\n")) == (0, seen)


def test_a_task_gets_the_variables_that_its_config_names(tmp_path, monkeypatch):
    for name in ("VOC_ROOT", "NST_DET_TERMS", "IMAGENET"):
        monkeypatch.setenv(name, f"of {name}")
    run = Run("a", "detector", (), (tmp_path / "a",), {})
    assert needed_environment(run, tmp_path).keys() - {"PYTHONPATH"} == {"NST_DET_TERMS"}
    run.config_path(tmp_path).parent.mkdir()
    run.config_path(tmp_path).write_text("ROOT: $VOC_ROOT/VOC2007\nOTHER: ${NOT_SET_HERE}/a\n")
    found = needed_environment(run, tmp_path)
    assert found.keys() - {"PYTHONPATH"} == {"NST_DET_TERMS", "VOC_ROOT"}
    # on a node that has none of them
    monkeypatch.delenv("VOC_ROOT")
    note = "import os; print(os.environ['VOC_ROOT'])"
    assert run_on_node(run, str(tmp_path), [sys.executable, "-c", note], 0, found) == (0, "of VOC_ROOT\n")


def test_a_gpu_comes_with_its_share_of_the_smallest_nodes_cores(tmp_path):
    class Cluster:
        exceptions = SimpleNamespace(RayError=RuntimeError)

        def nodes(self):
            sizes = [(True, {"CPU": 16.0, "GPU": 2.0}), (True, {"CPU": 12.0, "GPU": 4.0}), (True, {"CPU": 2.0})]
            sizes += [(False, {"CPU": 1.0, "GPU": 1.0})]
            return [{"Alive": alive, "Resources": resources} for alive, resources in sizes]

    launcher = RayLauncher(Cluster(), [], tmp_path)
    wants, other = (Run("a", "detector", (), (), {}, threads=2, wants_gpu=gpu) for gpu in (True, False))
    assert (launcher.gpu_threads(wants), launcher.needs(wants)) == (3, {"num_cpus": 1, "num_gpus": 1})
    assert (launcher.gpu_threads(other), launcher.needs(other)) == (0, {"num_cpus": 2, "num_gpus": 0})


def test_without_ray_one_line_says_what_to_do(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["compare", "--config-file", str(config_file), "--output", str(tmp_path / "out"), "--launcher", "ray"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--launcher ray" in line
    assert "pip install ray" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*words[:-2], "--address", "host:6379"])
    assert "--address" in capsys.readouterr().err
    # what they print is of this machine
    for how in ("--plan", "--dry-run"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, how])
        assert "--launcher ray: " in capsys.readouterr().err
