"""The demo's comparison, made small, three times: here, on a Ray cluster of two nodes, and with one of them killed.

Prints the table of each and whether the numbers are the same.

    python benchmarks/ray_nodes.py --output output/ray_nodes
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from nst_det.comparison.config import load_comparison
from nst_det.comparison.display import steps_done
from nst_det.comparison.pipeline import compare
from nst_det.comparison.plan import make_plan
from nst_det.comparison.result import ComparisonResult, comparable

DEMO = Path(__file__).resolve().parents[1] / "configs" / "compare" / "demo.yaml"
SMALL = {
    "METHODS": "[kd, nst-poly]",
    "THREADS": 1,
    "DATA.GENERATE": "{classification_images: 400, classification_val_images: 100, detection_images: 24, "
    "detection_test_images: 12}",
    "DISTILL.SOLVER.MAX_ITER": 12,
    "DISTILL.TEACHER.SOLVER.MAX_ITER": 12,
    "DISTILL.TEACHER.EXPECTED_TOP1": 0.0,
    "DISTILL.SOLVER.CHECKPOINT_PERIOD": 2,
    "DETECT.SOLVER.MAX_ITER": 12,
    "DETECT.SOLVER.CHECKPOINT_PERIOD": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/ray_nodes"))
    output = parser.parse_args().output.resolve()
    # the data once for all three
    words = [str(word) for pair in (SMALL | {"DATA.ROOT": output / "data"}).items() for word in pair]
    results: dict[str, ComparisonResult] = {}
    for name in ("here", "ray", "killed"):
        comparison = load_comparison(DEMO, output / name, words)
        began = time.monotonic()
        if name == "here":
            results[name] = compare(comparison, jobs=2)
        else:
            results[name] = on_two_nodes(comparison, kill=name == "killed")
        rows = ", ".join(f"{row.method} {row.score:.4f}" for row in results[name].rows)
        print(f"{name}: {rows} ({time.monotonic() - began:.0f} s)", flush=True)
    for name in ("ray", "killed"):
        same = comparable(results[name]) == comparable(results["here"])
        print(f"{name}: the same numbers as here: {'yes' if same else 'NO'}")


def on_two_nodes(comparison: Any, kill: bool) -> ComparisonResult:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    if kill:
        threading.Thread(target=kill_in_the_middle, args=(comparison, cluster, second), daemon=True).start()
    try:
        return compare(comparison, ray_address=cluster.address)
    finally:
        cluster.shutdown()


def kill_in_the_middle(comparison: Any, cluster: Cluster, node: Any) -> None:
    """When two detectors are under way, one on each node."""
    detectors = [run for run in make_plan(comparison) if run.kind == "detector"]
    while sum(3 < steps_done(run)[0] < 12 for run in detectors) < 2:
        time.sleep(0.05)
    print("a node is killed", flush=True)
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main()
