"""GPUs that aren't there: tensors that say they are on one while their data is on the CPU."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._python_dispatch as dispatch
from torch.utils._pytree import tree_leaves, tree_map

GPUS = 2
# places in these are named
ROOTS = {
    name: os.path.join(found.submodule_search_locations[0], "")
    for name in ("nst_det", "detectron2")
    if (found := find_spec(name)) and found.submodule_search_locations
}
NO_LAUNCH = {
    f"aten.{name}"
    for name in (
        *("alias", "detach", "lift_fresh", "set_", "resize_", "record_stream", "is_pinned", "is_same_size"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"),
    )
}
# the host needs an answer, or a size, that the GPU has
WAITS = {"torchvision.nms"} | {
    f"aten.{name}"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
        *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
    )
}
# what a GPU alone has
ON_GPU = {
    getattr(torch.ops.aten.bmm, "dtype", None): lambda left, right, dtype: torch.bmm(left.to(dtype), right.to(dtype))
}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}

plain_to, plain_autocast, plain_generator = torch.Tensor.to, torch.autocast.__init__, torch.Generator
plain_groups = torch._C._group_tensors_by_device_and_dtype


@dataclass
class Counts:
    """What was seen: operators that launch something and waits of the host, by place (``file:line what``)."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


class PretendedCuda:
    """GPUs that this process pretends to have, from :meth:`begin` on and until it ends: have a process for it.

    Every operator passes a dispatcher that computes on the CPU and gives tensors which call themselves ``cuda:0`` or
    ``cuda:1``.  It counts operators that launch something and waits of the host; it refuses tensors of two devices, and
    CUDA in a process that was forked after CUDA was used; it notes questions to ``torch.cuda`` about a device.

    It can't show times, memory, the bits of CUDA's kernels, how many kernels an operator is, whether other streams are
    in order, or whether memory is pinned.  Autocast takes the CPU's lists of operators, which are nearly CUDA's.
    """

    def __init__(self) -> None:
        # None counts nothing
        self.counts: Counts | None = None
        # name, index of the device, place
        self.questions: list[tuple[str, int, str]] = []
        self.used = self.forked = False

    def begin(self) -> None:
        """Patch torch."""
        os.register_at_fork(after_in_child=self._see_fork)
        # swapped, parameters stay the objects they are when they move, as between the CPU and a real GPU
        torch.__future__.set_swap_module_params_on_conversion(True)
        # the engine's thread for a device would not see the dispatcher
        torch.autograd.set_multithreading_enabled(False)
        self._patch_tensors()
        self._patch_cuda()
        _Dispatcher().__enter__()

    def launch(self, what: str) -> None:
        if self.counts is not None:
            self.counts.launches[f"{_place()} {what}"] += 1

    def wait(self, what: str) -> None:
        if self.counts is not None:
            self.counts.waits[f"{_place()} {what}"] += 1

    def use(self) -> None:
        """CUDA is used: refuse it in a forked process, with torch's message."""
        if self.forked:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                "'spawn' start method"
            )
        self.used = True

    def _see_fork(self) -> None:
        self.forked = self.used

    def _ask(self, question: str, answer: Any) -> Callable[..., Any]:
        """A function of torch.cuda that is asked about a device, the current one (0) unless it is named."""

        def asked(device: Any = None, *_: Any, **__: Any) -> Any:
            self.use()
            index = device if isinstance(device, int) else (device is not None and torch.device(device).index) or 0
            self.questions.append((question, index, _place()))
            if question == "synchronize":
                self.wait(question)
            return answer

        return asked

    def _patch_tensors(self) -> None:
        torch.Tensor.to = _to
        torch.Tensor.cuda = lambda tensor, device="cuda", **options: _to(tensor, device, **options)
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor
        for make in (torch.tensor, torch.as_tensor):
            made = _made_on_device(make)
            setattr(torch, make.__name__, made)
            # in scripted functions it stays torch's own
            torch.jit._builtins._register_builtin(made, torch.jit._builtins._find_builtin(make))
        torch.Generator = PretendedGenerator
        torch._C._group_tensors_by_device_and_dtype = _groups
        torch.autocast.__init__ = _autocast_on_cpu
        enabled = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda device_type="cuda": enabled("cpu")

    def _patch_cuda(self) -> None:
        cuda = torch.cuda
        answers = {
            "get_device_name": "pretended GPU",
            "get_device_capability": (9, 0),
            "get_device_properties": SimpleNamespace(name="pretended GPU", major=9, minor=0, total_memory=80 << 30),
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "is_bf16_supported": True,
            "max_memory_allocated": 0,
            "max_memory_reserved": 0,
            "mem_get_info": (70 << 30, 80 << 30),
            "memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "synchronize": None,
        }
        for name, answer in answers.items():
            setattr(cuda, name, self._ask(name, answer))
        cuda.is_available = lambda: True
        cuda.device_count = lambda: GPUS
        cuda.current_device = lambda: 0
        cuda._lazy_init = self.use
        cuda._is_in_bad_fork = lambda: self.forked
        cuda.is_initialized = lambda: self.used and not self.forked
        cuda.amp.common.amp_definitely_not_available = lambda: False
        for name in ("set_device", "set_rng_state", "manual_seed", "manual_seed_all", "empty_cache"):
            setattr(cuda, name, lambda *_: None)
        cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
        cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = PretendedStream
        cuda.stream = lambda stream: nullcontext()
        accelerator = torch.accelerator
        accelerator.is_available, accelerator.device_count = cuda.is_available, cuda.device_count
        accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
        accelerator.current_device_index, accelerator.set_device_index = cuda.current_device, cuda.set_device
        accelerator.current_stream = PretendedStream


