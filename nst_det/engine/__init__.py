"""Plumbing that every stage shares: config, seeds, atomic files, checkpoints, run folders, provenance."""
