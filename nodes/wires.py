"""The types of our wires. Each is a small class of the library; only the live policy changes after it was handed on."""

POLICY = "DANCEGRPO_POLICY"  # policies.base.Policy, its base weights frozen
LIVE_POLICY = "DANCEGRPO_LIVE_POLICY"  # runs.live_policy.LivePolicy, inside a loop alone
PROMPTS = "DANCEGRPO_PROMPTS"  # prompts.PromptList
REWARD = "DANCEGRPO_REWARD"  # rewards.Reward
ROLLOUT = "DANCEGRPO_ROLLOUT"  # grpo.protocol.Rollout
SCORES = "DANCEGRPO_SCORES"  # grpo.protocol.Scores
ADVANTAGES = "DANCEGRPO_ADVANTAGES"  # grpo.protocol.Advantages
UPDATE = "DANCEGRPO_UPDATE"  # grpo.update.UpdateStats
LORA = "DANCEGRPO_LORA"  # lora.adapter.LoraSnapshot
RUN = "DANCEGRPO_RUN"  # runs.session.RunRecord

CATEGORY = "DanceGRPO"


class Any(str):
    """A socket that takes every type: ComfyUI compares type names with `!=`."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = Any("*")


def integer(default: int, least: int, most: int, tooltip: str, step: int = 1) -> tuple:
    return "INT", {"default": default, "min": least, "max": most, "step": step, "tooltip": tooltip}


def number(default: float, least: float, most: float, tooltip: str, step: float = 0.01) -> tuple:
    return "FLOAT", {"default": default, "min": least, "max": most, "step": step, "round": False, "tooltip": tooltip}


def choice(options: list[str], tooltip: str, default: str | None = None) -> tuple:
    return options, {"default": default or options[0], "tooltip": tooltip}


FRAMES = integer(1, 1, 4097, "Of a video: of most models one more than a multiple of 4. 1 is a picture.", 4)


def socket(kind: str, tooltip: str, **options) -> tuple:
    return kind, {"tooltip": tooltip, **options}