class PretendedStream:
    """A stream, or an event on one: everything is done at once, so only waiting for it is seen."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pretended.use()

    def synchronize(self) -> None:
        pretended.wait("synchronize")

    def record(self, *_: Any) -> "PretendedStream":
        return self

    wait = wait_stream = wait_event = record_event = record

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


pretended = PretendedCuda()


def _place() -> str:
    """Where in our code, or in Detectron2's, the operator is that runs now."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for package, root in ROOTS.items():
            if file.startswith(root):
                return f"{package}/{file.removeprefix(root)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class PretendedTensor(torch.Tensor):
    """A tensor that pretends to be on a GPU, around the one that has the data.

    C++ takes it for one on the CPU, for autograd and autocast to work; so moving it is done in Python, see :func:`_to`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor, index: int) -> "PretendedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype
        )
        tensor.on_cpu, tensor.index = data, index
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operator, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> "PretendedTensor":
        return self.detach()

    @data.setter
    def data(self, other: "PretendedTensor") -> None:
        torch.Tensor.data.__set__(self, other)
        self.on_cpu, self.index = other.on_cpu, other.index

    def get_device(self) -> int:
        return self.index

    def cpu(self, **_: Any) -> torch.Tensor:
        return _to(self, "cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def pin_memory(self, device: Any = None) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, requires_grad: bool = False) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device, requires_grad=requires_grad)

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def __reduce_ex__(self, protocol: int) -> Any:
        # a file has the data; map_location moves it
        return self.on_cpu.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretendedTensor":
        if id(self) not in memo:
            copied = PretendedTensor(self.on_cpu.clone(), self.index).requires_grad_(self.requires_grad)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "on_cpu"})
            memo[id(self)] = copied
        return memo[id(self)]


class PretendedGenerator(plain_generator):
    """A generator of any device, which draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "PretendedGenerator":
        if torch.device(device).type == "cuda":
            pretended.use()
        return plain_generator.__new__(cls, "cpu")


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, index: int, non_blocking: bool) -> torch.Tensor:
        pretended.use()
        _note_copy_to_gpu(non_blocking)
        with dispatch._disable_current_modes():
            return PretendedTensor(_data(tensor).detach().clone(memory_format=torch.preserve_format), index)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return gradient.cpu(), None, None


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: PretendedTensor, non_blocking: bool) -> torch.Tensor:
        pretended.use()
        context.device = tensor.device
        if not non_blocking:
            pretended.wait("copy to the host")
        with dispatch._disable_current_modes():
            return tensor.on_cpu.detach().clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return gradient.to(context.device), None


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to`` between the CPU and pretended GPUs."""
    copy, other = kwargs.pop("copy", False), next((one for one in args if isinstance(one, torch.Tensor)), None)
    if other is not None:
        args = (other.device, other.dtype)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type not in ("cpu", "cuda"):
        return plain_to(tensor, *args, copy=copy, **kwargs)
    now, there = _index(tensor.device), _index(tensor.device if device is None else device)
    if there is not None and now != there:
        tensor = _ToGpu.apply(tensor, there, non_blocking)
    if dtype is not None or layout is not None or copy:
        options = {} if layout is None else {"memory_format": layout}
        tensor = plain_to(tensor, dtype=dtype or tensor.dtype, copy=copy and now == there, **options)
    return _ToCpu.apply(tensor, non_blocking) if there is None and now is not None else tensor


def _index(device: torch.device) -> int | None:
    """Which GPU a device is; None for the CPU."""
    return (device.index or 0) if device.type == "cuda" else None


def _made_on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor`` and the like, which make a tensor on the CPU and move it."""

    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        found = make(data, *args, **options)
        found = found if device is None else _to(found, device)
        return found.requires_grad_() if requires_grad else found

    return made


