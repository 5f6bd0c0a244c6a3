"""Which hosts are called: the user's settings and command line say, a workflow alone never does."""

import json

import pytest

from comfy_dancegrpo import addresses, settings
from comfy_dancegrpo.addresses import Address, Place
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import Host, use


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine(**settings)`: writes the user's settings file, which is not there before."""
    path = tmp_path / "settings.json"
    monkeypatch.setenv(settings.PATH, str(path))
    monkeypatch.delenv(settings.API_KEYS, raising=False)

    def write(text=None, **values):
        path.write_text(json.dumps(values) if text is None else text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("given, url, allowed", [
    ("gpu-box", "http://gpu-box/score", True),
    ("gpu-box", "http://GPU-Box.:8190/score", True),
    ("gpu-box:8190", "http://gpu-box:8190/score", True),
    ("gpu-box:8190", "http://gpu-box/score", False),
    ("gpu-box:443", "https://gpu-box/score", True),
    ("gpu-box:80", "https://gpu-box/score", False),
    ("gpu-box", "http://gpu-box.elsewhere.example/score", False),
    ("gpu-box", "http://not-gpu-box/score", False),
    ("localhost", "http://127.0.0.1/score", False),
    ("[::1]:8190", "http://[::1]:8190/score", True),
    ("[::1]", "http://[::1]:8190/score", True),
])
def test_a_host_is_compared_whole(mine, given, url, allowed):
    mine(allowed_hosts=[given])
    assert (addresses.problem(url) is None) == allowed
    mine()
    active = Host()
    active.allowed_hosts = (given,)
    with use(active):
        assert (addresses.problem(url) is None) == allowed


@pytest.mark.parametrize("url", ["http://127.0.0.1:8190/score", "http://localhost/", "https://elsewhere.example/"])
def test_without_settings_no_host_is_allowed_and_the_line_says_how_to_allow_it(mine, url):
    (line,) = addresses.problem(url).splitlines()
    place = str(Address.parse(url).place)
    print(line)
    assert f"found the host {place}," in line and f"--allow-host {place}" in line and '"allowed_hosts"' in line and str(settings.path()) in line


@pytest.mark.parametrize("url", ["", "gpu-box", "ftp://gpu-box/", "file:///etc/passwd", "http://", "http:///score", "http://gpu-box@elsewhere.example/",
                                 "http://gpu-box\\@elsewhere.example/", "http://gpu-box/a b", "http://gpu-box/\r\nHost: x", "http://gpu-box:0/",
                                 "http://gpu-box:99999/", "http://[::1/", "http://gpu-box/#x", "http://bücher.example/"])
def test_what_is_no_address_is_one_line(mine, url):
    mine(allowed_hosts=["gpu-box", "elsewhere.example"])
    line = addresses.problem(url)
    assert line.startswith(f'input "address": found {url!r}, accepted: http://HOST:PORT/') and "\n" not in line


def test_an_address_is_taken_apart():
    assert Address.parse("https://Judge.example/v1/x?a=b c".replace(" ", "%20")) == Address("https", Place("judge.example", 443), "/v1/x?a=b%20c")


@pytest.mark.parametrize("text, line", [
    ("{", "are not JSON"), ("[]", "found list, accepted: an object"), ('{"allow": []}', "found 'allow', accepted: an object with 'allowed_hosts'"),
    ('{"allowed_hosts": "gpu-box"}', '"allowed_hosts": found \'gpu-box\', accepted: a list'), ('{"api_keys": {"gpu-box": 1}}', '"api_keys": accepted'),
    ('{"allowed_hosts": ["http://gpu-box"]}', "a host: found 'http://gpu-box', accepted: HOST or HOST:PORT"),
])
def test_wrong_settings_are_one_line_that_names_the_file(mine, text, line):
    path = mine(text)
    with pytest.raises(RunError) as raised:
        addresses.check(Address.parse("http://gpu-box/"))
    assert line in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_key_goes_to_its_own_host_alone(mine, monkeypatch):
    mine(api_keys={"judge.example": "of the file", "judge.example:8000": "of the port"})
    key = lambda url: addresses.api_key(Address.parse(url))  # noqa: E731
    assert key("https://judge.example/v1") == "of the file" and key("http://judge.example:8000/v1") == "of the port"
    assert key("http://gpu-box/") is None
    monkeypatch.setenv(settings.API_KEYS, "judge.example=of-the-environment gpu-box:8190=other")
    assert key("https://judge.example/v1") == "of-the-environment" and key("http://gpu-box:8190/") == "other" and key("http://gpu-box/") is None
    assert "of-the-environment" not in repr(settings.read())


@pytest.mark.parametrize("platform, variables, tail", [
    ("linux", {"XDG_CONFIG_HOME": "/x"}, "/x/comfy_dancegrpo/settings.json"), ("linux", {}, "/.config/comfy_dancegrpo/settings.json"),
    ("darwin", {}, "/Library/Application Support/comfy_dancegrpo/settings.json"), ("win32", {"APPDATA": "/a"}, "/a/comfy_dancegrpo/settings.json"),
])
def test_where_the_settings_are(monkeypatch, platform, variables, tail):
    for name in (settings.PATH, "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(settings.sys, "platform", platform)
    assert settings.path().as_posix().endswith(tail)


@pytest.mark.parametrize("command", ["run", "validate"])
def test_an_allowed_host_that_is_none(cli, quickstart, command):
    done = cli(command, quickstart, "--allow-host", "http://gpu-box/")
    assert done.status == 2 and done.verdict == ["--allow-host: found 'http://gpu-box/', accepted: HOST or HOST:PORT, such as gpu-box:8190"]
