"""ComfyUI's door to comfy_dancegrpo. Imports no torch.

ComfyUI loads this file by its path, under whatever name the folder has; the library is always imported as `comfy_dancegrpo`.
"""

import importlib
import importlib.util
import logging
import re
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_LIBRARY = _ROOT / "comfy_dancegrpo"


def _import_library() -> None:
    """`comfy_dancegrpo` from this folder; a copy that is already imported from elsewhere is kept, and both are named."""
    known = sys.modules.get("comfy_dancegrpo") if __name__ != "comfy_dancegrpo" else None
    if known is not None:
        _tell_of_two(known.__file__, "that one, already imported, is used")
        return
    # what `import comfy_dancegrpo` would find without us: a wheel, an editable install, a folder of PYTHONPATH
    other = importlib.util.find_spec("comfy_dancegrpo") if __name__ != "comfy_dancegrpo" else None
    spec = importlib.util.spec_from_file_location("comfy_dancegrpo", _LIBRARY / "__init__.py", submodule_search_locations=[str(_LIBRARY)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfy_dancegrpo"] = module
    spec.loader.exec_module(module)
    if other is not None:
        _tell_of_two(other.origin, "this one is used")


def _tell_of_two(init: str | None, which: str) -> None:
    """One line, when the package whose `__init__.py` is given is not of this folder."""
    folder = Path(init).resolve().parent if init else _ROOT
    if folder not in (_ROOT, _LIBRARY):
        logging.warning("comfy_dancegrpo is here twice: %s (%s) and %s (%s); %s", _ROOT, _version(_LIBRARY), folder, _version(folder), which)


def _version(folder: Path) -> str:
    inner = folder / "comfy_dancegrpo"  # where the folder is a whole clone
    text = ((inner if inner.is_dir() else folder) / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown version"


_import_library()
_nodes = importlib.import_module("comfy_dancegrpo.nodes")
NODE_CLASS_MAPPINGS = _nodes.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = _nodes.NODE_DISPLAY_NAME_MAPPINGS
WEB_DIRECTORY = "./web"  # served as /extensions/<this folder's name>/: scripts, and a help page for every node in docs/
if "folder_paths" in sys.modules and "server" in sys.modules:  # this is ComfyUI, and not a test that loads the door alone
    importlib.import_module("comfy_dancegrpo.nodes.comfy_host").activate()
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
