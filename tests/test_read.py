"""Reading saved workflows: every accepted form, and one clear line for each thing that is not a workflow."""

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.read import read_workflow

UI = {"version": 0.4, "nodes": [{"id": 1, "type": "Note"}], "links": []}
API = {"1": {"class_type": "Save", "inputs": {}}}


def png(**texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def problem(path_or_bytes):
    with pytest.raises(WorkflowError) as caught:
        read_workflow(path_or_bytes)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


@pytest.mark.parametrize("data, format", [(UI, "ui"), ({**UI, "version": 1}, "ui"), (API, "api")])
def test_both_formats(tmp_path, data, format):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    saved = read_workflow(path)
    assert (saved.format, saved.data, saved.source) == (format, data, str(path))
    assert saved.raw == path.read_bytes()
    assert read_workflow(str(path)).data == data
    assert read_workflow(saved.raw).data == data


def test_a_byte_order_mark_is_no_part_of_the_json():
    assert read_workflow(b"\xef\xbb\xbf" + json.dumps(API).encode()).data == API


def test_a_png_gives_the_saved_graph_rather_than_the_prompt():
    saved = read_workflow(png(prompt=json.dumps(API), workflow=json.dumps(UI)))
    assert (saved.format, saved.data, json.loads(saved.raw)) == ("ui", UI, UI)


@pytest.mark.parametrize("texts", [{}, {"workflow": "null"}, {"workflow": "{}"}])
def test_a_png_of_an_api_call_gives_its_prompt(texts):
    saved = read_workflow(png(prompt=json.dumps(API), **texts))
    assert (saved.format, saved.data) == ("api", API)


def test_no_such_file(tmp_path):
    assert problem(tmp_path / "none.json") == f"{tmp_path / 'none.json'}: no such file"


def test_a_folder(tmp_path):
    assert problem(tmp_path).startswith(str(tmp_path))


@pytest.mark.parametrize("raw, expected", [
    (b'{"a": 1,\n "b" 2}', "workflow: not JSON: Expecting ':' delimiter at line 2, column 6"),
    (b"", "workflow: not JSON: Expecting value at line 1, column 1"),
    (b"\xff\xfe\x00", "workflow: neither UTF-8 text nor a PNG"),
    (b"[" * 200_000, "workflow: JSON nested too deeply"),
    (b"[1]", "workflow: not a workflow: found a list, accepted: an object"),
    (b'"x"', "workflow: not a workflow: found text, accepted: an object"),
    (b"null", "workflow: not a workflow: found null, accepted: an object"),
    (b"3", "workflow: not a workflow: found a number, accepted: an object"),
    (b"{}", "workflow: the workflow is empty (it has no nodes)"),
    (b'{"nodes": [], "links": []}', "workflow: the workflow is empty (it has no nodes)"),
])
def test_what_is_not_a_workflow(raw, expected):
    assert problem(raw) == expected


def test_another_object_is_named_by_its_keys():
    assert "not a workflow: found an object with 'name', 'scripts'" in problem(b'{"name": "x", "scripts": {}}')


def test_a_png_without_a_workflow():
    assert problem(png(Comment="hello")) == ("workflow: this PNG holds no workflow (no text named 'workflow' or 'prompt')")


def test_a_png_with_a_broken_workflow_is_not_passed_over():
    assert problem(png(workflow="{", prompt=json.dumps(API))).startswith("workflow: not JSON")


def test_a_truncated_png():
    assert problem(png()[:20]).startswith("workflow: not a readable PNG")
