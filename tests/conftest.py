import logging
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nst_det.cli import main
from nst_det.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
HANGS_AFTER_SECONDS = 180
# files whose tests train, or start processes, for longer than a quick look allows; `make test-fast` leaves them out
SLOW = {
    "test_api.py", "test_configs.py", "test_doctor.py", "test_gpu_check.py", "golden/test_golden_curves.py",
    "device/test_pretended_cuda.py", "guide/test_guide.py", "guide/test_site.py",
    "guide/test_first_steps.py", "report/test_browser.py",
    "report/test_page.py", "data/test_synthetic.py", "models/test_inception_bn.py",
    "comparison/test_end_to_end.py", "comparison/test_estimate.py", "comparison/test_launch.py", "tune/test_tune.py",
    "engine/test_loader.py", "export/test_detector.py", "detectron2/test_detectron2_absent.py",
    "detection/test_data.py", "detection/test_distiller.py", "detection/test_processes.py",
    "detection/test_training.py", "detection/test_validation.py",
    "distillation/test_distill_cache.py", "distillation/test_distill_faults.py",
    "distillation/test_distill_images.py", "distillation/test_distill_mlp.py",
    "distillation/test_distill_optimizer.py", "distillation/test_distill_papers.py",
    "distillation/test_distill_processes.py", "distillation/test_distill_stage.py",
}  # fmt: skip
# tests want equal bits, which no GPU promises, and fork: none sees a GPU, nor does a process that it starts, unless
# those marked gpu are asked for; done before anything imports torch
# names of published weights are looked up in the cache alone
os.environ["HF_HUB_OFFLINE"] = "1"
VISIBLE, ON_CPU = "CUDA_VISIBLE_DEVICES", "NST_DET_GPU_TESTS_ON_CPU"
_GIVEN = os.environ.get(VISIBLE)
os.environ[VISIBLE] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files."""
    for item in items:
        if item.path.relative_to(CHECKOUT / "tests").as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Give the GPUs back where tests that are meant for one were asked for."""
    if re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) and os.environ.get(ON_CPU) != "1":
        os.environ.pop(VISIBLE)
        os.environ.update({} if _GIVEN is None else {VISIBLE: _GIVEN})


@pytest.fixture(autouse=True)
def no_log_handler_of_another_test():
    """A command logs to the standard error of its test, which is closed after it, and sets the level."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data sets; a test that needs it is skipped where it is absent."""
    named = os.environ.get("NST_DET_REAL_DATA")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name its folder by NST_DET_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def cli() -> Callable[..., int]:
    """``cli("evaluate", "--split", "test")``: runs ``nst-det`` in this process and gives its exit code."""

    def run(*typed: object) -> int:
        with pytest.raises(SystemExit) as left:
            main(list(map(str, typed)))
        return left.value.code

    return run


def _join_group(rank: int, world: int, port: int, work: Callable[..., object], args: tuple, sink) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from nst_det.engine.distributed import stop_processes

    torch.set_num_threads(1)
    try:
        found = work(*args)
        stop_processes()
    except UserError as error:
        found = error
    # as bytes: a tensor would be handed over by a process that has to stay for it
    sink.put((rank, pickle.dumps(found)))


@pytest.fixture
def stops_after_saving(monkeypatch):
    """``with stops_after_saving(step):`` every run ends where it has written that checkpoint."""

    from nst_det.engine import train_state

    @contextmanager
    def stopped(step):
        save = train_state.save_checkpoint

        def save_and_stop(folder, done, state):
            save(folder, done, state)
            if done == step:
                raise UserError("stopped")

        with monkeypatch.context() as patch:
            patch.setattr(train_state, "save_checkpoint", save_and_stop)
            yield

    return stopped


@pytest.fixture(scope="session")
def averaged_in_float64():
    """``averaged_in_float64(states, decay)``: what SOLVER.EMA_DECAY makes of the state dicts after each step."""

    def average(states: list[dict], decay: float) -> dict:
        found = {name: value.double() for name, value in states[0].items()}
        for step, state in enumerate(states[1:], start=2):
            kept = min(decay, 1 - step ** (-2 / 3))
            for name, value in state.items():
                # counters of batches are no weights
                counts = not value.is_floating_point()
                found[name] = value.double() if counts else kept * found[name] + (1 - kept) * value.double()
        return found

    return average


# what is behind a script that has made ``loaders``: in the middle of their work, say who works
WAITS = """
import psutil, time
began = [iter(loader) for loader in loaders]
for batches in began:
    next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(60)
"""


@pytest.fixture
def left_behind():
    """``left_behind(script, signum, *words)``: which of 12 workers are alive 2 s after a signal to their parent.

    The script makes the ``loaders``.  Left to itself, a worker looks every 5 s whether its parent is there.
    """
    started: list[psutil.Process] = []

    def run(script: str, signum: int, *words: object) -> list[psutil.Process]:
        command = [sys.executable, "-c", script + WAITS, *map(str, words)]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(psutil.Process(parent.pid))
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        started.extend(workers)
        assert len(workers) == 12
        # until they have worked ahead: some wait for keys then, some to write into the full pipe
        time.sleep(1)
        parent.send_signal(signum)
        assert parent.wait() == -signum
        latest = time.monotonic() + 2
        while (left := [worker for worker in workers if works(worker)]) and time.monotonic() < latest:
            time.sleep(0.05)
        return left

    def works(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    yield run
    for process in started:
        if works(process):
            process.kill()


@pytest.fixture
def captured_graphs(monkeypatch):
    """The graphs that torch.compile captures; they run forward and backward by plain kernels."""
    import torch
    from torch._dynamo.backends.debugging import aot_eager

    compile_, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: compile_(function, backend=backend))
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


@pytest.fixture
def cuda_in_use(monkeypatch):
    """As where this process has used a GPU: one that is forked from it and asks CUDA for anything gets CUDA's error."""
    import torch

    here = os.getpid()

    def asked(*_, **__):
        if os.getpid() != here:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return torch.zeros(16, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: os.getpid() != here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("_lazy_init", "get_rng_state", "set_rng_state", "manual_seed_all", "current_device"):
        monkeypatch.setattr(torch.cuda, name, asked)


@pytest.fixture
def in_processes():
    """``in_processes(work, *args)``: runs it as torchrun would, in two processes; what each gave, by rank.

    They are forked: importing torch again takes longer than most tests.
    """

    def run(work: Callable[..., object], *args: object, world: int = 2) -> list:
        context = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sink = context.SimpleQueue()
        started = [
            context.Process(target=_join_group, args=(rank, world, port, work, args, sink)) for rank in range(world)
        ]
        for process in started:
            process.start()
        latest = time.monotonic() + HANGS_AFTER_SECONDS
        try:
            found = {}
            while len(found) < world:
                while sink.empty():
                    assert any(process.is_alive() for process in started), "a process ended without an answer"
                    assert time.monotonic() < latest, "the processes wait for each other"
                    time.sleep(0.02)
                rank, answer = sink.get()
                found[rank] = value = pickle.loads(answer)
                if isinstance(value, Exception):
                    break
        finally:
            for process in started:
                process.join(0 if len(found) < world else 20)
                process.kill()
                process.join()
        return [found[rank] for rank in sorted(found)]

    return run
