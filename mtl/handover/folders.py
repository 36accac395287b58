"""Folders that appear whole or not at all, and never in the place of something else."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl.errors import UserError
from mtl.handover.deployment import EXPORT_FILE


def check_place(folder: Path) -> None:
    """Refuses a place where something lies that is no export.

    Raises:
        UserError: There is a file, or a folder with something else.
    """
    if not folder.exists() or (folder / EXPORT_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is no export, so it is left alone. Name another folder with --output.")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to write into, which takes the place of ``folder`` when the block ends well.

    An export that was there before is replaced. After a mistake nothing has changed.

    Raises:
        UserError: As :func:`check_place`.
    """
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    staging, replaced = temporary / "new", temporary / "old"
    try:
        staging.mkdir()
        yield staging
        open_to_all(staging)
        check_place(folder)
        if folder.exists():
            folder.rename(replaced)
        staging.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_to_all(folder: Path) -> None:
    """Gives files the usual permissions: some libraries write weights for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
