"""``torch.compile`` for a forward pass, by SOLVER.COMPILE.

Where it can't be compiled, one line says so and it runs as it is.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nst_det.engine.keys import CUDA_GRAPHS, OFF
from nst_det.errors import UserError

log = logging.getLogger(__name__)
# graphs that torch keeps of one function: of all students and their teacher, at all sizes
MOST_GRAPHS = 64


class Compiled:
    """A function that is compiled at its first call for each size of its input.

    If compiling fails, that call and all later ones run the plain function.  ``when`` tells of a call whether it may be
    compiled at all.  In the place of a module's ``forward`` it changes no name of its state dict, but a copy of the
    module would have the forward of the original: so copies are refused.
    """

    def __init__(
        self, function: Callable[..., Any], mode: str, what: str, when: Callable[[], bool] = lambda: True
    ) -> None:
        self.function, self.what, self.when = function, what, when
        self._compiled: Callable[..., Any] | None = None
        # of the inputs with which it has run
        self._sizes: set[tuple[torch.Size, ...]] = set()
        try:
            self._compiled = torch.compile(function, mode=mode, dynamic=False)
        except RuntimeError as error:
            # this version of Python, or this system
            self._give_up(error)

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None or not self.when():
            return self.function(*args)
        sizes = tuple(one.shape for one in args if isinstance(one, Tensor))
        # the first graph of a function may have moved running statistics when its second can't be compiled
        kept = [(buffer, buffer.clone()) for buffer in self._buffers(args)] if sizes not in self._sizes else []
        try:
            result = self._compiled(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            self._give_up(error)
            for buffer, value in kept:
                buffer.copy_(value)
            return self.function(*args)
        self._sizes.add(sizes)
        return result

    def _buffers(self, args: tuple[Any, ...]) -> list[Tensor]:
        modules = [one for one in (getattr(self.function, "__self__", None), *args) if isinstance(one, nn.Module)]
        return [buffer for module in modules for buffer in module.buffers()]

    def _give_up(self, error: Exception) -> None:
        self._compiled = None
        cause = getattr(error, "inner_exception", error)
        reason = next((line for line in map(str.strip, str(cause).splitlines()) if line), type(cause).__name__)
        log.warning("SOLVER.COMPILE: %s can't be compiled here, and runs as it is (%s)", self.what, reason)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError(f"a copy of {self.what} would run the weights of the original; copy it before it is compiled")


def _is_of_compiler(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)


def check_compile(mode: str, device: torch.device) -> None:
    """Refuse CUDA graphs without CUDA."""
    if mode in CUDA_GRAPHS and device.type != "cuda":
        raise UserError(
            f"SOLVER.COMPILE {mode}: CUDA graphs need a GPU, this run computes on {device}; set it to default or off"
        )


def compiled(
    function: Callable[..., Any],
    mode: str,
    device: torch.device,
    what: str,
    when: Callable[[], bool] = lambda: True,
) -> Callable[..., Any]:
    """Return ``function``, compiled as SOLVER.COMPILE says; ``what`` names it in the line that says why it isn't."""
    check_compile(mode, device)
    if mode == OFF:
        return function
    _configure_torch()
    return Compiled(function, mode, what, when)


def _configure_torch() -> None:
    dynamo, functorch = torch._dynamo.config, importlib.import_module("torch._functorch.config")
    # older releases have the second name
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, max(MOST_GRAPHS, getattr(dynamo, limit)))
    # the balance of terms goes backward several times through the graph of a step
    if hasattr(functorch, "donated_buffer"):
        setattr(functorch, "donated_buffer", False)  # noqa: B010


def begin_step(mode: str) -> None:
    """Let CUDA graphs write over the outputs of the step before."""
    if mode in CUDA_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()
