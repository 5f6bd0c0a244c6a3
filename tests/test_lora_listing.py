"""A run's LoRA where ComfyUI's loaders look: the user's own files there stay."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_dancegrpo.lora import listing
from comfy_dancegrpo.workflow.host import Host, use


class Saying(Host):
    def __init__(self, output):
        super().__init__(output=output)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def said(tmp_path):
    with use(Saying(tmp_path)) as host:
        yield host.lines


@pytest.fixture
def loras(tmp_path):
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras"


def made(path, value, header=("dancegrpo.policy",)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # as a run does it: what is linked to the former file stays as it was
    save_file({"a": torch.full((4,), float(value))}, path, metadata=dict.fromkeys(("format", *header), "pt"))
    return path


def test_it_stands_under_its_name_and_takes_the_place_of_an_earlier_one(tmp_path, said):
    for value in (1, 2):
        listed = listing.put(made(tmp_path / "run/lora/name.safetensors", value), tmp_path / "loras")
        assert listed == tmp_path / "loras/name.safetensors" and load_file(listed)["a"].tolist() == [value] * 4
        listing.put(tmp_path / "run/lora/name.safetensors", tmp_path / "loras")  # once more, as it is
        assert [p.name for p in (tmp_path / "loras").iterdir()] == ["name.safetensors"]
    assert said == []


def foreign(path):
    made(path, 7, header=())


def foreign_whose_tensor_has_our_name(path):
    save_file({"dancegrpo.policy": torch.ones(1)}, path)


def cut_short(path):
    made(path, 7)
    path.write_bytes(path.read_bytes()[:-1])


def no_safetensors(path):
    path.write_text("dancegrpo.policy, and nothing else")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("theirs", [foreign, foreign_whose_tensor_has_our_name, cut_short, no_safetensors, empty])
def test_another_file_of_that_name_stays_and_the_line_says_under_which_ours_is(tmp_path, said, loras, theirs):
    theirs(loras / "name.safetensors")
    before = (loras / "name.safetensors").read_bytes()
    for value in (1, 2):
        listed = listing.put(made(tmp_path / "run/lora/name.safetensors", value), loras)
        assert listed.name == "run-name.safetensors" and load_file(listed)["a"].tolist() == [value] * 4
        assert said.pop() == f"{loras / 'name.safetensors'} is there, and no LoRA of this program: it stays, and this one is listed as {listed.name!r}"
    theirs(listed)
    assert listing.put(made(tmp_path / "run/lora/name.safetensors", 3), loras).name == "run-name-2.safetensors"
    assert (loras / "name.safetensors").read_bytes() == before and len(said) == 1
    assert sorted(p.name for p in loras.iterdir()) == ["name.safetensors", "run-name-2.safetensors", "run-name.safetensors"]


def test_folders_and_links_to_nothing_stay_too(tmp_path, said, loras):
    (loras / "name.safetensors").mkdir()
    (loras / "run-name.safetensors").symlink_to(tmp_path / "gone")
    assert listing.put(made(tmp_path / "run/lora/name.safetensors", 1), loras).name == "run-name-2.safetensors"
    assert (loras / "run-name.safetensors").is_symlink() and (loras / "name.safetensors").is_dir()


def test_where_links_cannot_be_made_it_is_copied(tmp_path, said, loras, monkeypatch):
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    path = made(tmp_path / "run/lora/name.safetensors", 1)
    listed = listing.put(path, loras)
    assert listed.read_bytes() == path.read_bytes() and not listed.samefile(path)
