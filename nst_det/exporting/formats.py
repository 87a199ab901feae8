"""The files of a traced detector: ONNX, OpenVINO, and a program of ``torch.export``.

In eight bits convolutions and products are quantized, boxes and scores stay float.
"""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from nst_det.detection.torchvision import Detector
from nst_det.errors import UserError
from nst_det.exporting.graph import DetectorGraph
from nst_det.exporting.runtime import INPUT, KEY, OUTPUTS, Contract

if TYPE_CHECKING:
    import onnx
    import openvino

# of the picture that is traced; the graph takes any size
TRACED_SIZE = (224, 288)
# RoiAlign with half a pixel taken off is in 16 and later, and every runtime of the last years has 18
OPSET = 18
# the last layers: in 256 steps, scores would be equal by the dozen and boxes would move by pixels
FLOAT_LAYERS = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred")


class _Widened(nn.Module):
    """A weight that is kept in float16 and computes in float32."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


def with_half_weights(detector: Detector) -> Detector:
    """Return a copy that keeps the weights of convolutions and products in float16; it computes in float32.

    Processors have few operators in float16, and a coordinate above 1024 would have steps of a whole pixel in it.
    """
    halved = copy.deepcopy(detector)
    for layer in list(halved.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = layer.weight.data.half()
            parametrize.register_parametrization(layer, "weight", _Widened(), unsafe=True)
    return halved


def trace(detector: Detector, batch: int = 1) -> ExportedProgram:
    """Return the graph of a detector on the CPU, for so many images of any one size."""
    # torch.export itself wants sides longer than the largest stride (64 pixels with FPN); ONNX has no such limit
    images = torch.zeros(batch, 3, *TRACED_SIZE, dtype=torch.uint8)
    sizes = {INPUT: {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    with torch.no_grad(), quiet():
        program = torch.export.export(DetectorGraph(detector).cpu(), (images,), dynamic_shapes=sizes, strict=False)
    for node in program.graph.nodes:
        # source lines with paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def save_program(program: ExportedProgram, contract: Contract, path: Path) -> None:
    """Write a program of ``torch.export``."""
    # by its own name torch.export would refuse a file that doesn't end in .pt2
    with open(path, "wb") as file, quiet():
        torch.export.save(program, file, extra_files={f"{KEY}.json": contract.to_json()})


def to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """Return the program in ONNX."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with torch.no_grad(), quiet():
            written = torch.onnx.export(
                program,
                program.example_inputs[0],
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _lacking("onnx", error) from error
    assert written is not None
    ClearMetadataAndDocStringPass()(written.model)
    proto: onnx.ModelProto = written.model_proto
    # sizes are named by the tracer's symbols; those in between are inferred again by runtimes
    del proto.graph.value_info[:]
    for size, name in zip(proto.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width")):
        size.dim_param = name
    for output in proto.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "detections"
    return proto


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Return ``aten::sort.stable`` of (..., N) values in ONNX, whose TopK takes the lower index first of equal ones."""
    from onnxscript import opset18 as op

    return op.TopK(values, op.Shape(values, start=-1), axis=dim, largest=int(descending), sorted=1)


def save_onnx(proto: onnx.ModelProto, contract: Contract, path: Path) -> None:
    """Write ONNX with its contract."""
    import onnx

    onnx.helper.set_model_props(proto, {KEY: contract.to_json()})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def to_openvino(proto: onnx.ModelProto) -> openvino.Model:
    """Return ONNX as OpenVINO reads it."""
    import openvino

    with TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        path.write_bytes(proto.SerializeToString())
        # converting leaves a third of the operators less than reading, but widens weights that are in float16
        halved = any(weight.data_type == weight.FLOAT16 for weight in proto.graph.initializer)
        try:
            model = openvino.Core().read_model(path) if halved else openvino.convert_model(path)
        except openvino.frontend.OpConversionFailure as error:
            raise _lacking("openvino", error) from error
    for op in model.get_ops():
        # of equal values ONNX takes the lower index first, which its reader forgets
        if op.get_type_name() == "TopK" and op.get_attributes()["sort"] == "value":
            op.set_attribute("stable", True)
    return model


def save_openvino(model: openvino.Model, contract: Contract, path: Path) -> None:
    """Write ``FILE.xml`` and ``FILE.bin``."""
    import openvino

    model.set_rt_info(contract.to_json(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    # without the indentation, which is a third of it
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")


def quantize_onnx(proto: onnx.ModelProto, images: Sequence[np.ndarray]) -> onnx.ModelProto:
    """Return ONNX with eight-bit convolutions and products, their ranges from (B, 3, H, W) uint8 images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {INPUT: image}

    last = [node.name for node in proto.graph.node if any(_is_last(name) for name in node.input)]
    with TemporaryDirectory() as folder, _without_advice():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            # it changes what it is given
            onnx.ModelProto.FromString(proto.SerializeToString()),
            str(path),
            Images(),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=last,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(path))


def quantize_openvino(model: openvino.Model, images: Sequence[np.ndarray]) -> openvino.Model:
    """Return an OpenVINO model with eight-bit convolutions and products, as :func:`quantize_onnx`."""
    import nncf

    names = sorted(op.get_friendly_name() for op in _float_operators(model))
    with _without_advice():
        quantized: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=names, validate=False),
        )
    # its settings, with all the names above
    del quantized.rt_info["nncf"]
    return quantized


def _float_operators(model: openvino.Model) -> Iterator[Any]:
    """Yield what must not be quantized: the last layers, and what lies between the networks, such as box decoding."""
    layers = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Convolution", "MatMul")]
    last = {
        op.get_friendly_name()
        for op in layers
        if any(_is_last(v.get_node().get_friendly_name()) for v in op.input_values())
    }
    # what leads into a convolution is network; boxes and scores lead into none
    inside: set[str] = set()
    waiting = [op for op in layers if op.get_type_name() == "Convolution"]
    while waiting:
        op = waiting.pop()
        if op.get_friendly_name() not in inside:
            inside.add(op.get_friendly_name())
            waiting += [value.get_node() for value in op.input_values()]
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        if name in last or (name not in inside and kind not in ("MatMul", "Constant", "Parameter", "Result")):
            yield op


def _is_last(weight: str) -> bool:
    return any(f".{layer}." in weight for layer in FLOAT_LAYERS)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without the progress bars and the advice of the quantizers."""
    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _lacking(form: str, error: BaseException) -> UserError:
    """Return the error of an operator that a format doesn't have."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with its own source
    told = next((line for line in lines if "operation" in line or "function" in line), lines[0])
    return UserError(f"--format {form}: {told[:200]}; choose another --format")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of exporters and quantizers on each other's interfaces; an error is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
