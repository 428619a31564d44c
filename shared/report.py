"""A run folder becomes report.html: one file, no network."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> Path:
    """Write report.html into a finished run's folder; returns its path."""
    return folder / "report.html"
