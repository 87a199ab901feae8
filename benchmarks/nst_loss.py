"""Time and memory of the NST losses, forward plus backward.

    python benchmarks/nst_loss.py [--quick] [--threads N] [--output FOLDER]

Each shape and kernel is measured three ways: as the package computes it; as the bare matrix products that the formula
can't do without (by torch's matmul, on the same side, in the same chunks; with the norms of the channels where they
aren't the diagonal of a product; handed out by autograd, as a loss is); and in the broadcast form (B x C x C x HW), as
published code writes it, at the largest batch of which its tensors fit into memory.  Times are medians, taken in turns
in one process; with one thread (the default) they are that thread's CPU time, which other work on the machine hardly
moves.  Extra memory is the peak of the resident set of a process that does nothing else, over what it has with the maps
made, freed memory handed back and one call done, since the first one also loads code and the libraries' own buffers
(some 4 MiB; on a GPU: the allocator's own peak).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nst_det.engine.device import keep_freed_memory
from nst_det.losses import mmd, mmd_gpu, nst_loss
from nst_det.losses.mmd import KERNELS, positions_side_is_cheaper

EPS = 1e-6
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    student: int
    teacher: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def maps_bytes(self) -> int:
        return 4 * self.batch * (self.student + self.teacher) * self.positions

    def broadcast_bytes(self, kernel: str) -> int:
        """What the broadcast form holds at most: all pairs of the teacher, or both sets' pairs and their gradient."""
        s, t = self.student, self.teacher
        return 4 * self.batch * self.positions * (t * t + 2 * s * t) * (2 if kernel == "gaussian" else 1)


CLAIM = Shape("published code's case", 8, 256, 512, 14, 14)
SHAPES = [
    CLAIM,
    Shape("R50 to R18, res2", 64, 64, 256, 56, 56),
    Shape("R50 to R18, res3", 64, 128, 512, 28, 28),
    Shape("R50 to R18, res4", 64, 256, 1024, 14, 14),
    Shape("R50 to R18, res5", 64, 512, 2048, 7, 7),
    Shape("FPN p2, 800 x 1333", 2, 256, 256, 200, 334),
    Shape("FPN p3, 800 x 1333", 2, 256, 256, 100, 167),
    Shape("FPN p4, 800 x 1333", 2, 256, 256, 50, 84),
    Shape("FPN p5, 800 x 1333", 2, 256, 256, 25, 42),
    Shape("FPN p6, 800 x 1333", 2, 256, 256, 13, 21),
    Shape("the paper's ImageNet pair", 64, 1024, 2048, 7, 7),
]


@dataclass
class Row:
    shape: Shape
    kernel: str
    device: str
    milliseconds: float = 0.0
    bare_milliseconds: float = 0.0
    extra_bytes: int = 0
    broadcast_batch: int = 0
    broadcast_milliseconds: float | None = None
    broadcast_extra_bytes: int | None = None
    ours_at_broadcast_batch: dict[str, float] = field(default_factory=dict)
    difference: float | None = None

    @property
    def speedup(self) -> float | None:
        ours = self.ours_at_broadcast_batch.get("milliseconds")
        return self.broadcast_milliseconds / ours if ours and self.broadcast_milliseconds else None

    @property
    def memory_ratio(self) -> float | None:
        ours = self.ours_at_broadcast_batch.get("extra_bytes")
        return self.broadcast_extra_bytes / ours if ours and self.broadcast_extra_bytes else None


