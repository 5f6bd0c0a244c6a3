"""The user's own settings on this machine: what a workflow, which may come from a stranger, must not decide.

    {"allowed_hosts": ["gpu-box:8190", "judge.example"],        hosts that rewards may call; without a port, at any
     "api_keys": {"judge.example": "sk-…"},                      sent to that host alone
     "reward_folders": ["~/models/reward_models/custom"],        whose .py files are rewards: what is in there may be executed
     "trackers": ["tensorboard"]}                                which log every run

A JSON file: $DANCEGRPO_SETTINGS, or settings.json in the user's configuration folder. It is read anew each time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import RunError

PATH = "DANCEGRPO_SETTINGS"  # an environment variable
FOLDERS, TRACKERS = "reward_folders", "trackers"
API_KEYS = "DANCEGRPO_API_KEYS"  # another: "HOST[:PORT]=KEY", several with spaces between; these come before the file's


@dataclass(frozen=True)
class Settings:
    """allowed_hosts: HOST or HOST:PORT each. api_keys: a key by HOST or HOST:PORT. reward_folders: of .py files that are rewards; "~" is home.
    trackers: names of `runs.trackers`."""

    allowed_hosts: tuple[str, ...] = ()
    api_keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    reward_folders: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()


def path() -> Path:
    """Where the settings file is, or would be."""
    if os.environ.get(PATH):
        return Path(os.environ[PATH])
    return user_folder("XDG_CONFIG_HOME", ".config", windows=("APPDATA", "Roaming"), mac="Application Support") / "settings.json"


def user_folder(variable: str, usual: str, windows: tuple[str, str], mac: str) -> Path:
    """Ours among the user's own: where an environment variable (of XDG, or Windows') says, else in the usual place of the system."""
    if sys.platform == "win32":
        folder = Path(os.environ.get(windows[0]) or Path.home() / "AppData" / windows[1])
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / mac
    else:
        folder = Path(os.environ.get(variable) or Path.home() / usual)
    return folder / "comfy_dancegrpo"


def read() -> Settings:
    """The settings; those of no file where there is none. Raises `RunError`, one line, for a file that cannot be read or is wrong."""
    try:
        found = json.loads(path().read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        found = {}
    except OSError as error:
        raise RunError(f"the settings {path()} cannot be read: {error.strerror}") from None
    except ValueError:
        raise RunError(f"the settings {path()} are not JSON in UTF-8") from None
    checked = _checked(found)
    return Settings(tuple(checked.get("allowed_hosts", ())), {**checked.get("api_keys", {}), **_keys_of_the_environment()},
                    tuple(checked.get(FOLDERS, ())), tuple(checked.get(TRACKERS, ())))


def _checked(found: Any) -> dict[str, Any]:
    accepted = [f.name for f in fields(Settings)]
    if not isinstance(found, dict) or not found.keys() <= set(accepted):
        wrong = repr(sorted(found.keys() - set(accepted))[0]) if isinstance(found, dict) else type(found).__name__
        raise RunError(f"the settings {path()}: found {wrong}, accepted: an object with {', '.join(map(repr, accepted))}")
    hosts, keys, folders = found.get("allowed_hosts", []), found.get("api_keys", {}), found.get(FOLDERS, [])
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise RunError(f'the settings {path()}: "allowed_hosts": found {hosts!r}, accepted: a list of "HOST" or "HOST:PORT"')
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise RunError(f'the settings {path()}: "api_keys": accepted: an object of "HOST" or "HOST:PORT" and the key for it')
    if not isinstance(folders, list) or not all(isinstance(folder, str) and os.path.isabs(os.path.expanduser(folder)) for folder in folders):
        raise RunError(f'the settings {path()}: "{FOLDERS}": found {folders!r}, accepted: a list of folders, from the root or from "~" on')
    trackers = found.get(TRACKERS, [])
    if not isinstance(trackers, list) or not all(isinstance(name, str) for name in trackers):
        raise RunError(f'the settings {path()}: "{TRACKERS}": found {trackers!r}, accepted: a list of names')
    return found


def _keys_of_the_environment() -> dict[str, str]:
    pairs = [word.partition("=") for word in os.environ.get(API_KEYS, "").split()]
    if not all(host and key for host, _, key in pairs):
        raise RunError(f"the environment's {API_KEYS}: accepted: HOST=KEY or HOST:PORT=KEY, several with spaces between")
    return {host: key for host, _, key in pairs}
