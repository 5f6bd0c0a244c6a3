from __future__ import annotations

import re

from comfy_dancegrpo import addresses
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.rewards import FPS

from . import wires

CALLS = {  # of every node that calls a service
    "connections": wires.integer(8, 1, 256, "Calls under way at once."),
    "timeout": wires.number(60.0, 0.1, 86400.0, "Seconds that a call may take, its answer included.", 1.0),
    "retries": wires.integer(5, 0, 1000, "A call that fails is tried again so often, after 1, 2, 4 … at most 30 seconds; then the run stops."),
}

MAY_CHANGE = ("address", *CALLS)  # without it being another run: the same numbers, from elsewhere


def name_problem(name: str, input: str) -> str | None:
    """The line about a reward's name that is none; None where it is one, or empty."""
    if re.fullmatch(r"[\w.-]{0,100}", name):
        return None
    return f'input "{input}": found {name!r}, accepted: letters, digits, "_", "-" and ".", at most 100'


def check_fits(found: str | bool) -> None:
    """Raises RunError where `VALIDATE_INPUTS` found a problem."""
    if found is not True:
        raise RunError(found)


def service(address: str, connections: int, timeout: float, retries: int):
    from comfy_dancegrpo.rewards.service import Service

    return Service(addresses.Address.parse(address), connections, timeout, retries)


class RemoteReward:
    TITLE = "Remote Reward"
    DESCRIPTION = "A reward that another program computes, on this machine or another: a reward server that is called over HTTP."
    SEARCH_ALIASES = ["http", "server", "api", "serve-reward"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.REWARD,)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("One number for each picture; larger is better.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "address": ("STRING", {"default": "http://127.0.0.1:8190/score", "tooltip": "Of the server. Its host must be allowed by you: in your settings, or "
                                                                                       "by --allow-host on the command line."}),
            "reward": ("STRING", {"default": "", "tooltip": "Which of the server's rewards; metrics and plots call it so. Empty: the one that it has."}),
            "batch_size": wires.integer(8, 1, 4096, "Pictures in a call."),
            **CALLS,
        }, "optional": {"fps": wires.number(FPS, 0.1, 240.0, "Frames a second of the MP4 files that videos are sent as.", 1.0)}}

    @classmethod
    def VALIDATE_INPUTS(cls, address, reward):
        return (reward is not None and name_problem(reward, "reward")) or (address is not None and addresses.problem(address)) or True

    def load(self, address: str, reward: str, batch_size: int, connections: int, timeout: float, retries: int, fps: float = FPS):
        from comfy_dancegrpo.rewards import remote

        check_fits(self.VALIDATE_INPUTS(address, reward))  # again, for what came over links
        return (remote.load(service(address, connections, timeout, retries), reward, batch_size, fps),)
