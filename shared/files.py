"""Files that are written whole or not at all, and checkpoints that are checked when read."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from shared.config import SCHEMA


def write_bytes(path: Path, content: bytes) -> None:
    """Write whole or not at all: a temporary file beside `path`, then a rename.

    Raises OSError naming the path when the disk is full; what stood at `path` still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        stands = "; the last good one stands" if path.exists() else ""
        raise OSError(f"{path}: cannot be written ({error.strerror}){stands}") from None


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError; a plain write does
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A last.ckpt. Raises ValueError when it is damaged or of another schema."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        line = str(error).split("\n")[0][:120]
        raise ValueError(f"{path}: not a readable checkpoint ({line})") from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else None
        raise ValueError(f"{path}: checkpoint of schema {found}, this code reads {SCHEMA}")
    return state
