"""The scale cache: calibrations that were done before, on disk, by key."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.scales import Scales

logger = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """`$QVD_CACHE`, or `qvd` in the user's cache folder."""
    if "QVD_CACHE" in os.environ:
        return Path(os.environ["QVD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qvd"


def cache_key(description: Mapping[str, Any]) -> str:
    """One key for everything a calibration depends on (JSON types; whatever else is taken by its `repr`)."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=repr).encode()).hexdigest()[:40]


class ScaleCache:
    """Scales files named by their key in one folder."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else default_cache_folder()

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def partial_path(self, key: str) -> Path:
        """Where a calibration that is under way keeps what it has seen."""
        return self.folder / f"{key}.unfinished.safetensors"

    def load(self, key: str) -> Scales | None:
        """The cached scales; None when there are none or when their file is damaged (a warning says so)."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return Scales.load(path)
        except QVDError as error:
            logger.warning("Ignoring a cached calibration: %s", error)
            return None

    def store(self, key: str, scales: Scales) -> Path | None:
        """Write the scales; a cache that cannot be written costs a warning, never the calibration."""
        try:
            return scales.save(self.path(key))
        except QVDError as error:
            logger.warning("The calibration was not cached: %s", error)
            return None
