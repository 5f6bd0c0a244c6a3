"""The policy inside a loop, and what of the run goes with it through the body."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..grpo import micro_batch
from ..grpo.learner import Learner
from ..grpo.protocol import Conditioning, Size
from ..grpo.rollout import Work
from ..grpo.schedules import between
from ..policies import kernels
from ..policies.base import Policy
from ..rewards.early import Scoring
from ..workflow.host import host
from .prompt_cache import PromptCache
from .prompt_order import PromptOrder

if TYPE_CHECKING:
    from .session import LoopSettings
    from .watch import WatchLog

ENCODED_AHEAD = 16  # iterations whose prompts are encoded together, on an accelerator


class LivePolicy:
    """The policy inside a loop, the one value of the graph that changes: every Update trains it. state: the learner's, after the last whole iteration."""

    def __init__(self, policy: Policy, learner: Learner, settings: LoopSettings, prompts: tuple[str, ...], watch: WatchLog,
                 found: Callable[[micro_batch.Found], None], length_before: int):
        self.policy, self.learner, self.settings, self.watch, self._found = policy, learner, settings, watch, found
        self.state = learner.state()
        self.iteration = 0
        self.prompts, self.order = prompts, PromptOrder(prompts, settings.prompts_per_iteration, settings.seed, learner, settings.curriculum)
        self._encoded, self.scoring = PromptCache(policy), Scoring()
        self.length_before, self._said = length_before, set()

    def encode(self, prompts: tuple[str, ...], size: Size) -> Conditioning:
        last = min(self.iteration + ENCODED_AHEAD, self.settings.iterations)
        return self._encoded.get(prompts, size, self.order.upcoming(self.iteration, last))

    def over_the_run(self, input: str, start: float, end: float) -> float:
        """Of this iteration, what moves in equal steps from `start` in the run's first to `end` in its last; says where their number has changed."""
        length = self.settings.iterations
        if self.length_before != length and input not in self._said:
            self._said.add(input)
            host().say(f'what "{input}" says of the last iteration is that of {length} iterations instead of {self.length_before}: from here on the run is not '
                       "what it would have been with either number from its beginning")
        return between(start, end, self.iteration, length)

    def micro_batch(self, work: Work, conditioning: Conditioning) -> int:
        """Samples in every denoiser call of the run, of which this work is the next: found before the first, where they are to be found."""
        if self.settings.micro_batch == micro_batch.BY_TRIAL:
            found = micro_batch.find(self.learner, work, conditioning)
            kernels.forget(self.policy)
            self._found(found)
        return self.settings.micro_batch
