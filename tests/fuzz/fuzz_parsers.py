"""Fuzz every parser of files from strangers: nothing but a UserError may come out.

    pip install atheris
    python tests/fuzz/fuzz_parsers.py --seconds 3600

Each parser gets mutated bytes, guided by the coverage of the code that reads them.  What breaks is written to the
folder of ``--crashes`` and can be read again by ``--replay FILE``.  The test suite runs the same parsers under
hypothesis, without atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

_KEPT = tempfile.TemporaryDirectory(prefix="fuzz_")
FOLDER = Path(_KEPT.name)

IMAGES = (".jpg", ".png", ".bmp", ".webp", ".tif")

Parser = Callable[[bytes], object]


def _image(extension: str) -> bytes:
    pixels = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    return cv2.imencode(extension, pixels)[1].tobytes()


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _parsers() -> dict[str, Parser]:
    """The parsers by name; each takes bytes and raises nothing but UserError."""
    from nst_det.comparison.config import parse_row
    from nst_det.data.annotation import parse_annotation
    from nst_det.data.images import decode_image, image_size
    from nst_det.data.safe_io import name_problem
    from nst_det.data.voc import scan_list
    from nst_det.data.yolo import YoloClasses, find_classes, parse_yolo
    from nst_det.distillation.cache import read_index
    from nst_det.distillation.config import load_distill_config
    from nst_det.engine.checkpoint import load_checkpoint
    from nst_det.engine.config import parse_value
    from nst_det.engine.io import read_json
    from nst_det.engine.metrics import read_metrics
    from nst_det.evaluation.io import detections_from_json, read_coco_names, read_comp4
    from nst_det.models.card import card_from_json
    from nst_det.models.io import load_plain
    from nst_det.models.registry import check_name

    def text(data: bytes) -> str:
        return data.decode("utf-8", "surrogateescape")

    def method(data: bytes) -> object:
        try:
            return parse_row(text(data))
        except ValueError:
            # what the callers turn into a line with the key
            return None

    def annotation(data: bytes) -> None:
        found, problems = parse_annotation(data, "a")
        assert found is not None or problems
        assert all("\n" not in problem for problem in problems)

    def names(data: bytes) -> None:
        found = scan_list(_file("a.txt", data), lambda: ())
        assert found is None or not any(map(name_problem, found[0]))

    def labels(data: bytes) -> None:
        found, problems = parse_yolo(text(data), "a", (40, 30), YoloClasses(("cat", "dog")))
        assert len(found.objects) + len(problems) <= len(text(data).splitlines())
        assert all("\n" not in problem for problem in problems)

    def classes(data: bytes) -> None:
        _file("data.yaml", data)
        found = find_classes(FOLDER, ["data.yaml"])
        assert found is None or found.names

    def image(data: bytes) -> None:
        image_size(data, "a")
        decoded = decode_image(data, "a")
        assert decoded.dtype == "uint8"
        assert decoded.shape[2:] == (3,)

    def json_of(data: bytes) -> object:
        return read_json(_file("a.json", data))

    def index(data: bytes) -> object:
        _file("index.json", data)
        return read_index(FOLDER)

    return {
        "annotation": annotation,
        "list": names,
        "yolo": labels,
        "yolo classes": classes,
        **{f"image{extension}": image for extension in IMAGES},
        "results": lambda data: read_comp4(_file("comp4_det_t_a.txt", data).parent, ("a",), ("a",), "t"),
        "detections": lambda data: detections_from_json(json_of(data), ("a",), ("a",), "a.json"),
        "coco names": lambda data: read_coco_names(_file("n.json", data)),
        "card": lambda data: card_from_json(json_of(data), "a.json"),
        "registry": lambda data: check_name(text(data)),
        "config": lambda data: load_distill_config(_file("a.yaml", data)),
        "value": lambda data: parse_value(text(data)),
        "method": method,
        "metrics": lambda data: read_metrics(_file("metrics.jsonl", data)),
        "cache": index,
        "checkpoint": lambda data: load_checkpoint(_file("step-1.pt", data)),
        "safetensors": lambda data: load_plain(_file("a.safetensors", data)),
        "pickle": lambda data: load_plain(_file("a.pth", data)),
    }


# something of the right form to begin with
SEEDS = {
    "annotation": b"<annotation><size><width>9</width><height>9</height></size><object><name>a</name><bndbox>"
    b"<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>",
    "list": b"a\nb 1\n",
    "yolo": b"0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.5 0.1 0.5 0.5\n",
    "yolo classes": b"names: {0: cat, 1: dog}\nkpt_shape: [17, 3]\n",
    **{f"image{extension}": _image(extension) for extension in IMAGES},
    "results": b"a 0.5 1 1 5 5\n",
    "detections": b'[{"image_id": "a", "category": "a", "bbox": [1, 1, 5, 5], "score": 0.5}]',
    "coco names": b'{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "a"}]}',
    "card": json.dumps(
        {
            "arch": "resnet18",
            "num_classes": 2,
            "input": {"channel_order": "RGB", "mean": [0.1, 0.1, 0.1], "std": [1, 1, 1], "size": 9},
            "sha256": "0",
        }
    ).encode(),
    "registry": b"a-kd:0.9+nst-poly-s0",
    "config": b"NAME: a\nDATA: {ROOT: x}\nSOLVER: {MAX_ITER: 3}\nMETHODS: [ce, kd:0.5]\n",
    "value": b"[a, {b: 1e3}]",
    "method": b"kd:0.9+nst-poly:50@det",
    "metrics": b'{"step": 0, "loss": 1.0}\n{"step": 1}\n',
    "cache": json.dumps({"version": 1, "claim": {}, "pieces": [], "rows": 1, "shard_rows": 1, "shards": {}}).encode(),
    "safetensors": struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ' + b"\0" * 4,
    "pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
}


def check(name: str, parser: Parser, data: bytes) -> None:
    """Give ``data`` to a parser.

    Raises:
        AssertionError: an exception that is no UserError, or a UserError of more than one printable line.
    """
    from nst_det.errors import UserError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser(data)
    except UserError as error:
        if not str(error).isprintable():
            raise AssertionError(f"{name}: more than one printable line: {str(error)!r}") from error
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def main() -> None:
    """Fuzz all parsers in turn."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=int, default=600, help="of all parsers together")
    arguments.add_argument("--parsers", nargs="+", help="some of them (default: all)")
    arguments.add_argument("--crashes", type=Path, default=Path("crashes"))
    arguments.add_argument("--replay", type=Path, help="a file that broke a parser; name it by --parsers")
    args = arguments.parse_args()
    logging.disable(logging.CRITICAL)
    if args.replay:
        for name in args.parsers or list(_parsers()):
            check(name, _parsers()[name], args.replay.read_bytes())
        return
    import atheris

    with atheris.instrument_imports(include=["nst_det", "defusedxml", "yaml"]):
        parsers = _parsers()
    names = args.parsers or list(parsers)
    corpus = Path(tempfile.mkdtemp(prefix="corpus_"))
    for number, name in enumerate(names):
        (corpus / str(number)).write_bytes(bytes([number]) + SEEDS.get(name, b""))
    args.crashes.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        if data:
            name = names[data[0] % len(names)]
            with contextlib.redirect_stderr(None):
                check(name, parsers[name], data[1:])

    options = [f"-max_total_time={args.seconds}", f"-artifact_prefix={args.crashes}/", "-max_len=4096", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=8192", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