def _groups(tensors: Any, with_indices: bool = False) -> dict[Any, Any]:
    """The lists of optimizers by device and dtype; C++ would say that all are on the CPU."""
    groups = plain_groups(tensors, with_indices)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


def _autocast_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    plain_autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class _Dispatcher(dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operator, args, kwargs or {})


def _data(value: Any) -> Any:
    return value.on_cpu if isinstance(value, PretendedTensor) else value


def _run(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator where its tensors are, on the CPU if none pretends to be on a GPU."""
    there = [value for value in tree_leaves((args, kwargs)) if isinstance(value, PretendedTensor)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    if not there and (device is None or device.type != "cuda"):
        return operator(*args, **kwargs)
    pretended.use()
    name = operator._schema.name.replace("::", ".")
    if name == "aten.copy_":
        _note_copy(*args[:2], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        _check_devices(name, args, kwargs)
        _note(operator, name, args)
    index = there[0].index if device is None or device.type == "cpu" else _index(device)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    with dispatch._disable_current_modes():
        found = ON_GPU.get(operator, operator)(*tree_map(_data, args), **tree_map(_data, kwargs))
        if name == "aten.copy_":
            return args[0]
        wrapped = tree_map(
            lambda value: PretendedTensor(value, index) if isinstance(value, torch.Tensor) else value, found
        )
    return dispatch.return_and_correct_aliasing(operator, args, kwargs, wrapped)


def _check_devices(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse what CUDA refuses: tensors of several devices, but for single numbers and indices on the CPU."""
    values = [*args, *kwargs.values()]
    indices = args[1] if name in INDEXING and _is_there(args[0]) else ()
    if any(isinstance(index, torch.Tensor) and not _is_there(index) for index in indices):
        pretended.wait("copy of indices to the GPU")
        values = [value for value in values if value is not indices]
    # a number by itself is taken along, one in a list isn't; autograd's stand-ins for no gradient are empty
    tensors = [
        one
        for value in values
        for one in tree_leaves(value)
        if isinstance(one, torch.Tensor) and (_is_there(one) or (one.numel() and (one is not value or one.dim())))
    ]
    if len({one.device for one in tensors}) > 1:
        shapes = ", ".join(f"{tuple(value.shape)} on {value.device}" for value in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, {name} got {shapes}")


def _is_there(value: Any) -> bool:
    return isinstance(value, PretendedTensor)


def _note_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    if not _is_there(source):
        _note_copy_to_gpu(non_blocking)
    elif _is_there(target):
        pretended.launch("aten.copy_")
    elif not non_blocking:
        pretended.wait("copy to the host")


def _note_copy_to_gpu(non_blocking: bool) -> None:
    pretended.launch("copy to the GPU")
    if not non_blocking:
        pretended.wait("copy to the GPU")


def _note(operator: Any, name: str, args: tuple) -> None:
    masks = name in INDEXING and any(
        value is not None and value.dtype in (torch.bool, torch.uint8) for value in args[1]
    )
    # one value to all places of a mask is written without counting these
    filled = masks and name != "aten.index" and args[2].numel() == 1
    if name in WAITS or (masks and not filled):
        pretended.wait(name)
    returns = operator._schema.returns
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    if not is_view and name not in NO_LAUNCH:
        pretended.launch(name)
