"""Backbones and detectors for other frameworks: written, compared with the original, described by a model card."""
