"""The editor's HTTP surface, over a real server: what the frontend asks for, what it may keep, and every abuse answered with a 4xx."""

import io
import json
import os
import sys

import pytest

BOUNDARY = "a-boundary"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def editor(start_editor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("editor")
    running = start_editor(folder)
    (folder / "secret.json").write_text('{"secret": true}')
    (folder / "outside").mkdir()
    for name in ("output", "input", "output/user/workflows"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "output" / "page.html").write_text("<script>alert(1)</script>")
    (folder / "output" / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (folder / "output" / "picture.png").write_bytes(picture())
    (folder / "output" / "user" / "workflows" / "there.json").write_text("{}")
    if sys.platform != "win32":
        (folder / "output" / "link.json").symlink_to(folder / "secret.json")
        (folder / "output" / "user" / "link.json").symlink_to(folder / "secret.json")
        (folder / "input" / "away").symlink_to(folder / "outside")
    yield running
    running.close()


def picture(colour: str = "red", form: str = "PNG") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(out, form)
    return out.getvalue()


def listing(folder) -> dict:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def form(**fields) -> tuple[bytes, dict[str, str]]:
    """A multipart body; `image` is (file name, bytes)."""
    lines = []
    for name, value in fields.items():
        file = f'; filename="{value[0].replace(chr(92), chr(92) * 2)}"\r\nContent-Type: application/octet-stream' if isinstance(value, tuple) else ""
        lines += [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode(),
                  value[1] if isinstance(value, tuple) else value.encode(), b"\r\n"]
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()]), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def upload(editor, **fields):
    return editor.ask("POST", "/upload/image", *form(**fields))


def refused(editor, answer, before) -> None:
    """A 4xx, nothing written, nothing of the secret told, and the server goes on."""
    assert 400 <= answer.status < 500, answer
    assert b'"secret": true' not in answer.body
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert listing(editor.folder) == before
    assert editor.get("/api/users") == {"storage": "server", "migrated": True}


# -- what the frontend asks for -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("path, kind", [
    ("/users", dict), ("/settings", dict), ("/extensions", list), ("/object_info", dict), ("/features", dict), ("/system_stats", dict),
    ("/jobs", dict), ("/queue", dict), ("/history", dict), ("/prompt", dict), ("/userdata?dir=workflows", list), ("/workflow_templates", dict),
    ("/i18n", dict), ("/global_subgraphs", dict), ("/internal/folder_paths", dict), ("/internal/logs", str), ("/internal/logs/raw", dict),
    ("/models", list), ("/models/checkpoints", list), ("/experiment/models", list), ("/experiment/models/diffusers", list),
    ("/embeddings", list), ("/dancegrpo/runs", dict), ("/settings/Comfy.Locale", type(None)),
])
def test_routes_answer_with_and_without_api(editor, path, kind):
    plain, prefixed = editor.get(path), editor.get("/api" + path)
    assert isinstance(plain, kind)
    if path != "/system_stats":  # free memory moves
        assert plain == prefixed


def test_the_frontend_is_the_packages_own_file_for_file(editor):
    index, static = editor.ask("GET", "/"), editor.editor.frontend
    assert index.body == (static / "index.html").read_bytes() and index.headers["Content-Type"] == "text/html; charset=utf-8"
    script = next((static / "assets").glob("index-*.js"))
    answer = editor.ask("GET", f"/assets/{script.name}")
    assert answer.body == script.read_bytes() and answer.headers["Content-Type"].startswith("text/javascript")
    assert editor.ask("GET", "/no-such-file").status == 404


def test_nodes_are_told_so_that_their_help_pages_are_found(editor):
    table = editor.get("/object_info")
    pack = {name: node["python_module"] for name, node in table.items()}
    assert pack["DanceGRPOLoadPolicy"] == "custom_nodes.comfy_dancegrpo" and pack["SaveImage"] == "nodes"
    ours = [name for name, module in pack.items() if module.startswith("custom_nodes.")]
    for name in ours:
        page = editor.ask("GET", f"/extensions/comfy_dancegrpo/docs/{name}.md")
        assert page.status == 200 and page.headers["Content-Type"].startswith("text/markdown"), name
    assert editor.get("/object_info/DanceGRPOScore") == {"DanceGRPOScore": table["DanceGRPOScore"]}
    assert "DanceGRPOLoadPolicy" in editor.get("/i18n")["en"]["nodeDefs"]


