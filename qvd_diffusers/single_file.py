"""`from_single_file`: what is in the file, before and after diffusers renames it.

diffusers renames the tensors of a file whose names are not exactly those of the float model. The scales of a quantized
file are such names, and renaming what needs no renaming may exchange layers (Wan's norm2 and norm3). So they are held
back while diffusers looks, and afterwards the file's own names are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.layers import FLOAT32_BUFFERS
from qvd_diffusers.config import QVDConfig, QVDMethod
from qvd_diffusers.mapped import OneByOne
from qvd_diffusers.streaming import split_name

logger = logging.getLogger(__name__)

CODE_DTYPES = (torch.int8, torch.uint8)


class HeldBack(OneByOne):
    """An ordinary dict as long as diffusers only looks at the tensors or renames them; then one by one."""

    begun = False

    def items(self) -> Any:
        return super().items() if self.begun else dict.items(self)


class SingleFile:
    """The tensors of one file.

    shown: what diffusers gets to see and may rename: the names a full-precision file would have.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._stored = dict(tensors)
        self._renamed = False
        self.codes = next((name for name, tensor in tensors.items() if tensor.dtype in CODE_DTYPES), None)
        added = FLOAT32_BUFFERS if self.is_quantized else ()
        kept = {name: tensor for name, tensor in tensors.items() if split_name(name)[1] not in added}
        self.shown = HeldBack(kept)

    @classmethod
    def already_renamed(cls, tensors: Mapping[str, Tensor]) -> SingleFile:
        """A file that an older diffusers has renamed before showing it."""
        file = cls(tensors)
        file._renamed = True
        return file

    @property
    def is_quantized(self) -> bool:
        """Whether the file holds codes instead of float weights."""
        return self.codes is not None

    def begin(self) -> None:
        """From here on diffusers only fills the model: let it read one tensor at a time."""
        self.shown.begun = True

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put the names and tensors of the file into `tensors`, in the place of what diffusers made of them.

        Raises QVDError when they are not known.
        """
        if self._renamed:
            raise QVDError(
                "this version of diffusers renames the tensors of a quantized single file before QVD sees them: "
                "update diffusers, or load the model with from_pretrained from the folder it was saved to."
            )
        tensors.clear()
        tensors.update(self._stored)


def recorded_config(model: Any, asked: QVDConfig, file: SingleFile) -> QVDConfig:
    """The config a quantized file was saved with, from config.json of `from_single_file(config=...)`.

    asked: the user's; used when it has the list of layers itself, because it was read from a config.json.
    Raises QVDError when neither says how the file is quantized.
    """
    if asked.layers:
        return asked
    entry = model.config.get("quantization_config")
    if not isinstance(entry, Mapping) or entry.get("quant_method") != QVDMethod.QVD:
        raise QVDError(
            f"{file.codes} holds integer codes, and no config.json says how they were made: pass config= the folder "
            "that QVD saved the model to, or load that folder with from_pretrained."
        )
    recorded: QVDConfig = QVDConfig.from_dict(entry)
    if asked.spec not in (QVDConfig().spec, recorded.spec):
        logger.warning("This file is quantized already: %r is used, not the quantization_config given.", recorded)
    return recorded
