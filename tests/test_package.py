"""The package as it is installed, and as ComfyUI loads it: by path, from a folder with any name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import comfy_dancegrpo

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TREE = ("__init__.py", "pyproject.toml", "requirements.txt", "comfy_dancegrpo", "nodes", "trainer", "workflows", "web", "locales")

# as ComfyUI's load_custom_node does it
LOAD = """
import importlib.util, logging, os, sys, time
logging.basicConfig(format="LOG %(message)s")

def load_custom_node(path):
    name = path.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(path, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""


def copy_tree(to: Path, version: str | None = None) -> Path:
    """A plain clone, without the weights."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to / name)
    if version:
        init = to / "comfy_dancegrpo" / "__init__.py"
        init.write_text(init.read_text(encoding="utf-8").replace(f'"{comfy_dancegrpo.__version__}"', f'"{version}"'), encoding="utf-8")
    return to


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("custom_nodes") / "comfy-dance.grpo-main")


def python(code: str, *flags: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs code in a Python of its own, after `LOAD`; `path` stands first in sys.path."""
    code = (f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "") + LOAD + code
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


# -- what is installed --------------------------------------------------------------------------------------------------
def test_requirements_are_the_dependencies():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PYPROJECT["project"]["dependencies"]


def test_no_dependency_has_an_upper_bound():
    assert [d for d in PYPROJECT["project"]["dependencies"] if re.search("<|==|~=", d)] == []


def test_one_version():
    assert PYPROJECT["project"]["version"] == comfy_dancegrpo.__version__


def folder_of(package: str) -> Path:
    """Where a package's files lie in the tree."""
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    parent = max((p for p in folders if package == p or package.startswith(p + ".")), key=len)
    return ROOT.joinpath(folders[parent], *package[len(parent) + 1:].split(".")) if package != parent else ROOT / folders[parent]


def test_every_folder_with_python_files_is_a_package_of_the_wheel():
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages)) and all(folder_of(p).is_dir() for p in packages)
    code = {file.parent for top in ("comfy_dancegrpo", "nodes", "trainer") for file in (ROOT / top).rglob("*.py")}
    assert code - {folder_of(p) for p in packages} == set()


@pytest.mark.parametrize("package", ["comfy_dancegrpo.embedded", "comfy_dancegrpo.workflows", "comfy_dancegrpo.web", "comfy_dancegrpo.locales"])
def test_every_data_file_is_in_the_wheel(package):
    folder = folder_of(package)
    files = {f for f in folder.rglob("*") if f.is_file() and f.suffix != ".py" and "__pycache__" not in f.parts}
    shipped = {f for pattern in PYPROJECT["tool"]["setuptools"]["package-data"][package] for f in folder.glob(pattern)}
    assert files and files - shipped == set()


# -- as ComfyUI loads it ------------------------------------------------------------------------------------------------
def test_loads_by_path_with_the_standard_library_alone(clone):
    code = f"""
start = time.perf_counter()
module = load_custom_node({str(clone)!r})
seconds = time.perf_counter() - start
assert len(module.NODE_CLASS_MAPPINGS) >= 14 and module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
print(f"{{seconds:.3f}} s", {{"nodes", "trainer"}} & sys.modules.keys(), sys.modules["comfy_dancegrpo"].__file__, sep="|")
"""
    done = python(code, "-S", "-E", cwd=clone.parent)
    seconds, claimed, file = done.stdout.strip().split("|")
    print(f"the pack's import took {seconds}")  # shown, not asserted: it depends on the machine
    assert claimed == "set()" and Path(file) == clone / "comfy_dancegrpo" / "__init__.py" and done.stderr == ""


def test_where_everything_is_installed_nothing_heavy_is_imported(clone):
    code = f"""
import types
theirs = sys.modules["nodes"] = types.ModuleType("nodes")  # ComfyUI's own
module = load_custom_node({str(clone)!r})
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
heavy = {{"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "matplotlib"}} & sys.modules.keys()
print(heavy, "trainer" in sys.modules, sys.modules["nodes"] is theirs, sys.modules["comfy_dancegrpo.nodes"].__file__, sep="|")
"""
    done = python(code, cwd=clone.parent)
    assert done.stdout.strip().split("|") == ["set()", "False", "True", str(clone / "nodes" / "__init__.py")]


