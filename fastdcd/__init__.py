"""fastdcd: distillation with DCD from a cached teacher, on planned augmentation."""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

__version__ = "0.1.0"

# An unrelated package on the Python index is called `pipelines` too.
_found = _find_spec("pipelines")
if _found is None or not _found.origin or not _Path(_found.origin).with_name("plan.py").is_file():
    raise ImportError(
        f"fastdcd needs its own package `pipelines`, found {_found.origin if _found else 'none'}; "
        "pip uninstall pipelines, then install fastdcd again"
    )