def test_the_bundled_workflows_are_templates_with_thumbnails(editor, quickstart):
    (pack, names), = editor.get("/workflow_templates").items()
    graphs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in quickstart.parent.glob("*.json")}
    known = editor.get("/object_info").keys() | {"Note", "MarkdownNote"}
    assert names == sorted(name for name, graph in graphs.items() if {node["type"] for node in graph["nodes"]} <= known)  # no other would run here
    for name in names:
        assert editor.get(f"/api/workflow_templates/{pack}/{name}.json")["nodes"]
        assert editor.ask("GET", f"/api/workflow_templates/{pack}/{name}.jpg").headers["Content-Type"] == "image/jpeg"
    assert editor.get("/templates/index.json") == [] and editor.get("/templates/index.zh.json") == []


def test_a_workflow_given_at_the_start_is_the_one_that_the_page_opens(start_editor, tmp_path, quickstart):
    (tmp_path / "My flow (2).json").write_bytes(quickstart.read_bytes())
    running = start_editor(tmp_path, opened=tmp_path / "My flow (2).json")
    try:
        assert running.server.url == f"http://127.0.0.1:{running.port}/?template=My_flow_2&source=opened"
        assert running.ask("GET", "/api/workflow_templates/opened/My_flow_2.json").body == quickstart.read_bytes()
        assert running.ask("GET", "/api/workflow_templates/opened/other.json").status == 404
    finally:
        running.close()


def test_settings_are_kept_but_for_the_one_that_would_open_another_packs_graph(editor):
    assert editor.get("/settings")["Comfy.Notification.ShowVersionUpdates"] is False
    assert editor.post("/api/settings", {"Comfy.Locale": "zh", "Comfy.TutorialCompleted": True}).status == 200
    assert editor.post("/settings/Comfy.Odd", [1, 2]).status == 200
    found = editor.get("/api/settings")
    assert found["Comfy.Locale"] == "zh" and found["Comfy.Odd"] == [1, 2] and "Comfy.TutorialCompleted" not in found
    assert editor.get("/settings/Comfy.Locale") == "zh"


def test_workflows_are_saved_listed_opened_renamed_and_deleted(editor):
    def listed():
        return [file["path"] for file in editor.get("/api/userdata?dir=workflows&recurse=true&split=false&full_info=true")]

    saved = editor.post("/api/userdata/workflows%2Fsub%2Fmy%20flow.json?overwrite=false&full_info=true", {"nodes": []})
    assert saved.status == 200 and json.loads(saved.body)["path"] == "workflows/sub/my flow.json"
    assert editor.post("/api/userdata/workflows%2Fsub%2Fmy%20flow.json?overwrite=false", {}).status == 409
    assert editor.get("/userdata/workflows%2Fsub%2Fmy%20flow.json") == {"nodes": []} and "sub/my flow.json" in listed()
    moved = editor.ask("POST", "/api/userdata/workflows%2Fsub%2Fmy%20flow.json/move/workflows%2Fother.json?overwrite=false")
    assert moved.status == 200 and json.loads(moved.body) == "workflows/other.json"
    assert "other.json" in listed() and "sub/my flow.json" not in listed()
    assert {"workflows/other.json"} <= {e["path"] for e in editor.get("/api/v2/userdata?path=workflows")}
    assert editor.ask("DELETE", "/api/userdata/workflows%2Fother.json").status == 204 and "other.json" not in listed()
    assert editor.ask("GET", "/api/userdata/workflows%2Fother.json").status == 404


