"""Bad input through the real program with the real nodes: one line, exit status 2, no traceback, nothing written.

`pytest -s` shows the lines.
"""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image


def put(node, **inputs):
    """An edit of the quickstart's prompt: these inputs of a node."""
    return lambda prompt: prompt[node]["inputs"].update(inputs)


def drop(node, name):
    return lambda prompt: prompt[node]["inputs"].pop(name)


def become(node, class_type):
    return lambda prompt: prompt[node].update(class_type=class_type)


def keep(*nodes):
    def edit(prompt):
        for node in prompt.keys() - set(nodes):
            del prompt[node]
    return edit


def two_alike(prompt):
    prompt["3"]["_meta"]["title"] = prompt["15"]["_meta"]["title"] = "A Reward"


def as_is(prompt):
    pass


SEARCHED = ["none of the folders searched"]
WORKFLOWS = {
    # what is wrong: (edit of the prompt, words of the command, what the line holds)
    "unknown node type": (become("7", "DanceGRPOAdvantge"), [], ['node 7 "Advantage"', "'DanceGRPOAdvantge'", "did you mean 'DanceGRPOAdvantage'"]),
    "unknown node type of another pack": (become("8", "KSampler"), [], ["node 8", "unknown node type 'KSampler'"]),
    "missing widget": (drop("9", "clip_range"), [], ['node 9 "Update"', '"clip_range": missing', "a number from 1e-08 to 1.0"]),
    "missing link": (drop("9", "advantages"), [], ['"advantages": missing', "a link of type DANCEGRPO_ADVANTAGES"]),
    "unknown input": (put("9", clip_rnge=1e-3), [], ["clip_rnge", "did you mean 'clip_range'"]),
    "wrong link type": (put("7", scores=["5", 1]), [], ['"scores"', 'IMAGE from node 5 "Group Sample"', "accepted: DANCEGRPO_SCORES"]),
    "link to a widget of another type": (put("5", steps=["3", 0]), [], ['"steps"', "found DANCEGRPO_REWARD", "accepted: INT"]),
    "whole number out of range": (put("5", steps=1), [], ['"steps": found 1,', "a whole number from 2 to 1000"]),
    "number out of range": (put("4", learning_rate=2.0), [], ['"learning_rate": found 2.0', "a number from 1e-08 to 1.0"]),
    "not a number": (put("4", learning_rate=float("nan")), [], ['"learning_rate": found nan', "a number from 1e-08 to 1.0"]),
    "text for a number": (put("4", seed="0"), [], ['"seed": found \'0\'', "a whole number"]),
    "choice not in the list": (put("5", transition="sde"), [], ["found 'sde'", "one of 'dance_sde', 'flow_grpo_sde', 'cps', 'ode', 'ddim'"]),
    "cycle": (put("6", scores=["6", 0]), [], ['a cycle: node 6 "Score" -> node 6 "Score"']),
    "link to a node that is not there": (put("9", policy=["99", 0]), [], ['"policy"', "a link to node 99, which is not there"]),
    "link to an output that is not there": (put("9", policy=["4", 3]), [], ["a link to output 3 of node 4", "outputs 0 to 2"]),
    "no output node": (keep("1"), [], ["no output node", "'DanceGRPOLoopEnd'"]),
    "loop without an end": (keep("1", "2", "4", "5", "8"), [], ['node 4 "Loop Start"', "no Loop End closes this loop"]),
    "prompt file missing": (put("2", file="nowhere.txt"), [], ["'nowhere.txt'", *SEARCHED, "{input}", "embedded"]),
    "prompt file outside": (put("2", file="../flow.json"), [], ["'../flow.json'", *SEARCHED]),
    "prompt file empty": (put("2", file="empty.txt"), [], ["empty.txt has no prompt in it"]),
    "prompt file not UTF-8": (put("2", file="latin.txt"), [], ["latin.txt is not UTF-8 (byte 3)"]),
    "prompt file of another kind": (put("2", file="picture.png"), [], ["'picture.png'", "a file that ends in .txt, .jsonl, .csv"]),
    "prompt file malformed": (put("2", file="broken.jsonl"), [], ["broken.jsonl: line 2 is not JSON"]),
    "prompt file without the column": (put("2", file="other.csv"), [], ["other.csv: found the columns ['text']", '"prompt"']),
    "no prompt": (put("2", file="", text=" \n"), [], ['"text": found no prompt']),
    "policy missing": (put("1", policy="nowhere"), [], ['"policy": found \'nowhere\'', *SEARCHED, "{models}/diffusers", "{models}/checkpoints"]),
    "policy outside": (put("1", policy="../input"), [], ["'../input'", *SEARCHED]),
    "policy of an unknown family": (put("1", policy="strange"), [], ["NoSuchPipeline", "strange", "not known", "FluxPipeline"]),
    "policy that is no pipeline": (put("1", policy="bare"), [], ["bare, which has no model_index.json", "FluxPipeline"]),
    "policy of no class": (put("1", policy="nameless"), [], ["names no pipeline class", "FluxPipeline"]),
    "reward model missing": (put("3", model="nowhere"), [], ['"model": found \'nowhere\'', *SEARCHED, "{models}/reward_models"]),
    "reward model of another kind": (put("3", model="strange"), [], ["{models}/reward_models/strange", "'siglip'", "'clip'"]),
    "run name that leaves the folder": (put("4", run_name="../away"), [], ['"run_name": found \'../away\'', "letters, digits"]),
    "file name that leaves the folder": (put("11", filename="../away"), [], ['"filename": found \'../away\'', "letters, digits"]),
    "--set on no node": (as_is, ["--set", "Loop Strt.seed=1"], ['"Loop Strt"', "did you mean 'Loop Start'"]),
    "--set on no input": (as_is, ["--set", "Loop Start.sead=1"], ['"sead"', "did you mean 'seed'"]),
    "--set on two nodes": (two_alike, ["--set", "A Reward.batch_size=1"], ['"A Reward" is the title of nodes 3, 15', "one of these ids"]),
    "--set on a link": (as_is, ["--set", "Update.policy=1"], ['"policy" comes over a link from node 4']),
    "--set to a wrong value": (as_is, ["--set", "Loop Start.seed=few"], ["found 'few'", "a whole number"]),
    "--set out of range": (as_is, ["--set", "Loop Start.iterations=0"], ['"iterations": found 0', "from 1 to"]),
    "--set without a value": (as_is, ["--set", "Loop Start.seed"], ["'Loop Start.seed'", "input=value"]),
    "--iterations out of range": (as_is, ["--iterations", "0"], ['"iterations": found 0', "from 1 to"]),
}