def test_the_program_runs_from_a_clone(clone):
    done = subprocess.run([sys.executable, "-m", "comfy_dancegrpo.trainer", "--help"], cwd=clone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "validate" in done.stdout and done.stderr == ""
    where = "import comfy_dancegrpo.trainer.commands as c, comfy_dancegrpo.nodes as n; print(c.__file__); print(n.__file__)"
    assert python(where, cwd=clone).stdout.splitlines() == [str(clone / "trainer/commands.py"), str(clone / "nodes/__init__.py")]


def test_a_clone_named_as_the_package_imports_from_its_parent(tmp_path):
    clone = copy_tree(tmp_path / "comfy_dancegrpo")
    code = """
import comfy_dancegrpo.workflow.read, comfy_dancegrpo.nodes.loop, comfy_dancegrpo.trainer
from comfy_dancegrpo import errors
print(comfy_dancegrpo.__file__, comfy_dancegrpo.__version__, comfy_dancegrpo.workflow.read.__file__, sep="\\n")
"""
    found = python(code, "-S", "-E", cwd=tmp_path, path=tmp_path)
    assert found.stdout.splitlines() == [str(clone / "comfy_dancegrpo/__init__.py"), comfy_dancegrpo.__version__,
                                         str(clone / "comfy_dancegrpo/workflow/read.py")]
    assert "LOG" not in found.stderr
    assert python(f"load_custom_node({str(clone)!r})\nimport comfy_dancegrpo; print(comfy_dancegrpo.__file__)",
                  "-S", "-E", cwd=tmp_path).stdout.strip() == str(clone / "comfy_dancegrpo/__init__.py")


# -- two copies ---------------------------------------------------------------------------------------------------------
def test_two_clones_are_told_once(clone, tmp_path):
    other = copy_tree(tmp_path / "other", version="0.0.7")
    code = f"""
first, second = load_custom_node({str(other)!r}), load_custom_node({str(clone)!r})
assert first.NODE_CLASS_MAPPINGS == second.NODE_CLASS_MAPPINGS
print(sys.modules["comfy_dancegrpo"].__file__)
"""
    done = python(code, "-S", "-E", cwd=tmp_path)
    assert done.stdout.strip() == str(other / "comfy_dancegrpo" / "__init__.py")
    (line,) = [line for line in done.stderr.splitlines() if "LOG" in line]
    assert all(part in line for part in (str(clone), comfy_dancegrpo.__version__, str(other), "0.0.7", "already imported")), line


def test_an_installed_copy_is_told_once(clone, tmp_path):
    site = tmp_path / "site"
    installed = copy_tree(tmp_path / "source", version="0.0.8") / "comfy_dancegrpo"
    shutil.copytree(installed, site / "comfy_dancegrpo")
    info = site / "comfy_dancegrpo-0.0.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: comfy-dancegrpo\nVersion: 0.0.8\n")
    code = f"load_custom_node({str(clone)!r}); print(sys.modules['comfy_dancegrpo'].__file__)"
    done = python(code, "-S", "-E", cwd=tmp_path, path=site)
    assert done.stdout.strip() == str(clone / "comfy_dancegrpo" / "__init__.py")
    (line,) = [line for line in done.stderr.splitlines() if "LOG" in line]
    assert all(part in line for part in (str(clone), comfy_dancegrpo.__version__, str(site / "comfy_dancegrpo"), "0.0.8", "this one")), line


def test_another_clone_on_the_path_is_told_once(clone, tmp_path):
    """As an editable install of it, or PYTHONPATH, leaves it; here a folder that is named as the package itself."""
    other = copy_tree(tmp_path / "comfy_dancegrpo", version="0.0.9")
    done = python(f"load_custom_node({str(clone)!r}); print(sys.modules['comfy_dancegrpo'].__file__)", "-S", "-E", cwd=clone, path=tmp_path)
    assert done.stdout.strip() == str(clone / "comfy_dancegrpo" / "__init__.py")
    (line,) = [line for line in done.stderr.splitlines() if "LOG" in line]
    assert all(part in line for part in (str(clone), comfy_dancegrpo.__version__, str(other), "0.0.9", "this one")), line


def test_a_clone_that_is_also_what_pip_installed_is_one_copy(clone, tmp_path):
    """As `pip install -e` leaves it, with the folder reached through a link."""
    link = tmp_path / "linked"
    try:
        link.symlink_to(clone, target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let the user make links")
    code = f"import comfy_dancegrpo\nload_custom_node({str(clone)!r}); print(comfy_dancegrpo.__file__)"
    done = python(code, "-S", "-E", cwd=tmp_path, path=link)
    assert done.stdout.strip() == str(link / "comfy_dancegrpo" / "__init__.py") and "LOG" not in done.stderr
