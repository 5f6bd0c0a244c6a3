"""Runs that are kept in a storage: what a machine that has nothing takes up again, storages that fail, and copies that were broken off."""

import json
import shutil
import uuid

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.runs import checkpoints, manifests, storage
from comfy_dancegrpo.runs.folder import RunFolder, choose
from comfy_dancegrpo.workflow.host import Host, use

ITERATIONS = 4
CLOCK = ("seconds", "time")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def address():
    """An empty storage."""
    found = f"memory://{uuid.uuid4().hex}/runs"
    yield found
    MemoryFileSystem.store.clear()


def there(address):
    """What a storage has: bytes by name."""
    fs = MemoryFileSystem()
    root = address.removeprefix("memory:/")
    return {path.removeprefix(root + "/"): fs.cat_file(path) for path in fs.find(root)} if fs.exists(root) else {}


# -- with training ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def flow(loop_only, saved, tiny_loop):
    """The words of a short run."""
    return ["run", saved(loop_only), *tiny_loop, "--iterations", ITERATIONS, "--set", "Loop Start.checkpoint_every=1"]


@pytest.fixture(scope="module")
def undisturbed(_quickstart_prompt, cli, tiny_loop, tmp_path_factory):
    """The LoRA and the rows of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompt = {node_id: node for node_id, node in _quickstart_prompt.items() if int(node_id) <= 11}
    (folder / "flow.json").write_text(json.dumps(prompt))
    assert cli("run", folder / "flow.json", *tiny_loop, "--iterations", ITERATIONS, "--output", folder).status == 0
    return found(folder)


def found(output, name="quickstart"):
    (path,) = (output / name / "checkpoints").glob(f"{ITERATIONS:07d}.safetensors")
    rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in (output / name / "metrics.jsonl").read_text().splitlines()]
    return load_file(path), rows


def equal(one, other):
    return one[1] == other[1] and one[0].keys() == other[0].keys() and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def broken(monkeypatch, fails):
    """A storage to which writing fails, after half of a block, where `fails(path, how many files were begun)`."""
    open_, begun = MemoryFileSystem._open, []

    def _open(self, path, mode="rb", **more):
        file = open_(self, path, mode, **more)
        if mode == "wb":
            begun.append(path)
            if fails(path, len(begun)):
                write = file.write

                def half(data):
                    write(data[: len(data) // 2])
                    raise OSError("connection reset")

                file.write = half
        return file

    monkeypatch.setattr(MemoryFileSystem, "_open", _open)
    return begun


def test_resumed_from_an_emptied_spool_it_is_the_run_left_alone(cli, flow, tmp_path, address, undisturbed):
    done = cli(*flow, "--iterations", 2, "--output", address, "--spool", tmp_path / "a")
    assert done.status == 0 and done.err[-1] == f"run 'quickstart' is in {address}/quickstart"
    names = there(address).keys()
    assert {name for name in names if "checkpoints" in name} == {f"quickstart/checkpoints/000000{k}.safetensors" for k in (1, 2)}
    assert {"quickstart/metrics.jsonl", "quickstart/run.json", "quickstart/report.html", "quickstart/prompt.json"} <= names
    assert not [name for name in names if "/live/" in name or name.endswith(".part")] and 1 <= len([name for name in names if "manifest" in name]) <= 2
    shutil.rmtree(tmp_path / "a")
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "b")
    assert done.status == 0 and any(line.endswith("goes on after iteration 2") for line in done.err), done.err
    assert equal(found(tmp_path / "b"), undisturbed)
    assert sorted(name for name in there(address) if "checkpoints" in name) == [f"quickstart/checkpoints/000000{k}.safetensors" for k in (3, 4)]
    shutil.rmtree(tmp_path / "b")
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "c")  # finished: nothing is trained, and nothing is missing
    assert done.status == 0 and any("nothing is trained" in line for line in done.err) and equal(found(tmp_path / "c"), undisturbed)
    done = cli(*flow, "--iterations", 1, "--set", "Loop Start.seed=1", "--output", address, "--spool", tmp_path / "d")  # its name is taken, though not here
    assert done.status == 0 and (tmp_path / "d/quickstart-2/metrics.jsonl").is_file() and "quickstart-2/run.json" in there(address)


def test_a_storage_that_fails_for_a_while(cli, flow, tmp_path, address, undisturbed, monkeypatch):
    """For one copy with all its tries, and the first try of the next."""
    begun = broken(monkeypatch, lambda path, count: 5 < count <= 10)
    done = cli(*flow, "--output", address, "--spool", tmp_path / "a")
    assert done.status == 0 and len(begun) > 10, done.err
    assert len([line for line in done.err if line.startswith("WARNING") and "cannot be copied" in line]) == 1
    assert len([line for line in done.err if line == f"{address} takes files again: all of run 'quickstart' is there"]) == 1
    assert equal(found(tmp_path / "a"), undisturbed)
    shutil.rmtree(tmp_path / "a")
    assert cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "b").status == 0 and equal(found(tmp_path / "b"), undisturbed)


def test_a_storage_that_fails_to_the_end(cli, flow, tmp_path, address, undisturbed, monkeypatch):
    """The run is whole in its spool, which is told twice and by the exit status; the same command copies it when the storage is back."""
    begun = broken(monkeypatch, lambda path, count: count > 12)
    done = cli(*flow, "--output", address, "--spool", tmp_path / "a")
    (line,), (warning,) = done.verdict, [line for line in done.err if line.startswith("WARNING")]
    print(f"\n{warning}\n{line}")
    assert done.status == 3 and len(begun) > 12 and equal(found(tmp_path / "a"), undisturbed)
    assert "cannot be copied to" in warning and "connection reset" in warning and f"it goes on in {tmp_path / 'a/quickstart'}" in warning
    assert f"is not whole in {address} (connection reset): all of it is in {tmp_path / 'a/quickstart'}" in line
    monkeypatch.undo()
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "a")
    assert done.status == 0 and any("nothing is trained" in said for said in done.err)
    shutil.rmtree(tmp_path / "a")
    assert cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "b").status == 0 and equal(found(tmp_path / "b"), undisturbed)


@pytest.mark.parametrize("half", ["the checkpoint", "the manifest"])
def test_a_checkpoint_that_came_half(cli, flow, tmp_path, address, undisturbed, monkeypatch, half):
    """The machine is gone in the middle of a copy: what goes on is the checkpoint before."""
    assert cli(*flow, "--iterations", 2, "--output", address, "--spool", tmp_path / "a").status == 0
    newest = max(name for name in there(address) if "manifest" in name)
    number = int(manifests.NAME.fullmatch(newest.rpartition("/")[2])[1])
    broken(monkeypatch, lambda path, count: ("0000003" in path if half == "the checkpoint" else f"manifest-{number + 1:07d}" in path))
    assert cli(*flow, "--iterations", 3, "--resume", "--output", address, "--spool", tmp_path / "a").status == 3
    monkeypatch.undo()
    broken_off = there(address)["quickstart/checkpoints/0000003.safetensors" if half == "the checkpoint" else f"quickstart/{manifests.name_of(number + 1)}"]
    assert broken_off  # half of it is there
    shutil.rmtree(tmp_path / "a")
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "b")
    assert done.status == 0 and any(line.endswith("goes on after iteration 2") for line in done.err), done.err
    assert (half == "the manifest") == any("is damaged" in line and "manifest-" in line for line in done.err)
    assert equal(found(tmp_path / "b"), undisturbed)


def test_a_finished_run_whose_last_checkpoint_is_damaged_there(cli, flow, tmp_path, address, undisturbed):
    """The last iteration is trained again."""
    assert cli(*flow, "--output", address, "--spool", tmp_path / "a").status == 0
    path = f"{address.removeprefix('memory:/')}/quickstart/checkpoints/{ITERATIONS:07d}.safetensors"
    MemoryFileSystem().pipe_file(path, MemoryFileSystem().cat_file(path)[:-1])
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "b")
    assert done.status == 0 and any(line.endswith(f"goes on after iteration {ITERATIONS - 1}") for line in done.err), done.err
    assert equal(found(tmp_path / "b"), undisturbed)


def test_a_storage_that_does_not_answer_is_known_before_anything_is_trained(cli, flow, tmp_path, address, monkeypatch):
    def ls(self, path, **more):
        raise OSError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    done = cli(*flow, "--resume", "--output", address, "--spool", tmp_path / "a")
    (line,) = done.verdict
    assert done.status == 3 and f"{address} does not answer: no route to host; accepted: " in line
    assert not (tmp_path / "a/quickstart").exists()


@pytest.mark.parametrize("words, said", [
    (["--output", "nosuch://bucket/runs"], "--output: nosuch://bucket/runs cannot be opened: "),
    (["--output", "ftp://me:secret@host/runs"], "--output: found a password in the address"),
    (["--output", "runs", "--spool", "x"], "--spool: found x beside --output runs"),
])
def test_what_cannot_be_a_storage(cli, flow, words, said):
    done = cli(*flow, *words)
    (line,) = done.verdict
    assert done.status == 2 and line.startswith(said) and "accepted: " in line and "secret" not in line


# -- without training -------------------------------------------------------------------------------------------------------------
class Machine(Host):
    """One with a spool of its own."""

    def __init__(self, address, spool):
        super().__init__(output=spool)
        self.said, self.storage = [], storage.Storage(address, spool)

    def say(self, line):
        self.said.append(line)


def train(machine, iterations, on_existing="resume", fingerprint="same", kept=2):
    """What a session does of it: the checkpoints of iterations up to this one, and the record. What `choose` said."""
    with use(machine):
        folder, action = choose("run", fingerprint, iterations, 16, on_existing)
        if action == "start":
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.create(fingerprint, 16)
        machine.storage.follow(folder.path, kept)
        done = max((found.iterations for found in [checkpoints.newest(folder.checkpoints)] if found), default=0)
        for k in range(done + 1, iterations + 1):
            checkpoints.save(folder.checkpoints, checkpoints.Checkpoint(k, {"w": torch.full((3,), float(k))}, 16, fingerprint, 1), kept)
            folder.write_record(state="stopped", iterations=k)
            machine.storage.changed(folder.path)
        return action, done, machine.storage.close()


def test_two_machines_take_turns(address, tmp_path):
    a, b = (Machine(address, tmp_path / name) for name in "ab")
    assert train(a, 2) == ("start", 0, "")
    assert train(b, 5) == ("resume", 2, "")
    a = Machine(address, tmp_path / "a")  # it has an older one, and all of that was in the storage
    assert train(a, 6) == ("resume", 5, "") and any("is fetched" in line for line in a.said)
    assert train(Machine(address, tmp_path / "a"), 7) == ("resume", 6, "")  # its own


def test_two_machines_that_went_different_ways(address, tmp_path, monkeypatch):
    a, b = Machine(address, tmp_path / "a"), Machine(address, tmp_path / "b")
    assert train(a, 2) == ("start", 0, "")
    assert train(b, 3) == ("resume", 2, "")
    before = there(address)
    line = train_on(a, 4)  # it has not heard of b: nothing of b's is touched
    assert "another process has written it since" in line and "all of it is in" in line and there(address) == before
    with pytest.raises(RunError, match="has gone on in .* \\(4 iterations\\) and from another spool in .* \\(3\\)"):
        train(Machine(address, tmp_path / "a"), 5)
    assert RunFolder(tmp_path / "a/run").record["iterations"] == 4 and there(address) == before


def train_on(machine, iterations):
    """The same session goes on."""
    with use(machine):
        folder = RunFolder(machine.storage.spool / "run")
        checkpoints.save(folder.checkpoints, checkpoints.Checkpoint(iterations, {"w": torch.ones(3)}, 16, "same", 1))
        folder.write_record(iterations=iterations)
        machine.storage.changed(folder.path)
        return machine.storage.close()


def test_a_run_that_starts_over_leaves_nothing_of_the_former(address, tmp_path, monkeypatch):
    """Not even where its first copy is broken off: then there is no run."""
    assert train(Machine(address, tmp_path / "a"), 5) == ("start", 0, "")
    broken(monkeypatch, lambda path, count: path.endswith("run.json"))
    action, done, line = train(Machine(address, tmp_path / "b"), 1, on_existing="restart")
    assert (action, done) == ("start", 0) and "is not whole" in line
    monkeypatch.undo()
    assert not Machine(address, tmp_path / "c").storage.has("run")
    monkeypatch.setattr(storage, "WAITS", ())
    assert train(Machine(address, tmp_path / "b"), 2) == ("resume", 1, "")
    assert sorted(name for name in there(address) if "checkpoints" in name) == [f"run/checkpoints/000000{k}.safetensors" for k in (1, 2)]


@pytest.mark.parametrize("kept, left", [(2, [5, 6]), (3, [4, 5, 6]), (0, [1, 2, 3, 4, 5, 6])])
def test_checkpoints_that_were_not_fetched_are_kept_as_many_as_asked_for(address, tmp_path, kept, left):
    assert train(Machine(address, tmp_path / "a"), 4, kept=kept) == ("start", 0, "")
    b = Machine(address, tmp_path / "b")
    assert train(b, 6, kept=kept) == ("resume", 4, "")
    assert not (tmp_path / "b/run/checkpoints/0000003.safetensors").exists()  # the newest alone was fetched
    assert sorted(name for name in there(address) if "checkpoints" in name) == [f"run/checkpoints/{k:07d}.safetensors" for k in left]


def test_a_damaged_file_of_the_storage_is_not_taken(address, tmp_path):
    assert train(Machine(address, tmp_path / "a"), 4) == ("start", 0, "")
    path = f"{address.removeprefix('memory:/')}/run/checkpoints/0000004.safetensors"
    data = bytearray(MemoryFileSystem().cat_file(path))
    data[-3] ^= 1
    MemoryFileSystem().pipe_file(path, bytes(data))
    b = Machine(address, tmp_path / "b")
    assert train(b, 5) == ("resume", 3, "")
    assert f"{address}/run/checkpoints/0000004.safetensors is not whole; the one before is used" in b.said


def test_a_manifest_names_nothing_outside_the_run(address, tmp_path):
    """It may have come from a stranger."""
    assert train(Machine(address, tmp_path / "a"), 1) == ("start", 0, "")
    fs, root = MemoryFileSystem(), address.removeprefix("memory:/")
    (path,) = [path for path in fs.find(root) if "manifest" in path][-1:]
    real = manifests.Manifest.read(fs.cat_file(path))
    fs.pipe_file(f"{root}/run/x", b"x")
    told = (1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    texts = {**real.texts, "../../outside.json": "{}", "live/lock": "x"}
    fs.pipe_file(path, real._replace(files={**real.files, "../x": told, "LIVE/x": told, "x": told}, texts=texts).data())
    before = {path for path in tmp_path.rglob("*")}
    with use(b := Machine(address, tmp_path / "b")):
        b.storage.fetch("run", "resume")
    assert (tmp_path / "b/run/x").read_bytes() == b"x" and (tmp_path / "b/run/checkpoints/0000001.safetensors").is_file()
    assert all(tmp_path / "b/run" in (path, *path.parents) for path in set(tmp_path.rglob("*")) - before - {tmp_path / "b"})
    assert {path.name for path in (tmp_path / "b/run/live").iterdir()} == {"lock", "stored.json"} and (tmp_path / "b/run/live/lock").read_bytes() == b""


def test_any_storage_of_fsspec(tmp_path):
    """Where folders have to be made."""
    address = f"file://{tmp_path}/deep/er"
    assert train(Machine(address, tmp_path / "a"), 2) == ("start", 0, "")
    assert train(Machine(address, tmp_path / "b"), 3) == ("resume", 2, "")
    assert (tmp_path / "deep/er/run/run.json").is_file()