def test_pictures_are_uploaded_once_under_a_name_of_their_own(editor):
    first = json.loads(upload(editor, image=("up.png", picture("red"))).body)
    assert first == {"name": "up.png", "subfolder": "", "type": "input"}
    assert json.loads(upload(editor, image=("up.png", picture("red"))).body)["name"] == "up.png"
    assert json.loads(upload(editor, image=("up.png", picture("blue")), subfolder="sub").body) == {"name": "up.png", "subfolder": "sub", "type": "input"}
    assert json.loads(upload(editor, image=("up.png", picture("blue"))).body)["name"] == "up (1).png"
    assert (editor.folder / "input/up.png").read_bytes() == picture("red") and (editor.folder / "input/sub/up.png").read_bytes() == picture("blue")
    assert json.loads(upload(editor, image=("up.png", picture("blue")), overwrite="true").body)["name"] == "up.png"
    assert (editor.folder / "input/up.png").read_bytes() == picture("blue")
    assert "up.png" in editor.get("/object_info")["LoadImage"]["input"]["required"]["image"][0]


def test_pictures_are_shown_as_they_are_and_as_a_page_wants_them(editor):
    from PIL import Image

    plain = editor.ask("GET", "/api/view?filename=picture.png&type=output&subfolder=&rand=0.1")
    assert plain.body == picture() and plain.headers["Content-Type"] == "image/png"
    small = editor.ask("GET", "/view?filename=picture.png&preview=webp;50")
    assert small.headers["Content-Type"] == "image/webp" and Image.open(io.BytesIO(small.body)).size == (4, 3)
    assert Image.open(io.BytesIO(editor.ask("GET", "/view?filename=picture.png%20%5Boutput%5D&channel=rgb").body)).mode == "RGB"


# -- abuse --------------------------------------------------------------------------------------------------------------
OUT = ["../secret.json", "..%2Fsecret.json", "%2e%2e%2fsecret.json", "..%5Csecret.json", "%252e%252e%252fsecret.json", "sub%2F..%2F..%2Fsecret.json",
       "/etc/passwd", "%2Fetc%2Fpasswd", "C:%5CWindows%5Cwin.ini", "C:secret.json", "%5C%5Chost%5Cshare%5Cx", "x%00.json", "....//secret.json"]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("path", [
    "/view?filename={}", "/view?filename=secret.json&subfolder={}", "/api/view?type=input&filename={}", "/view?type=temp&filename={}",
    "/userdata/{}", "/api/userdata/{}", "/userdata?dir={}", "/v2/userdata?path={}", "/extensions/comfy_dancegrpo/{}", "/extensions/core/{}",
    "/extensions/comfy_dancegrpo/../{}", "/workflow_templates/comfy_dancegrpo/{}", "/templates/{}", "/assets/{}", "/{}", "/internal/files/{}",
    "/dancegrpo/runs/{}", "/dancegrpo/runs/x/live/{}", "/models/{}", "/experiment/models/{}",
])
def test_no_name_leads_out_of_a_folder(editor, path, name):
    before = listing(editor.folder)
    answer = editor.ask("GET", path.format(name))
    if path.startswith(("/userdata?", "/v2/")) and answer.status == 200:
        assert json.loads(answer.body) == []  # a folder of that odd name, within the user's, which is not there
        answer = editor.ask("GET", "/userdata?dir=..")
    assert b'"secret": true' not in answer.body and b"root:" not in answer.body
    refused(editor, answer, before)


@pytest.mark.parametrize("name", OUT + ["plain.html", "workflows", "con.json", "a%0Ab.json", "x.json%2F", "trailing.json.", "%20", "link.json%2Fx.json"])
def test_nothing_is_written_or_deleted_outside_nor_under_odd_names(editor, name):
    before = listing(editor.folder)
    refused(editor, editor.post(f"/userdata/{name}", {}), before)
    refused(editor, editor.ask("DELETE", f"/userdata/{name}"), before)
    refused(editor, editor.ask("POST", f"/userdata/{name}/move/workflows%2Fnew.json"), before)
    refused(editor, editor.ask("POST", f"/userdata/workflows%2Fthere.json/move/{name}"), before)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_that_lead_out_are_not_followed(editor):
    before = listing(editor.folder)
    refused(editor, editor.ask("GET", "/view?filename=link.json"), before)
    refused(editor, editor.ask("GET", "/userdata/link.json"), before)
    refused(editor, editor.post("/userdata/link.json", {}), before)
    refused(editor, upload(editor, image=("a.png", picture()), subfolder="away"), before)
    assert "link.json" not in editor.get("/userdata?dir=.&recurse=true")


