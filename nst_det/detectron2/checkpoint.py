"""Backbone files in Detectron2's checkpointer, under ``MODEL.WEIGHTS: backbone://NAME``."""

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone import ResNet
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from nst_det.detection.checkpoint import detector_entries
from nst_det.detection.zoo import ClassNames, by_own_names, without_prefix
from nst_det.detectron2.modeling import bottom_up_of
from nst_det.engine.checkpoint import KEPT, check_intact, write_state
from nst_det.engine.config import expand_path
from nst_det.engine.io import write_text
from nst_det.errors import UserError
from nst_det.models import (
    BackboneHandler,
    Bottomup,
    Card,
    load_backbone,
    load_into,
    load_plain,
    load_strict,
    resolve,
)
from nst_det.models.bottomup import load_recognized
from nst_det.models.caffe import is_caffe, stride_in_1x1
from nst_det.models.card import check_pixels
from nst_det.models.convert import batch_norm_eps, resnet_to_detectron2
from nst_det.models.io import card_path, load_pickled, named_tensors
from nst_det.models.weights import are_of_detector

log = logging.getLogger(__name__)
PREFIX = "backbone://"
SUFFIX = ".safetensors"
PARTS = {"backbone": "FPN", "proposal_generator": "RPN", "roi_heads": "RoI heads"}


class BackboneCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that also reads backbone files, strictly.

    From a backbone file (``backbone://NAME``, or a ``.safetensors`` path with its card) the bottom-up is filled whole
    or an error names what doesn't fit; its input contract (channel order, mean, std) is compared with the model's.  A
    ``.safetensors`` file without a card is a whole detector of either engine, whose names are Detectron2's.  Those of
    torchvision's zoo and of Detectron2's fit a timm bottom-up too, as far as they compute the same there.  A detector
    of other classes than ``classes`` ([] if unknown) fills everything but the box predictor, of which ``names`` says
    what is kept; with ``whole`` it is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        whole: bool = False,
        classes: Sequence[str] = (),
        names: ClassNames | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        # whether weights that leave a part of the detector random are refused
        self.whole, self.classes = whole, classes
        self.names, self._resumes = names or ClassNames(), False
        # what is saved: the model, or an average of its weights
        self.written = model
        self._card: Card | None = None
        self._source = ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        self._resumes = resume and self.has_checkpoint()
        start = path if self._resumes else expand_path(path, "MODEL.WEIGHTS")
        loaded: dict[str, Any] = super().resume_or_load(start, resume=resume)
        return loaded

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._card, self._source = None, path
        if not path:
            self._refuse_to_keep("MODEL.WEIGHTS is empty, it")
        if path.startswith(PREFIX) or (path and "://" not in path):
            path = str(resolve(path))
        try:
            loaded: dict[str, Any] = super().load(path, *args, **kwargs)
        except (FileNotFoundError, AssertionError) as error:
            if path and "://" not in path and not Path(path).exists():
                raise UserError(f"{path}: no such weights file; correct MODEL.WEIGHTS") from error
            raise
        finally:
            # Detectron2 would refuse every later load after one that failed
            self._parsed_url_during_load = None
        return loaded

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            # Detectron2 opens these by itself; this refuses pickles that aren't trusted
            load_pickled(filename)
        if filename.endswith(SUFFIX) and card_path(filename).is_file():
            self._refuse_to_keep(filename)
            entries, self._card = _backbone_entries(self.model, filename)
            return {"model": entries}
        own, loaded = self.model.state_dict(), dict[str, Any]()
        if filename.endswith(SUFFIX):
            loaded["model"] = load_plain(filename, own)
        else:
            loaded = super()._load_file(filename)
        if self._resumes:
            return loaded
        prefix, bottom_up = bottom_up_of(self.model)
        # Detectron2 puts what has no entry of that name into one
        tensors = named_tensors(loaded if len(loaded) > 1 else loaded["model"], filename)
        if not are_of_detector(tensors):
            self._refuse_to_keep(filename)
            if not isinstance(bottom_up, Bottomup):
                return loaded
            load_recognized(bottom_up, filename, *_pixels(self.model), f"MODEL.WEIGHTS {filename}", tensors)
            return {"model": {f"{prefix}{name}": value for name, value in bottom_up.state_dict().items()}}
        path = Path(filename)
        given = without_prefix(tensors, own, path)
        given = by_own_names(path, given, own, bottom_up, _pixels(self.model), f"MODEL.WEIGHTS {path}")
        names = None if self.whole else self.names
        loaded["model"], filled = detector_entries(path, given, own, self.classes, "MODEL.WEIGHTS", names)
        log.info("%s: %s", path, filled)
        return loaded

    def _refuse_to_keep(self, source: str) -> None:
        if self.names.keep and not self.whole:
            raise UserError(f"MODEL.KEEP_CLASSES: {source} holds no detector; name one's weights, or set it False")

    def _torch_load(self, f: str) -> dict[str, Any]:
        loaded: dict[str, Any] = load_pickled(f)
        return loaded

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's, but never half written, and of the numbered checkpoints only the newest are kept."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        write_state(Path(self.save_dir) / f"{name}.pth", {"model": self.written.state_dict(), **parts, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")
        for old in numbered(self.save_dir)[:-KEPT]:
            old.unlink(missing_ok=True)

    def get_checkpoint_file(self) -> str:
        """Return the newest checkpoint in the folder; a damaged one costs a warning, and the one before it is taken."""
        newest = Path(super().get_checkpoint_file())
        older = sorted((path for path in newest.parent.glob("model_*.pth") if path < newest), reverse=True)
        for path in (newest, *older):
            try:
                check_intact(path)
                return str(path)
            except UserError as error:
                log.warning("%s; taking the one before it", error)
        raise UserError(f"{self.save_dir}: every checkpoint here is damaged; remove the folder to start this run again")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint; a process that is killed meanwhile leaves the former name."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        if self.whole and missing:
            raise UserError(
                f"{self._source}: {len(missing)} entries that this detector needs are not in it "
                f"({', '.join(missing[:3])}); name weights that were trained with this config"
            )
        if self._card is None:
            super()._log_incompatible_keys(incompatible)
            return
        counts = Counter(PARTS.get(module, module) for module in (name.split(".")[0] for name in missing))
        log.info(
            "%s: the bottom-up is filled (method %s); expected to start anew: %s",
            self._source,
            self._card.method or "unknown",
            ", ".join(f"{part} ({count} entries)" for part, count in counts.items()),
        )


def _pixels(model: Any) -> tuple[list[float], list[float], str]:
    mean, std = (pixels.flatten().tolist() for pixels in (model.pixel_mean, model.pixel_std))
    return mean, std, str(model.input_format or "BGR")


def numbered(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run in its folder, oldest first, without that of its end."""
    return sorted(Path(folder).glob("model_*[0-9].pth"))


def step_of(path: Path) -> int:
    """Return the finished steps of one of them; Detectron2 numbers them by the last step."""
    return int(path.stem.removeprefix("model_")) + 1


def _backbone_entries(model: Any, path: str) -> tuple[dict[str, Tensor], Card]:
    """Return what a backbone file fills of a detector, by the detector's names."""
    prefix, bottom_up = bottom_up_of(model)
    above: dict[str, Tensor] = {}
    if isinstance(bottom_up, Bottomup):
        card = load_into(bottom_up, path)
    elif isinstance(bottom_up, ResNet):
        state_dict, card = load_backbone(path)
        caffe = is_caffe(card.arch)
        if "layer1.0.conv3.weight" in state_dict and stride_in_1x1(bottom_up) != caffe:
            raise UserError(f"{path}: set MODEL.RESNETS.STRIDE_IN_1X1 {caffe}, this backbone was trained so")
        given = resnet_to_detectron2(state_dict, batch_norm_eps(card.arch, card.arch_kwargs))
        # a network cut at res4 leaves res5 to RoI heads that have it (Res5ROIHeads), or to nobody
        cut = {name for name in given if name.startswith("res") and name.split(".")[0] > bottom_up.stage_names[-1]}
        above = {f"roi_heads.{name}": given[name] for name in cut if f"roi_heads.{name}" in model.state_dict()}
        try:
            load_strict(bottom_up, {name: value for name, value in given.items() if name not in cut}, path)
        except ValueError as error:
            raise UserError(f"{error}; compare MODEL.RESNETS with the backbone's architecture") from error
    else:
        raise UserError(
            f"{path}: a backbone file can't fill a {type(bottom_up).__name__}; use build_timm_fpn_backbone or "
            "build_resnet_fpn_backbone as MODEL.BACKBONE.NAME"
        )
    check_pixels(card, *_pixels(model), path)
    return {f"{prefix}{name}": value for name, value in bottom_up.state_dict().items()} | above, card


class _Detectron2Handler(BackboneHandler):
    """``backbone://NAME`` for Detectron2's path manager, as a file that a plain DetectionCheckpointer reads."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, str] = {}
        # removed with this process
        self._folder = tempfile.TemporaryDirectory(prefix="nst_det_")

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if path not in self._files:
            state_dict, card = load_backbone(path)
            # by timm's names and, for a plain ResNet, by Detectron2's too; with matching by the ends of names they
            # fit alone, under an FPN and in a larger module
            entries = {f"model.{name}": value for name, value in state_dict.items()}
            try:
                entries.update(resnet_to_detectron2(state_dict, batch_norm_eps(card.arch, card.arch_kwargs)))
            except UserError:
                log.debug("%s is not a plain ResNet, so it has timm's names only", path)
            file = Path(self._folder.name) / f"{len(self._files)}-{resolve(path).stem}.pth"
            torch.save({"model": entries, "__author__": "nst_det", "matching_heuristics": True}, file)
            self._files[path] = str(file)
        return self._files[path]


PathManager.register_handler(_Detectron2Handler(), allow_override=True)
