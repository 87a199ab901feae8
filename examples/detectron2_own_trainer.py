"""NST on FPN features in a Detectron2 project of one's own.

The project has its trainer class and its config, both as Detectron2's documentation shows them.  The three lines
that add the transfer are marked; all else is plain Detectron2:

    python examples/detectron2_own_trainer.py --config-file student.yaml --teacher teacher.yaml \
        --teacher-weights teacher.pth OUTPUT_DIR output/mine
"""

from __future__ import annotations

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup

from nst_det.detectron2 import add_config, distill  # line 1


class Trainer(DefaultTrainer):
    """Somebody's trainer."""

    teacher = ("", "")

    @classmethod
    def build_model(cls, cfg):
        """The student, and around it what makes it learn from the teacher."""
        student = super().build_model(cfg)
        config_file, weights = cls.teacher
        return distill(student, config_file, "nst-poly:10", ["p2", "p3", "p4", "p5"], teacher_weights=weights)  # line 2


def main() -> None:
    """Train."""
    parser = default_argument_parser()
    parser.add_argument("--teacher", required=True, help="any Detectron2 config")
    parser.add_argument("--teacher-weights", default="", help="its checkpoint")
    args = parser.parse_args()
    cfg = get_cfg()
    add_config(cfg)  # line 3, for backbones of this project (build_timm_fpn_backbone); a ResNet needs it not
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    Trainer.teacher = (args.teacher, args.teacher_weights)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    main()
