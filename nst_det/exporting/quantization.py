"""Eight-bit networks: convolutions and products are quantized, boxes and scores stay float."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from nst_det.exporting.contract import INPUT
from nst_det.exporting.formats import quiet

if TYPE_CHECKING:
    import onnx
    import openvino

# the last layers: in 256 steps, scores would be equal by the dozen and boxes would move by pixels
FLOAT_LAYERS = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred")


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