def broadcast_form(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """MMD^2 with every pair of channels written out: tensors of B x C x C x HW."""
    s, t = (x.flatten(2) / (x.flatten(2).square().sum(2, keepdim=True) + EPS).sqrt() for x in (student, teacher))

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.unsqueeze(1), y.unsqueeze(2)
        if kernel == "gaussian":
            return (x - y).square().sum(3)
        products = (x * y).sum(3)
        return products.square() if kernel == "poly" else products

    tt, ss, st = pairs(t, t), pairs(s, s), pairs(s, t)
    if kernel == "gaussian":
        count = (s.shape[1] + t.shape[1]) ** 2
        total = (tt.sum((1, 2)) + ss.sum((1, 2)) + 2 * st.sum((1, 2))).detach() / count
        tt, ss, st = (torch.exp(-d / (2 * total[:, None, None])) for d in (tt, ss, st))
    return (tt.mean((1, 2)) + ss.mean((1, 2)) - 2 * st.mean((1, 2))).mean()


def bare_products(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    """Only the matrix products of value and gradient, on the cheaper side, in chunks that fit the same limit."""
    gradient = torch.empty_like(student)
    s, t, of_chunks = student.flatten(2), teacher.flatten(2), gradient.flatten(2)
    cs, ct, n = s.shape[1], t.shape[1], s.shape[2]
    limit = mmd.LIMIT if s.device.type == "cpu" else mmd_gpu.memory_limit(s.device)
    by_positions = kernel == "poly" and positions_side_is_cheaper(cs, ct, n)
    floats = n if kernel == "linear" else 2 * n * n if by_positions else cs * cs + cs * ct + ct * ct
    count = max(1, limit // (4 * floats))
    for i in range(0, len(s), count):
        a, b, out = s[i : i + count], t[i : i + count], of_chunks[i : i + count]
        if kernel == "linear" or by_positions:
            torch.linalg.vector_norm(a, dim=2), torch.linalg.vector_norm(b, dim=2)
        if kernel == "linear":
            row, column = a[:, :1, :1].expand(-1, 1, cs), a[:, :, :1]
            mean = row @ a
            b[:, :1, :1].expand(-1, 1, ct) @ b
            a @ mean.mT
            out.baddbmm_(column, mean, beta=0)
        elif by_positions:
            b.mT @ b
            out.baddbmm_(a, a.mT @ a, beta=0)
        else:
            b @ b.mT
            out.baddbmm_(a @ a.mT, a, beta=0)
            out.baddbmm_(a @ b.mT, b)
    return gradient


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
        ctx.gradient = bare_products(student, teacher, kernel)
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient, None, None


def bare(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    return torch.autograd.grad(_Bare.apply(student, teacher, kernel), student)[0]


def ours(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    value = nst_loss(student, teacher, kernel)
    return torch.autograd.grad(value, student)[0]


def broadcast(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    return torch.autograd.grad(broadcast_form(student, teacher, kernel), student)[0]


FORMS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "ours": ours,
    "bare": bare,
    "broadcast": broadcast,
}


def make_maps(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(shape.batch, c, shape.height, shape.width) for c in (shape.student, shape.teacher)]
    student, teacher = (torch.randn(size, generator=generator).relu_().to(device) for size in sizes)
    return student.requires_grad_(), teacher


def clock(device: str, threads: int) -> Callable[[], float]:
    return time.thread_time if device == "cpu" and threads == 1 else time.perf_counter


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at the most so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM" if peak else "VmRSS"].split()[0])


def measure_memory(shape: Shape, kernel: str, form: str, device: str, threads: int) -> int:
    """Peak bytes over the maps, in a process of its own; on the CPU under Linux only."""
    torch.set_num_threads(threads)
    maps = make_maps(shape, device)
    FORMS[form](*maps, kernel)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident(peak=False)
        FORMS[form](*maps, kernel)
        return resident(peak=True) - before
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    FORMS[form](*maps, kernel)
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def measure_times(
    shape: Shape, kernel: str, forms: tuple[str, ...], device: str, threads: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds of each form, taken in turns until the time is up."""
    torch.set_num_threads(threads)
    if "broadcast" not in forms:
        # as the commands that train do; what the broadcast form frees is too much to be kept, and the next form to free
        # anything would pay for giving it back
        keep_freed_memory()
    maps = make_maps(shape, device)
    taken: dict[str, list[float]] = {form: [] for form in forms}
    now = clock(device, threads)
    end = time.perf_counter() + seconds
    for turn in range(200):
        for form in forms:
            wait(device)
            start = now()
            FORMS[form](*maps, kernel)
            wait(device)
            if turn:  # the first warms up
                taken[form].append(now() - start)
        if turn >= 2 and time.perf_counter() > end:
            break
    return {form: 1000 * statistics.median(times) for form, times in taken.items()}


def largest_difference(shape: Shape, kernel: str, device: str) -> float:
    """Between the package and the broadcast form: of the values, and of the gradients by their largest entry."""
    student, teacher = make_maps(shape, device)
    a, b = nst_loss(student, teacher, kernel), broadcast_form(student, teacher, kernel)
    (x,), (y,) = torch.autograd.grad(a, student), torch.autograd.grad(b, student)
    return max(float((a - b).detach().abs() / b.detach().abs()), float((x - y).abs().max() / y.abs().max()))


def apart(call: Callable, *arguments: object) -> object:
    """The result of a call in a fresh process that has torch loaded and nothing else done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nst_det.losses"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def measure(shape: Shape, kernel: str, args: argparse.Namespace) -> Row:
    device, threads = args.device, args.threads
    row = Row(shape, kernel, device)
    times = apart(measure_times, shape, kernel, ("ours", "bare"), device, threads, args.seconds)
    row.milliseconds, row.bare_milliseconds = times["ours"], times["bare"]
    row.extra_bytes = apart(measure_memory, shape, kernel, "ours", device, threads)
    row.broadcast_batch = min(
        shape.batch, int(args.broadcast_gib * 2**30 // replace(shape, batch=1).broadcast_bytes(kernel))
    )
    if row.broadcast_batch:
        fits = replace(shape, batch=row.broadcast_batch)
        times = apart(measure_times, fits, kernel, ("ours", "broadcast"), device, threads, args.seconds)
        memory = {form: apart(measure_memory, fits, kernel, form, device, threads) for form in ("ours", "broadcast")}
        row.ours_at_broadcast_batch = {"milliseconds": times["ours"], "extra_bytes": memory["ours"]}
        row.broadcast_milliseconds, row.broadcast_extra_bytes = times["broadcast"], memory["broadcast"]
        row.difference = apart(largest_difference, fits, kernel, device)
    return row


HEADER = [
    "maps", "B", "C_S", "C_T", "H x W", "kernel", "ms", "x bare", "extra MiB", "x maps",
    "at B", "broadcast ms", "times faster", "broadcast MiB", "times less memory", "difference",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    shape = row.shape
    mine = [
        shape.name,
        *(str(n) for n in (shape.batch, shape.student, shape.teacher)),
        f"{shape.height} x {shape.width}",
        row.kernel,
        f"{row.milliseconds:.1f}",
        f"{row.milliseconds / row.bare_milliseconds:.2f}",
        f"{row.extra_bytes / MIB:.1f}",
        f"{row.extra_bytes / shape.maps_bytes:.2f}",
    ]
    if row.broadcast_milliseconds is None:
        return [*mine, "doesn't fit", *[""] * 5]
    return [
        *mine,
        str(row.broadcast_batch),
        f"{row.broadcast_milliseconds:.0f}",
        f"{row.speedup:.0f}",
        f"{(row.broadcast_extra_bytes or 0) / MIB:.0f}",
        f"{row.memory_ratio:.0f}" if row.memory_ratio else "",
        f"{row.difference:.1e}",
    ]


def markdown(rows: list[Row]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def summary(rows: list[Row]) -> str:
    """The figures that the goals name."""
    faster = [row.speedup for row in rows if row.speedup]
    lines = [f"times faster than the broadcast form, median: {statistics.median(faster):.0f}"] if faster else []
    for kernel in KERNELS:
        mine = [row for row in rows if row.kernel == kernel]
        if mine:
            bare = [row.milliseconds / row.bare_milliseconds for row in mine]
            memory = [row.extra_bytes / row.shape.maps_bytes for row in mine]
            lines.append(
                f"{kernel}: times the bare products, median {statistics.median(bare):.2f}, largest {max(bare):.2f}; "
                f"extra memory over the maps, largest {max(memory):.2f}"
            )
    for row in rows:
        if row.shape == CLAIM and row.kernel == "poly" and row.speedup and row.memory_ratio:
            lines.append(
                f"poly at (8, 256 and 512, 14 x 14): {row.speedup:.0f} times faster and {row.memory_ratio:.0f} times "
                f"less extra memory than the broadcast form, equal to {row.difference:.1e}"
            )
    return "\n".join(lines) + "\n"


def machine(args: argparse.Namespace) -> str:
    if args.device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{name}, {args.threads} thread(s), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, and the poly kernel alone")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the repeats of one comparison")
    parser.add_argument("--broadcast-gib", type=float, default=8.0, help="what the broadcast form may take")
    parser.add_argument("--output", type=Path, help="folder for nst_loss.json and nst_loss.md")
    args = parser.parse_args()
    kernels = args.kernels or (["poly"] if args.quick else KERNELS)
    rows = []
    print(machine(args))
    for shape in [CLAIM] if args.quick else SHAPES:
        for kernel in kernels:
            rows.append(measure(shape, kernel, args))
            print(" | ".join(cells(rows[-1])), flush=True)
    print("\n" + markdown(rows) + "\n" + summary(rows))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/nst_loss.py " + " ".join(sys.argv[1:])
        text = f"`{command}`, {machine(args)}\n\n{markdown(rows)}\n{summary(rows)}"
        (args.output / "nst_loss.md").write_text(text)
        records = [{**asdict(row), "speedup": row.speedup, "memory_ratio": row.memory_ratio} for row in rows]
        (args.output / "nst_loss.json").write_text(json.dumps({"machine": machine(args), "rows": records}, indent=1))


if __name__ == "__main__":
    main()
