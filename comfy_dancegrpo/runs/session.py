"""The session that a loop trains in: the prompts of each iteration, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import processes, pulse
from ..errors import OutOfMemory, RunError
from ..grpo import micro_batch
from ..grpo.learner import Learner, OptimizerSettings
from ..grpo.schedules import FALLING, problem
from ..grpo.update import UpdateStats
from ..lora import files
from ..lora.adapter import LoraSettings, LoraSnapshot, applied, bare
from ..lora.full import FullSettings, FullSnapshot
from ..policies.base import Policy
from ..prompts import PromptList
from ..workflow.host import host
from . import checkpoints, environment, history, live, metrics, picture_statistics, report
from .advice import Advice, see
from .folder import RunFolder, claim
from .live_policy import LivePolicy
from .trackers import Trackers
from .watch import Rule, WatchLog


@dataclass(frozen=True)
class LoopSettings:
    """What Loop Start asks. checkpoint_every: iterations; 0 writes one at the end alone; checkpoints_kept: 0 keeps all.
    on_out_of_memory: one of `folder.ON_OUT_OF_MEMORY`. micro_batch: samples in every
    denoiser call of the run (DESIGN: one batch shape), 0 until found by trial. lora: what is trained. start_from: a LoRA, or weights, that it begins with.
    curriculum: whether prompts whose groups have no spread are drawn less."""

    run_name: str = "run"
    iterations: int = 60
    prompts_per_iteration: int = 4
    seed: int = 0
    micro_batch: int = 16
    checkpoint_every: int = 20
    on_existing: str = "new"
    lora: LoraSettings | FullSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    start_from: LoraSnapshot | FullSnapshot | None = field(default=None, repr=False)
    gradient_checkpointing: bool = False
    checkpoints_kept: int = checkpoints.KEPT
    on_out_of_memory: str = "stop"
    curriculum: bool = False


@dataclass(frozen=True)
class RunRecord:
    """A run as Loop End gives it: its folder and its metrics, a row an iteration; watched: a row an evaluation of Watch."""

    folder: Path
    rows: tuple[dict, ...] = field(repr=False)
    watched: tuple[dict, ...] = field(default=(), repr=False)


class Session:
    """One run, outside inference mode. Use as a context: on leaving, the base is as it was, and what was trained is kept on disk."""

    def __init__(self, policy: Policy, prompts: PromptList, settings: LoopSettings, fingerprint: str, node_id: str = "",
                 rule: Rule | None = None):
        if not prompts.prompts:
            raise RunError("there are no prompts to train on")
        if line := micro_batch.problem(settings.micro_batch) or problem(settings.optimizer.rules):
            raise RunError(line)
        if settings.start_from is not None:
            settings = replace(settings, lora=settings.lora.starting_from(settings.start_from))
        self.policy, self.prompts, self.settings, self._node_id, self._rule = policy, prompts, settings, node_id, rule
        self._fingerprint, self._done, self._saved, self._start = fingerprint, 0, -1, 0.0
        self._seconds: deque[float] = deque(maxlen=20)  # of the last iterations
        self._writer, self._held_up = checkpoints.Writer(), 0.0  # seconds that checkpoints have held up the training since the last row
        self.first_reward: float | None = None
        self._advice = Advice(settings.prompts_per_iteration)
        self._restarts = False  # after an error: with half the micro-batch

    def __enter__(self) -> Session:
        settings = self.settings
        if len(set(processes.all_of(self._fingerprint))) > 1:
            raise RunError("the processes do not have the same prompts, LoRA to start from or settings; accepted: the same files on every machine")
        self.folder, self.action, size = processes.on_first(self._claim)
        self.settings = settings = replace(settings, micro_batch=size)
        with contextlib.ExitStack() as undo:
            undo.callback(self._let_go)
            processes.on_first(self._keep_source)
            host().load(self.policy)
            self.trained = settings.lora.attach(self.policy, settings.seed)
            undo.callback(self.trained.remove)
            if settings.start_from is not None:
                self.trained.start_from(settings.start_from)
            undo.callback(self.policy.checkpoint_gradients, False)
            self.policy.checkpoint_gradients(settings.gradient_checkpointing)
            learner = Learner(self.policy, self.trained.parameters, settings.optimizer, self.folder.name, self.trained.written)
            learner.reference = self._before_training(learner)
            if self.action == "start":
                processes.on_first(lambda: self.folder.create(self._fingerprint, settings.micro_batch))
            self.watch = WatchLog(self.folder, self._rule)
            self.watch.settle = self._settle
            if self.action != "start":
                self._load(learner)
            before = settings.iterations
            if self.action != "reopen":
                processes.on_first(lambda: environment.note(self.folder, self._done))
            before = processes.on_first(self._note_length)
            self.live = LivePolicy(self.policy, learner, settings, self.prompts.prompts, self.watch, self._take, before)
            self._trackers = None if self.action == "reopen" else Trackers(self.folder, self._done, len(self.watch.rows))
            processes.on_first(lambda: live.forget_stop(self.folder))
            if processes.is_first() and host().storage is not None:
                host().storage.follow(self.folder.path, settings.checkpoints_kept)
            host().run_started(self.folder.path, self._node_id)
            host().run_moved(self.folder.path, self._done, settings.iterations)
            if line := self.policy.unseen(self.prompts.prompts):
                host().say(line)
            undo.pop_all()
        return self

    def _before_training(self, learner: Learner) -> Callable[[], contextlib.AbstractContextManager]:
        """The learner's reference: the base, or what the training starts from."""
        start = self.settings.start_from
        if start is None:
            return functools.partial(bare, self.policy)
        if self.policy.full is not None:
            return functools.partial(applied, self.policy, start)
        return functools.partial(learner.holding, {name: p.detach().clone() for name, p in learner.parameters.items()})

    def _claim(self) -> tuple[RunFolder, str, int]:
        s = self.settings
        folder, action, self._lock = claim(s.run_name, self._fingerprint, s.iterations, s.micro_batch, s.on_existing)
        self._is_new = not folder.record
        size = s.micro_batch or (0 if action == "start" else folder.record.get("micro_batch", 0))  # of a trial, once it was made
        fits = folder.fitting(size) if action == "resume" and s.on_out_of_memory == "halve" else size
        if fits < size:
            host().say(f"run {folder.name!r} ran out of memory with a larger micro-batch: it goes on with {fits} instead of {size}")
        return folder, action, fits

    def _take(self, found: micro_batch.Found) -> None:
        """The run's micro-batch from now on, however often it is resumed."""
        self.settings = self.live.settings = replace(self.settings, micro_batch=found.size)
        processes.on_first(lambda: self.folder.write_record(micro_batch=found.size))
        host().say(str(found))

    def _keep_source(self) -> None:
        """Raises `RunError` where starting over would delete the LoRA that the run starts from."""
        source = self.settings.start_from.source if self.settings.start_from is not None else None
        if self.action == "start" and source is not None and self.folder.path.resolve() in source.resolve().parents:
            raise RunError(f"run {self.folder.name!r} starts from {source}, which restarting it would delete; "
                           'choose another "run_name", or move the LoRA to the loras folder')

    def _load(self, learner: Learner) -> None:
        """All processes take up the run where the first one's disk says that it is."""
        read = processes.on_first(self._read, told=False)
        done, self.watch.rows, self.first_reward = processes.broadcast(read and (read[0] and read[0][0], *read[1:]))
        if done is not None:
            self._done = done
            learner.load_state(read[0][1] if read else {})
            self._saved = self.watch.saved = self._done
        if self.action == "reopen" and not self.finished and not self.watch.verdict:
            self.action = "resume"  # its last checkpoint is damaged

    def _read(self) -> tuple[tuple[int, dict] | None, list[dict], float | None]:
        """The newest checkpoint (iterations, tensors), the watch's rows and the first reward; what the disk has of later iterations is cut off."""
        found = checkpoints.newest(self.folder.checkpoints, self._fingerprint)
        done = found.iterations if found is not None else 0
        if found is None and self.action == "reopen":
            raise RunError(f"run {self.folder.name!r} in {self.folder.path} is finished, and its checkpoints are missing or damaged; "
                           'set "on_existing" to restart, or choose another "run_name"')
        self.watch.cut_after(done)
        if found is None:
            self.folder.write_running()
            host().say(f"run {self.folder.name!r} in {self.folder.path} has no checkpoint yet; it starts from the beginning")
        else:
            for what, before, now in (("micro-batch size", found.micro_batch, self.settings.micro_batch),
                                      ("number of processes", found.processes or processes.count(), processes.count())):
                if before != now:
                    host().say(f"the {what} changes from {before} to {now}: from here on the run is not bit for bit what it would have been")
            if done >= self.settings.iterations:
                self.folder.write_record(state="finished", iterations=done)  # it may have been killed before it wrote so
                host().say(f"run {self.folder.name!r} in {self.folder.path} is finished and unchanged; nothing is trained "
                           '("on_existing" restart trains it again)')
            elif not self.watch.verdict:  # also a finished run whose last checkpoint is damaged
                self.folder.write_running()
                host().say(f"run {self.folder.name!r} in {self.folder.path} goes on after iteration {done}")
        metrics.cut_after(self.folder.metrics, done)
        rows = metrics.read(self.folder.metrics)
        self._advice.follow(rows)
        if [row["iteration"] for row in rows] != list(range(1, done + 1)):
            host().say(f"{self.folder.metrics} lacks rows: it has {len(rows)} of {done} iterations")
        return found and found[:2], self.watch.rows, rows[0]["reward_mean"] if rows else None

    def _note_length(self) -> int:
        """How many iterations the run was to have before it became longer or shorter; says where its learning rate falls otherwise for that."""
        schedule, length = self.settings.optimizer.schedule, self.settings.iterations
        before = self.folder.record.get("schedule_length", length)
        if schedule in FALLING and before != length:
            host().say(f"the learning rate falls ({schedule!r}) over {length} iterations instead of {before}: from here on the run is not "
                       "what it would have been with either number from its beginning")
        self.folder.write_record(schedule_length=length)
        return before

    @property
    def finished(self) -> bool:
        return self._done >= self.settings.iterations

    @property
    def ended(self) -> bool:
        """Finished, or to end early by the rule or because the user asked: what comes after the loop goes on with what was trained."""
        return self.finished or (self._done > 0 and processes.on_first(lambda: bool(self.watch.verdict or live.stop_requested(self.folder))))

    def begin(self) -> tuple[LivePolicy, PromptList, int]:
        """Loop Start's outputs for the next iteration."""
        host().check_interrupt()
        self._start = time.perf_counter()
        self.live.iteration = self._done
        picked = self.live.order.of(self._done)
        return self.live, PromptList(picked, f"{self.prompts.name}, iteration {self._done + 1}"), self._done + 1

    def end(self, stats: UpdateStats) -> None:
        """Writes the iteration's metrics, and a checkpoint when one is due. Raises `RunError` when the policy was not updated."""
        if self.live.learner.version[1] != self._done + 1:
            raise RunError(f"the loop's body updated the policy {self.live.learner.version[1] - self._done} times in one iteration; "
                           "accepted: once")
        self.live.order.end(stats.advantages.flat.tolist())
        row = processes.on_first(lambda: self._measure(stats))
        # both at once, after all that a full disk or a signal may break off: a checkpoint must hold the state that its number says
        self.live.state, self._done = self.live.learner.state(), self._done + 1
        if self.first_reward is None:
            self.first_reward = row["reward_mean"]
        if self._due and (strayed := self.live.learner.strayed()):
            host().say(f"WARNING: iteration {self._done}: the weights in training are not the same in all processes: those of "
                       f"{', '.join(map(str, strayed))} differ from those of 0, which are kept; a run that is resumed has those in all")
        processes.on_first(lambda: self._keep_iteration(row, stats), told=False)
        host().run_moved(self.folder.path, self._done, self.settings.iterations)

    @property
    def _due(self) -> bool:
        """Whether a checkpoint is, of the iteration that has just ended."""
        every = self.settings.checkpoint_every
        return self.finished or bool(every) and self._done % every == 0

    def _measure(self, stats: UpdateStats) -> dict:
        """The iteration's row, written to the metrics."""
        held_up, self._held_up = self._held_up, 0.0
        row = metrics.row(self._done + 1, stats, time.perf_counter() - self._start, held_up)
        rollout = stats.advantages.scores.rollout
        row["pictures"] = picture_statistics.of(rollout.every_picture, rollout.groups, self.policy.patch(rollout.plan.size.frames))
        metrics.append(self.folder.metrics, row)
        return row

    def _keep_iteration(self, row: dict, stats: UpdateStats) -> None:
        """A checkpoint when one is due, and what people are shown."""
        pictures = history.keep(self.folder, self._done, stats)
        self._trackers.log(row, self.watch.rows, pictures, str(stats.advantages.scores.rollout.prompts[0]))  # before the checkpoint that makes it final
        self._writer.check()
        if self._due:
            self._save("finished" if self.finished else "running")
        if stats.ratio_deviation > self.ratio_limit(stats):
            host().say(f"WARNING: iteration {self._done}: ratio deviation {stats.ratio_deviation:.1e}, accepted: "
                       f"{self.ratio_limit(stats):g}; the replay differs from the rollout, so the gradient is of something else; "
                       f"{see('the-ratio-is-not-one')}")
        if stats.skipped_steps:
            host().say(f"WARNING: iteration {self._done}: optimizer steps skipped, whose loss or gradient is NaN or infinite: {stats.skipped_steps} "
                       f"({self.live.learner.skipped} in a row by now); {see('steps-that-are-no-number')}")
        for line in self._advice.of(row):
            host().say(f"WARNING: {line}")
        self._seconds.append(row["seconds"]["total"])
        left = sum(self._seconds) / len(self._seconds) * (self.settings.iterations - self._done)
        live.write(self.folder, self._done, self.settings.iterations, left, stats)
        host().progress(self._done, self.settings.iterations, self._line(row))
        if self.finished and not self.watch.verdict and (line := self.watch.better()):
            host().say(line)

    def _line(self, row: dict) -> str:
        line = (f"reward {row['reward_mean']:.4f} ({row['reward_mean'] - self.first_reward:+.4f}), "
                f"spread in groups {row['group_std']:.4f}, {row['seconds']['total']:.2f} s")
        if row["flat_groups"]:
            line += f"; {row['flat_groups']} groups without spread"
        return line

    def ratio_limit(self, stats: UpdateStats) -> float:
        """0 in float32; in half precision, where replay may round differently, the clip range."""
        return 0.0 if self.policy.dtype == torch.float32 else stats.clip_range

    def _save(self, state: str) -> None:
        """A checkpoint of the last whole iteration, and the record: behind the training where it goes on, else both are there on return."""
        self._settle()
        done, verdict, start = self._done, self.watch.verdict, time.perf_counter()
        content = checkpoints.Checkpoint(done, self.live.state, self.settings.micro_batch, self._fingerprint, processes.count())

        def write() -> None:
            told = {}
            if self._saved != done:
                path = checkpoints.save(self.folder.checkpoints, content, self.settings.checkpoints_kept)
                self._saved, told = done, {"checkpoint": {"bytes": path.stat().st_size, "seconds": round(time.perf_counter() - start, 4)}}
            self.folder.write_record(state=state, iterations=done, fingerprint=self._fingerprint, stopped_by=verdict, **told)
            if host().storage is not None:
                host().storage.changed(self.folder.path)

        self._writer.start(write)
        if state != "running":
            self._settle()

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, if any; raises what it failed by."""
        start = time.perf_counter()
        try:
            self._writer.wait()
        finally:
            self._held_up += time.perf_counter() - start
        self.watch.saved = max(self._saved, 0)

    def snapshot(self, alone: bool = False) -> LoraSnapshot | FullSnapshot:
        """What was trained, after the last whole iteration, or after the best one where a watch reward has fallen: its moving average where that is on.

        Called by all processes, or `alone` by the first.
        """
        state, iteration, learner = self.live.state, self._done, self.live.learner
        if self.watch.verdict:
            best = self.watch.best_state() if alone else processes.on_first(self.watch.best_state, told=not processes.sharded())
            at = best and best[0] if alone else processes.broadcast(best and best[0])
            if at is not None:
                iteration, state = at, best[1] if best else {}
            host().say(f"Watch: {self.watch.verdict}; {self.watch.given(at)}")
        return self.trained.snapshot(learner.result(state), iteration, learner.ema is not None, self.folder.path, self.prompts.prompts)

    def record(self) -> RunRecord:
        return RunRecord(self.folder.path, tuple(metrics.read(self.folder.metrics)), tuple(self.watch.rows))

    def __exit__(self, kind, error, trace) -> bool:
        """True, for an error that is no more, where the run is to go on as `again` says."""
        self._restarts = isinstance(error, OutOfMemory) and self.settings.on_out_of_memory == "halve" and self.settings.micro_batch > 1
        if self._restarts:
            self.folder.note_out_of_memory(self.settings.micro_batch)
            error.exit_status = processes.AGAIN
            host().say(f"WARNING: {error}; the run is started again after iteration {self._done}, with half the micro-batch")
        with contextlib.ExitStack() as steps:  # from the last to the first, each whatever became of the others
            steps.callback(lambda: host().run_ended(self.folder.path, "finished" if self.finished else "stopped"))
            steps.callback(self._let_go)
            # no word to the others, who may be gone: each that fails ends by itself, and the first has all that is to be kept
            if processes.is_first():
                steps.callback(self._tell_the_end, asked_twice=kind is not None and issubclass(kind, KeyboardInterrupt))
                steps.callback(live.forget_stop, self.folder)
                if kind is not None or not self.finished:
                    steps.callback(self._keep, broken_off=kind is not None)
            steps.callback(self.trained.remove)
            steps.callback(self.policy.checkpoint_gradients, False)
            steps.callback(self.live.scoring.close)
        return self._restarts and processes.count() == 1  # of several, the others wait for what this one will not do

    def _tell_the_end(self, asked_twice: bool) -> None:
        """The trackers' last words and the report; whoever asked twice to stop is not to wait for them."""
        if self.action != "reopen" and not asked_twice:
            self._trackers.close()
            if self._done:
                report.leave(self.folder.path)

    def again(self) -> LoopSettings:
        """Of the session that goes on where this one ran out of memory; what this one holds is given back first."""
        del self.live, self.trained
        processes.empty_cache()
        return replace(self.settings, run_name=self.folder.name, on_existing="resume")

    def _let_go(self) -> None:
        """Leaves the folder to others; one that this session made, and did nothing in, goes."""
        if not processes.is_first():
            return
        nothing = self._is_new and self._done == 0 and self.folder.fitting(self.settings.micro_batch) == self.settings.micro_batch
        if nothing:
            self.folder.discard()
        self._lock.release()
        if nothing and os.name == "nt":  # nothing that is open can be deleted there
            self.folder.remove_lock()

    @pulse.keeping()
    def _keep(self, broken_off: bool) -> None:
        """What an unfinished run leaves: a checkpoint, and where nothing of the graph will save it, the LoRA too."""
        if self._done == 0:
            self.folder.write_record(state="stopped")
            return
        with contextlib.suppress(OSError):  # of one that was being written: another is now, and raises what is still wrong
            self._settle()
        self._save("finished" if self.finished else "stopped")  # a full disk raises here too: the former checkpoint is still whole
        if self._restarts:
            return
        kept = f"checkpoint in {self.folder.checkpoints}"
        if broken_off:
            path = self.folder.lora / f"{self.folder.name}.safetensors"
            found = self.snapshot(alone=True)
            kept += f", {found.kind} so far in {' and '.join(map(str, files.save(found, path)))}"
        how = ' and a larger "max_drop" go' if self.watch.verdict else " goes"
        host().say(f'stopped after iteration {self._done}: {kept}; Loop Start\'s "on_existing" resume{how} on from there')
