"""Killed at any moment and resumed, a run ends as the one that was left alone (DESIGN, rule 4): kills runs of the embedded policy, and compares.

    python benchmarks/kill_and_resume.py --runs 50
    python benchmarks/kill_and_resume.py --runs 3 --processes 2

Each run is killed by SIGKILL up to four times, half of them while a checkpoint is being written and the others at random moments, and resumed
until it is done. Its LoRA must be equal bit for bit to that of the run left alone, its metrics.jsonl the same but for the clock, without gap or
double, and no process of it may be left. Needs a system with SIGKILL, fork and /proc (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TINY = {"Loop Start.prompts_per_iteration": 2, "Loop Start.micro_batch": 4, "Loop Start.lora_rank": 2, "Loop Start.checkpoint_every": 1,
        "Group Sample.group_size": 2, "Group Sample.steps": 3, "Update.optimizer_steps": 2}
CLOCK = ("seconds", "time")


def graph() -> dict[str, dict]:
    """The quickstart up to its saved LoRA, without what evaluates it afterwards."""
    from comfy_dancegrpo import nodes
    from comfy_dancegrpo.workflow.convert import to_prompt
    from comfy_dancegrpo.workflow.graph import ancestors
    from comfy_dancegrpo.workflow.read import read_workflow
    from comfy_dancegrpo.workflow.schema import object_info

    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    prompt = to_prompt(read_workflow(ROOT / "workflows" / "quickstart.json"), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))
    ends = [node_id for node_id, node in prompt.items() if node["class_type"] == "DanceGRPOSaveLora"]
    kept = {*ends, *ancestors(prompt, ends)}
    return {node_id: prompt[node_id] for node_id in prompt if node_id in kept}


class Program:
    """One start of `dancegrpo` with these words; its lines go to `log`. forked: from this process, which has imported what takes long."""

    def __init__(self, words: list[str], log: Path, forked: bool):
        self._log, self._child = log, None
        if forked:
            import comfy_dancegrpo.trainer.commands  # noqa: F401
            import diffusers  # noqa: F401
            import transformers  # noqa: F401

            self.pid = os.fork()
            if self.pid == 0:
                self._become(words)
        else:
            with log.open("ab") as out:
                self._child = subprocess.Popen([sys.executable, "-m", "comfy_dancegrpo.trainer", *words], stdout=out, stderr=out)
            self.pid = self._child.pid
        self._status: int | None = None

    def _become(self, words: list[str]) -> None:
        out = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, status = ["dancegrpo", *words], 0
        try:
            from comfy_dancegrpo.trainer.cli import main

            main()
        except SystemExit as left:
            status = left.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)

    def ended(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self._status is None:
            if self._child is not None:
                self._status = self._child.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self) -> int:
        while self.ended() is None:
            time.sleep(0.01)
        return self._status


def processes_of(folder: Path) -> list[int]:
    """Those that name a folder in their command line, or write there, this one excepted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            named = str(folder).encode() in (entry / "cmdline").read_bytes()
            opened = any(os.readlink(fd).startswith(str(folder)) for fd in (entry / "fd").iterdir())
        except OSError:
            continue
        if (named or opened) and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


@dataclass
class Outcome:
    kills: int = 0
    while_writing: int = 0  # of them, those that left half a checkpoint
    problems: list[str] = field(default_factory=list)


def rows_of(folder: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Experiment:
    def __init__(self, folder: Path, iterations: int, processes: int, forked: bool, seed: int):
        self.folder, self.iterations, self.forked, self.chance = folder, iterations, forked, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "flow.json").write_text(json.dumps(graph()))
        self._words = ["--iterations", str(iterations), "--processes", str(processes)]
        for name, value in TINY.items():
            self._words += ["--set", f"{name}={value}"]
        start = time.monotonic()
        status = self._start("alone").wait()
        self.seconds = time.monotonic() - start
        if status:
            raise SystemExit(f"the run that is left alone ended with status {status}: {(folder / 'alone.log').read_text()[-2000:]}")
        self.lora, self.rows = self._left("alone")

    def _start(self, name: str) -> Program:
        words = ["run", str(self.folder / "flow.json"), "--output", str(self.folder / name), "--run", "run", "--resume", *self._words]
        return Program(words, self.folder / f"{name}.log", self.forked)

    def _left(self, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
        run = self.folder / name / "run"
        (path,) = (run / "lora").glob("*.safetensors")
        return load_file(path), rows_of(run)

    def _kill(self, program: Program, run: Path) -> bool:
        """Kills it at some moment; whether it had not ended before. Half of the moments are while a checkpoint is being written."""
        writing = self.chance.random() < 0.5
        done = max((int(path.stem) for path in run.glob("checkpoints/*.safetensors")), default=0)
        part = run / "checkpoints" / f"{self.chance.randint(min(done + 1, self.iterations), self.iterations):07d}.safetensors.part"
        until = time.monotonic() + (3 * self.seconds if writing else self.chance.uniform(0, self.seconds))
        later = self.chance.uniform(0, 0.004)
        while program.ended() is None and time.monotonic() < until:
            if writing and part.exists():
                time.sleep(later)
                break
            time.sleep(0.0002 if writing else 0.002)
        if program.ended() is not None:
            return False
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
        return True

    def run(self, number: int) -> Outcome:
        name, outcome = f"killed-{number}", Outcome()
        run, limit = self.folder / name / "run", self.chance.randint(1, 4)
        while True:
            program = self._start(name)
            if outcome.kills == limit:
                break
            if not self._kill(program, run):
                break
            outcome.kills += 1
            outcome.while_writing += any(run.glob("checkpoints/*.part"))
            self._gone(name, outcome)
        if status := program.wait():
            outcome.problems.append(f"status {status}")
            return outcome
        self._gone(name, outcome)
        lora, rows = self._left(name)
        if lora.keys() != self.lora.keys() or not all(torch.equal(lora[k], self.lora[k]) for k in lora):
            outcome.problems.append("another LoRA")
        if [row["iteration"] for row in rows] != list(range(1, self.iterations + 1)):
            outcome.problems.append("metrics.jsonl with a gap or a double")
        elif rows != self.rows:
            outcome.problems.append("other metrics")
        return outcome

    def _gone(self, name: str, outcome: Outcome) -> None:
        """No process may be left soon after a kill."""
        until = time.monotonic() + 10
        while left := processes_of(self.folder / name):
            if time.monotonic() > until:
                outcome.problems.append(f"{len(left)} processes left")
                return
            time.sleep(0.1)


def main(arguments: list[str] | None = None) -> int:
    """Returns how many runs did not end as the one that was left alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="kept; without it a temporary one")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        experiment = Experiment(asked.folder or Path(temporary), asked.iterations, asked.processes, asked.processes == 1, asked.seed)
        kills = writing = good = 0
        for number in range(asked.runs):
            outcome = experiment.run(number)
            kills, writing, good = kills + outcome.kills, writing + outcome.while_writing, good + (not outcome.problems)
            print(f"run {number + 1}: killed {outcome.kills} times, {outcome.while_writing} of them while a checkpoint was written: "
                  f"{', '.join(outcome.problems) or 'equal'}", flush=True)
        print(f"{good} of {asked.runs} equal to the run left alone; {kills} kills, {writing} of them while a checkpoint was written", flush=True)
    return asked.runs - good


if __name__ == "__main__":
    sys.exit(min(main(), 1))
