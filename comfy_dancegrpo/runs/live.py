"""What a page shows of a run, in mid-run and long after: all of it is read from the run's folder, by any process.

`live/state.json` holds how far the run is and the first group of its last iteration; that group's pictures lie beside it.
A file `live/stop` asks the session to end after the iteration that it is in. Reading imports no torch.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replacing
from ..errors import RunError
from ..workflow.host import host
from . import lock, metrics
from .folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from ..grpo.update import UpdateStats

SIZE = 256  # pixels of a picture's longer side, at most
SAMPLES = 32  # of a group, at most
KINDS = {"jpg": "image/jpeg", "webp": "image/webp"}  # of its files: pictures, and videos that move
FPS = 16  # of those: Wan's own
POINTS = 1000  # of a curve, at most
COLUMNS = ("iteration", "reward_mean", "reward_std", "group_std", "clip_fraction", "approx_kl", "grad_norm", "ratio_deviation")
_follower, _watch = metrics.Follower(COLUMNS), metrics.Follower(("iteration", "rewards"))


def write(folder: RunFolder, iteration: int, iterations: int, seconds_left: float, stats: UpdateStats) -> None:
    """Replaces the live state by that of an iteration (from 1) that has just ended. Where the disk will not take it, that is said, and no more."""
    try:
        _write(folder, iteration, iterations, seconds_left, stats)
    except OSError as error:
        host().say(f"iteration {iteration}: what pages show of the run could not be written ({error}); training goes on")


def _write(folder: RunFolder, iteration: int, iterations: int, seconds_left: float, stats: UpdateStats) -> None:
    from .pictures import save_animation, to_image

    scores = stats.advantages.scores
    rollout, total = scores.rollout, scores.total
    first = [i for i, group in enumerate(rollout.groups.tolist()) if group == 0]
    ranked = sorted(first, key=lambda i: -stats.advantages.values[i].item())[:SAMPLES]
    folder.live.mkdir(parents=True, exist_ok=True)
    samples, former = [], [path for kind in KINDS for path in folder.live.glob(f"*.{kind}")]
    videos = rollout.plan.size.frames > 1
    for place, i in enumerate(ranked):
        name = f"{iteration}-{place}.{'webp' if videos else 'jpg'}"
        with replacing(folder.live / name) as beside:
            if videos:
                save_animation(rollout.every_picture[i], beside, FPS, SIZE)
            else:
                image = to_image(rollout.every_picture[i])
                image.thumbnail((SIZE, SIZE))
                image.save(beside, "JPEG", quality=90)
        samples.append({"file": name, "score": total[i].item(), "advantage": stats.advantages.values[i].item()})
    state = {"iteration": iteration, "iterations": iterations, "seconds_left": seconds_left, "prompt": rollout.prompts[first[0]],
             "reward": " + ".join(column.name for column in scores.columns), "samples": samples}
    write_atomically(folder.live / "state.json", json.dumps(state) + "\n")
    for path in former:  # last, so that what state.json names is always there
        if path.name not in {s["file"] for s in samples}:
            with contextlib.suppress(OSError):  # Windows deletes no file that a page's server has open; the next iteration tries again
                path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A run by its folder: how far it is, its curves (at most `POINTS` of each), its last group and its evaluations; {} for no run.

    watched: what Watch found, {"iteration": [...], "rewards": {name: [...]}}; stopped_by: why it stopped the run. kept: iterations that a checkpoint covers. state: run.json's, or "stopping", or "interrupted" where its process is gone.
    """
    folder = RunFolder(path)
    try:
        record = folder.record
    except RunError:
        return {}
    if not record:
        return {}
    state, columns = _json(folder.live / "state.json"), _follower.columns(folder.metrics, POINTS)
    group = {key: state[key] for key in ("prompt", "reward", "samples")} if state else None
    now = _state(path, record)
    return {
        "name": folder.name, "state": "stopping" if now == "running" and stop_requested(folder) else now,
        "iteration": columns["iteration"][-1] if columns["iteration"] else 0,
        "kept": record.get("iterations", 0), "iterations": state.get("iterations", record.get("iterations", 0)),
        "seconds_left": state.get("seconds_left") if now == "running" else None,
        "columns": columns, "watched": _watched(folder), "stopped_by": record.get("stopped_by", "") if now == "stopped" else "",
        "group": group, "evaluations": _json(path / "summary.json").get("evaluations", {}),
    }


def _watched(folder: RunFolder) -> dict[str, Any]:
    found = _watch.columns(folder.watch, POINTS)
    names = found["rewards"][0] if found["rewards"] else ()
    return {"iteration": found["iteration"], "rewards": {name: [row.get(name) for row in found["rewards"]] for name in names}}


def list_runs(output: Path) -> list[dict[str, Any]]:
    """The runs in an output folder, the one that moved last first: name, state, and how many iterations it has done."""
    found = []
    for path in output.iterdir() if output.is_dir() else ():
        record = _json(path / "run.json")
        if record:
            found.append((_moved(path), {"name": path.name, "state": _state(path, record), "iteration": record.get("iterations", 0)}))
    return [run for _, run in sorted(found, key=lambda pair: (-pair[0], pair[1]["name"]))]


def request_stop(path: Path) -> None:
    """Asks the session that trains in this folder to end after the iteration that it is in."""
    folder = RunFolder(path)
    folder.live.mkdir(parents=True, exist_ok=True)
    (folder.live / "stop").touch()


def stop_requested(folder: RunFolder) -> bool:
    return (folder.live / "stop").exists()


def forget_stop(folder: RunFolder) -> None:
    (folder.live / "stop").unlink(missing_ok=True)


def _state(path: Path, record: dict[str, Any]) -> str | None:
    """run.json's state; "interrupted" where that says "running" and no process holds the folder."""
    if record.get("state") == "running" and not lock.held(path):
        state = _json(path / "run.json").get("state")  # it may have ended just now: the lock is let go of after the state is written
        return "interrupted" if state == "running" else state
    return record.get("state")


def _moved(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path / "run.json", path / "metrics.jsonl") if file.exists())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