@pytest.mark.parametrize("fields", [
    {"image": ("../a.png", picture())}, {"image": ("..\\a.png", picture())}, {"image": ("/tmp/a.png", picture())}, {"image": ("C:\\a.png", picture())},
    {"image": ("a.png", picture()), "subfolder": "../outside"}, {"image": ("a.png", picture()), "subfolder": "/tmp"},
    {"image": ("a.png", picture()), "subfolder": "C:"}, {"image": ("a.png", picture()), "type": "output"},
    {"image": ("a.png", picture()), "type": "../output"}, {"image": ("nul.png", picture())}, {"image": ("a.html", b"<script>alert(1)</script>")},
    {"image": ("a.svg", b"<svg/>")}, {"image": ("a.png", b"<script>alert(1)</script>")}, {"image": ("a.png", PNG + b"cut off")},
    {"image": ("a.jpg", picture())}, {"image": ("a.png.exe", picture())}, {"image": ("", picture())}, {"subfolder": "x"}, {},
    {"image": ("a.png", picture()), "subfolder": "x" * 5000},
], ids=str)
def test_uploads_that_are_no_pictures_or_lead_elsewhere_are_refused(editor, fields):
    before = listing(editor.folder)
    refused(editor, upload(editor, **fields), before)


def test_a_broken_or_oversized_upload_is_refused(editor, monkeypatch):
    from comfy_dancegrpo.trainer.editor import routes_files

    before, (body, headers) = listing(editor.folder), form(image=("big.png", picture() + b"\0" * 300_000))
    refused(editor, editor.ask("POST", "/upload/image", body[:200], headers), before)
    refused(editor, editor.ask("POST", "/upload/image", b"{}", {"Content-Type": "application/json"}), before)
    refused(editor, editor.ask("POST", "/upload/image", body, {"Content-Type": "multipart/form-data"}), before)
    monkeypatch.setattr(routes_files, "MOST_UPLOAD", 100_000)
    answer = editor.ask("POST", "/upload/image", body, headers)
    assert answer.status == 413
    refused(editor, answer, before)


@pytest.mark.parametrize("path", ["/prompt", "/settings", "/settings/x", "/queue", "/history", "/interrupt", "/free", "/userdata/x.json", "/jobs/cancel"])
@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000, b"nonsense"], ids=["cut off", "no text", "deep", "a word"])
def test_malformed_json_is_a_400(editor, path, body):
    before = listing(editor.folder)
    answer = editor.ask("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status == 400
    refused(editor, answer, before)


def test_an_oversized_body_is_a_413(editor):
    before = listing(editor.folder)
    for path in ("/prompt", "/userdata/x.json", "/settings"):
        told = editor.ask("POST", path, b"", {"Content-Length": str(40 * 2**20)})
        assert told.status == 413
        refused(editor, told, before)


def test_an_oversized_body_of_untold_length_is_a_413(editor):
    before = listing(editor.folder)
    answer = editor.ask("POST", "/prompt", (b" " * 2**20 for _ in range(33)))  # http.client sends it in chunks
    assert answer.status == 413
    refused(editor, answer, before)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:8189"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""}, {"Host": "[::"},
])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/object_info"), ("GET", "/ws"), ("POST", "/prompt"), ("GET", "/view?filename=picture.png")])
def test_another_host_is_refused(editor, method, path, headers):
    answer = editor.ask(method, path, b"{}" if method == "POST" else None, headers)
    assert answer.status in (400, 403)  # what is no host at all, the HTTP parser refuses
    assert editor.get("/api/users")


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="}


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://localhost"}, {"Origin": "http://["},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
])
def test_pages_of_another_origin_change_nothing_and_hear_nothing(editor, headers):
    before = listing(editor.folder)
    for path in ("/prompt", "/api/settings", "/userdata/workflows%2Fx.json", "/interrupt", "/queue", "/upload/image", "/dancegrpo/runs/x/stop"):
        answer = editor.ask("POST", path, b"{}", {"Content-Type": "text/plain", **headers})
        assert answer.status == 403
        refused(editor, answer, before)
    assert editor.ask("DELETE", "/userdata/workflows%2Fthere.json", None, headers).status == 403
    socket = {**UPGRADE, **headers, **({"Sec-Fetch-Mode": "websocket"} if "Sec-Fetch-Mode" in headers else {})}
    refused(editor, editor.ask("GET", "/ws?clientId=x", None, socket), before)