FILES = {
    "not JSON": (b'{"1": ', ["not JSON", "line 1, column 7"]),
    "not text": (b"\xff\xfe\x00", ["neither UTF-8 text nor a PNG"]),
    "not an object": (b"[1, 2]", ["not a workflow: found a list, accepted: an object"]),
    "not a workflow": (b'{"prompt": "a cat"}', ["not a workflow: found an object with 'prompt'"]),
    "empty": (b"", ["not JSON"]),
    "empty workflow": (b"{}", ["the workflow is empty (it has no nodes)"]),
    "empty graph": (b'{"nodes": [], "links": [], "version": 0.4}', ["the workflow is empty (it has no nodes)"]),
    "a broken picture": (b"\x89PNG\r\n\x1a\n", ["not a readable PNG: it is damaged"]),
}


@pytest.fixture
def folders(tmp_path):
    """Input and model folders with what the cases name."""
    given, models = tmp_path / "input", tmp_path / "models"
    for folder in (given, *(models / "diffusers" / name for name in ("strange", "bare", "nameless"))):
        folder.mkdir(parents=True)
    (given / "empty.txt").write_text("\n \n")
    (given / "latin.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1"))
    (given / "picture.png").write_bytes(b"")
    (given / "broken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt"\n')
    (given / "other.csv").write_text("text\na cat\n")
    (models / "diffusers/strange/model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    (models / "diffusers/nameless/model_index.json").write_text("[]")
    (models / "reward_models/strange").mkdir(parents=True)
    (models / "reward_models/strange/config.json").write_text(json.dumps({"model_type": "siglip"}))
    return {"input": given.as_posix(), "models": models.as_posix()}


def check(done, fragments, what, output):
    line = "\n".join(done.err)
    print(f"\n{what}: {line}")
    line = line.replace(os.sep, "/")
    assert done.status == 2 and len(done.err) == 1 and done.verdict and done.out == []
    assert all(fragment in line for fragment in fragments), line
    assert not output.exists()


@pytest.mark.parametrize("what", WORKFLOWS)
def test_a_bad_workflow(cli, prompt, saved, folders, tmp_path, what):
    edit, words, fragments = WORKFLOWS[what]
    edit(prompt)
    options = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    done = cli("run", saved(prompt), "--output", tmp_path / "output", *options, *words)
    check(done, [f.format(**folders) if "{" in f else f for f in fragments], what, tmp_path / "output")


@pytest.mark.parametrize("what", FILES)
def test_a_bad_file(cli, tmp_path, what):
    raw, fragments = FILES[what]
    (tmp_path / "flow.json").write_bytes(raw)
    check(cli("run", tmp_path / "flow.json", "--output", tmp_path / "output"), ["flow.json", *fragments], what, tmp_path / "output")


def test_no_file_a_folder_and_a_picture_without_a_workflow(cli, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for path, fragment in ((tmp_path / "nowhere.json", "no such file"), (tmp_path, "is a folder"),
                           (tmp_path / "plain.png", "this PNG holds no workflow")):
        check(cli("run", path, "--output", tmp_path / "output"), [path.name, fragment], fragment, tmp_path / "output")


def test_every_problem_has_its_line(cli, prompt, saved, tmp_path):
    put("5", steps=1)(prompt)
    put("2", file="nowhere.txt")(prompt)
    drop("9", "clip_range")(prompt)
    done = cli("validate", saved(prompt))
    assert done.status == 2 and sorted(line.split('"')[1] for line in done.verdict) == ["Group Sample", "Training Prompts", "Update"]


def test_in_a_process_of_its_own_it_is_the_same(cli, prompt, saved, tmp_path):
    path = saved({**prompt, "7": {**prompt["7"], "class_type": "DanceGRPOAdvantge"}})
    words = ["run", str(path), "--output", str(tmp_path / "output")]
    done = subprocess.run([sys.executable, "-m", "comfy_dancegrpo.trainer", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    here = cli(*words)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", here.err) and len(here.err) == 1
    assert not (tmp_path / "output").exists()
