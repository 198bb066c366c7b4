"""Files of torch.save: tensors and plain data are read, code is never run."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from typing import Any

import torch

from analysis.formats.base import Foreign

_ASKED = re.compile(r"(?:GLOBAL|global|class|function) [`']?([A-Za-z_][\w.]*)")


def load_tensors(file: Foreign) -> Any:
    """What ``torch.save`` wrote, on the CPU. Raises ConfigError for a file that holds more than tensors and plain data.

    A pickle may name any function to be called when it is read. Here nothing but tensors, numbers, texts, lists and
    dicts is made, whoever the file is from, and there is no option that changes it.
    """
    content = io.BytesIO(file.bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused then anyway
            return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _ASKED.search(str(error))
        what = f" ({found[1]})" if found else ""
        raise file.refuse(
            f"the pickle asks for more than tensors and plain data{what}, which could run any program when it is read; "
            "it was not run. Save the tensors alone, with torch.save, where you trust the file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise file.refuse(
            f"not a file of torch.save: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
