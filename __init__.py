"""ComfyUI's door to comfy_dancegrpo. Imports no torch.

ComfyUI loads this file by its path, under whatever name the folder has; the library is always imported as `comfy_dancegrpo`.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def _library():
    """`comfy_dancegrpo` from this folder; a copy that is already imported from elsewhere is kept, and both are named."""
    known = sys.modules.get("comfy_dancegrpo")
    if known is not None and getattr(known, "__file__", None) == str(_ROOT / "comfy_dancegrpo" / "__init__.py"):
        return known
    if known is not None and known is not sys.modules.get(__name__):
        _tell_of_two(Path(known.__file__).parent, known.__version__, "that one, already imported, is used")
        return known
    spec = importlib.util.spec_from_file_location(
        "comfy_dancegrpo", _ROOT / "comfy_dancegrpo" / "__init__.py", submodule_search_locations=[str(_ROOT / "comfy_dancegrpo")])
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfy_dancegrpo"] = module
    spec.loader.exec_module(module)
    for found in importlib.metadata.distributions(name="comfy-dancegrpo"):
        other = Path(found.locate_file("comfy_dancegrpo"))
        if other.is_dir() and other.resolve() != _ROOT / "comfy_dancegrpo":
            _tell_of_two(other, found.version, "this one is used")
    return module


def _tell_of_two(path: Path, version: str, which: str) -> None:
    here = (_ROOT / "comfy_dancegrpo" / "__init__.py").read_text(encoding="utf-8").split('__version__ = "')[1].split('"')[0]
    logging.warning("comfy_dancegrpo is here twice: %s (%s) and %s (%s); %s", _ROOT, here, path, version, which)


_library()
_nodes = importlib.import_module("comfy_dancegrpo.nodes")
NODE_CLASS_MAPPINGS = _nodes.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = _nodes.NODE_DISPLAY_NAME_MAPPINGS
if "folder_paths" in sys.modules and "server" in sys.modules:  # this is ComfyUI, and not a test that loads the door alone
    importlib.import_module("comfy_dancegrpo.nodes.comfy_host").activate()
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