def test_the_page_itself_is_let_in(editor):
    own = f"http://127.0.0.1:{editor.port}"
    assert editor.ask("POST", "/api/settings", b"{}", {"Origin": own, "Sec-Fetch-Site": "same-origin"}).status == 200
    assert editor.ask("GET", "/ws?clientId=own", None, {**UPGRADE, "Origin": own}).status == 101
    assert editor.ask("GET", "/", None, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 200  # a link to it
    assert editor.ask("GET", "/object_info", None, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status == 403


def test_files_that_a_browser_would_run_are_downloaded(editor):
    for name in ("page.html", "drawing.svg"):
        answer = editor.ask("GET", f"/view?filename={name}")
        assert answer.headers["Content-Type"] == "application/octet-stream" and answer.headers["Content-Disposition"] == "attachment"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_may_call_no_other_host(editor):
    policy = editor.ask("GET", "/").headers["Content-Security-Policy"]
    assert "default-src 'self' data: blob:;" in policy and f"connect-src 'self' ws://127.0.0.1:{editor.port}" in policy
    assert "https:" not in policy and "http:" not in policy


# -- prompts that are refused ---------------------------------------------------------------------------------------------
def test_a_foreign_node_is_a_400_on_that_node(editor, prompt):
    before = listing(editor.folder)
    prompt["99"] = {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "A (sampler)"}}
    answer = editor.post("/prompt", {"prompt": prompt})
    found = json.loads(answer.body)
    assert found["error"]["type"] == "missing_node_type" and list(found["node_errors"]) == ["99"]
    assert found["node_errors"]["99"]["class_type"] == "KSampler" and "unknown node type 'KSampler'" in found["node_errors"]["99"]["errors"][0]["message"]
    refused(editor, answer, before)


def test_a_wrong_value_is_shown_on_its_input(editor, prompt):
    prompt["4"]["inputs"]["iterations"] = -3
    del prompt["9"]["inputs"]["advantages"]
    found = json.loads(editor.post("/api/prompt", {"prompt": prompt}).body)
    assert found["error"]["details"].count("\n") == 1
    (value,), (missing,) = (found["node_errors"][n]["errors"] for n in ("4", "9"))
    assert value["extra_info"] == {"input_name": "iterations"} and value["details"].startswith("found -3, accepted:") or "-3" in value["details"]
    assert missing["type"] == "required_input_missing" and missing["extra_info"] == {"input_name": "advantages"}
    assert "10" in found["node_errors"]["4"]["dependent_outputs"]


def test_a_loop_without_end_is_shown_on_its_start(editor, prompt):
    found = json.loads(editor.post("/prompt", {"prompt": {n: node for n, node in prompt.items() if n in ("1", "2", "4", "5", "8")}}).body)
    assert list(found["node_errors"]) == ["4"] and "no Loop End closes this loop" in found["node_errors"]["4"]["errors"][0]["message"]


@pytest.mark.parametrize("change", [
    {"prompt": None}, {"prompt": []}, {"prompt": {}}, {"prompt": {"1": 5}}, {"prompt": {"1": {"class_type": ["x"], "inputs": {}}}},
    {"prompt": {"1": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}}, {"extra_data": 7}, {"number": "first"}, {"number": float("nan")},
    {"number": True}, {"prompt_id": "x" * 500}, {"prompt_id": "a\nb"}, {"partial_execution_targets": []}, {"partial_execution_targets": ["1"]},
    {"partial_execution_targets": "11"},
], ids=str)
def test_a_body_that_is_no_job_is_a_400(editor, prompt, change):
    before = listing(editor.folder)
    answer = editor.post("/prompt", {"prompt": prompt, **change})
    assert answer.status == 400 and {"error", "node_errors"} <= set(json.loads(answer.body))
    assert editor.get("/queue") == {"queue_running": [], "queue_pending": []}
    refused(editor, answer, before)


@pytest.mark.parametrize("path", ["/history?max_items=many", "/jobs?limit=x", "/jobs/none", "/userdata", "/view", "/view?filename=x&type=system"])
def test_questions_that_make_no_sense_are_a_4xx(editor, path):
    refused(editor, editor.ask("GET", path), listing(editor.folder))


# -- the token ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def guarded(start_editor, tmp_path_factory):
    running = start_editor(tmp_path_factory.mktemp("guarded"), address="0.0.0.0")
    yield running
    running.close()


@pytest.mark.parametrize("path", ["/", "/api/users", "/object_info", "/assets/favicon.ico", "/ws", "/view?filename=x", "/dancegrpo/runs", "/nothing"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "token wrong"}, {"Authorization": "token "}, {"Cookie": "dancegrpo=wrong"}])
def test_without_its_token_an_open_address_answers_nothing(guarded, path, headers):
    answer = guarded.ask("GET", path, None, headers)
    assert answer.status == 401 and "Set-Cookie" not in answer.headers
    assert guarded.ask("GET", path + ("&" if "?" in path else "?") + "token=wrong", None, headers).status == 401
    assert guarded.ask("POST", "/prompt", b"{}", headers).status == 401 and guarded.ask("POST", "/prompt?token=", b"{}", headers).status == 401


