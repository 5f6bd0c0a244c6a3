"""comfy_dancegrpo: reinforcement learning of image and video models, drawn as a ComfyUI graph.

Importing this package imports nothing heavy. In a source tree (a plain clone, or an editable install) the folders
`nodes/` and `trainer/` stand beside this one; `__path__` takes the tree's root in, so that `comfy_dancegrpo.nodes` and
`comfy_dancegrpo.trainer` import the same there as from a wheel.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "nodes" / "__init__.py").is_file():
    __path__.append(str(_root))


def resource(name: str) -> Path:
    """The folder `name` ("workflows", "web") that ships with the package, in a source tree as in a wheel."""
    beside = Path(__file__).resolve().parent / name
    return beside if beside.is_dir() else _root / name
