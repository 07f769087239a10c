"""A modality made again from what a manifest says of it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from data_prep.sources import Modality
from mbtrain.errors import ConfigError, DataError

_MAKERS = {
    "text": ("data_prep.text", "text_modality"),
    "image": ("data_prep.image", "image_modality"),
    "audio": ("data_prep.audio", "audio_modality"),
}


def modality_of(name: str, options: dict[str, Any], where: str) -> Modality:
    """The modality of this name whose options are these.

    Raises:
        DataError: this version has none like it; the message begins with `where`.
    """
    made = None
    if name in _MAKERS:
        module, function = _MAKERS[name]
        maker: Callable[..., Modality] = getattr(importlib.import_module(module), function)
        parameters = inspect.signature(maker).parameters
        try:
            made = maker(**{key: value for key, value in options.items() if key in parameters})
        except (ConfigError, TypeError):
            made = None
    if made is None or made.options != options:
        raise DataError(f"{where}: made by another version of mbtrain-prep ({name}, {options}); make it again")
    return made
