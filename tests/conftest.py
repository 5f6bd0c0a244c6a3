"""What the tests of the package as a user meets it share: the quickstart, made tiny, and the command line, run in this process."""

import contextlib
import copy
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parent.parent / "workflows" / "quickstart.json"


@dataclass(frozen=True)
class Done:
    """How the program ended: its exit status, and the lines of stdout and stderr."""

    status: int
    out: list[str]
    err: list[str]

    @property
    def verdict(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line.removeprefix("dancegrpo: ") for line in self.err if line.startswith("dancegrpo: ")]


def _dancegrpo(*words) -> Done:
    from comfy_dancegrpo.trainer.cli import main

    out, err, argv, hook = io.StringIO(), io.StringIO(), sys.argv, sys.excepthook
    sys.argv = ["dancegrpo", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv, sys.excepthook = argv, hook  # typer sets a hook of its own
    assert "Traceback" not in err.getvalue()
    return Done(left.value.code or 0, out.getvalue().splitlines(), err.getvalue().splitlines())


@pytest.fixture
def one_thread():
    """One thread, where kernels round a row alike at every place in a batch of any size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cli():
    """`cli("run", path, ...)`: the program's own main, with these words."""
    return _dancegrpo


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The bundled workflow, as the editor saved it."""
    return QUICKSTART


@pytest.fixture(scope="session")
def _quickstart_prompt():
    from comfy_dancegrpo import nodes
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.read import read_workflow
    from comfy_dancegrpo.workflow.schema import object_info

    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    return to_prompt(read_workflow(QUICKSTART), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))


@pytest.fixture
def prompt(_quickstart_prompt):
    """The bundled workflow in API format, to be changed at will."""
    return copy.deepcopy(_quickstart_prompt)


@pytest.fixture
def saved(tmp_path):
    """`saved(workflow)`: the file that holds it."""

    def save(workflow, name: str = "flow.json") -> Path:
        (tmp_path / name).write_text(json.dumps(workflow), encoding="utf-8")
        return tmp_path / name

    return save


# 6 samples in micro-batches of 4, the last padded; 3 trainable steps of which 2 are trained; 2 optimizer steps
_TINY = {"Loop Start.prompts_per_iteration": 2, "Loop Start.micro_batch": 4, "Loop Start.lora_rank": 2, "Group Sample.group_size": 3,
         "Group Sample.steps": 4, "Update.train_fraction": 0.6, "Update.optimizer_steps": 2}
_TINY_EVALUATION = {"Held-out Prompts.limit": 4, "Evaluate.steps": 2, "Evaluate.batch_size": 4}


def _words(values) -> list[str]:
    return [*(word for name, value in values.items() for word in ("--set", f"{name}={value}")), "--iterations", "2"]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The words that make a run of the quickstart short."""
    return _words(_TINY | _TINY_EVALUATION)


@pytest.fixture(scope="session")
def tiny_loop() -> list[str]:
    """The same for `loop_only`."""
    return _words(_TINY)


@pytest.fixture
def loop_only(prompt):
    """The quickstart's prompt without what comes after its loop: a run of it ends with Loop End."""
    return {node_id: node for node_id, node in prompt.items() if int(node_id) <= 11}