def test_the_token_opens_the_page_and_becomes_a_cookie(guarded):
    token = guarded.server.gate.token
    assert len(token) >= 32 and guarded.server.url == f"http://127.0.0.1:{guarded.port}/?token={token}"
    page = guarded.ask("GET", f"/?token={token}")
    cookie = page.headers["Set-Cookie"]
    assert page.status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie and token not in cookie
    kept = {"Cookie": cookie.split(";")[0]}
    assert guarded.ask("GET", "/api/users", None, kept).status == 200
    assert guarded.ask("GET", "/ws", None, {**UPGRADE, **kept}).status == 101
    assert guarded.ask("GET", "/api/users", None, {"Authorization": f"token {token}"}).status == 200
    assert guarded.ask("POST", "/settings", b"{}", {**kept, "Origin": "http://evil.example"}).status == 403
    assert guarded.ask("GET", "/ws", None, {**UPGRADE, **kept, "Origin": "http://evil.example"}).status == 403


def test_a_token_may_be_chosen_and_asked_for_on_this_machine_too(start_editor, tmp_path):
    running = start_editor(tmp_path, token="my own")
    try:
        assert running.ask("GET", "/users").status == 401
        assert running.ask("GET", "/users", None, {"Authorization": "token my own"}).status == 200
        assert running.server.url.endswith("/?token=my+own")
    finally:
        running.close()


def test_two_editors_do_not_know_each_others_cookies(start_editor, tmp_path):
    running = start_editor(tmp_path, token="one")
    other = start_editor(tmp_path, token="two")
    try:
        cookie = running.ask("GET", "/?token=one").headers["Set-Cookie"].split(";")[0].partition("=")[2]
        assert other.ask("GET", "/users", None, {"Cookie": f"dancegrpo_{other.port}={cookie}"}).status == 401
    finally:
        running.close()
        other.close()


def test_the_previews_folder_goes_with_the_editor(start_editor, tmp_path):
    running = start_editor(tmp_path)
    assert os.path.isdir(running.editor.previews)
    running.close()
    assert not os.path.exists(running.editor.previews)
