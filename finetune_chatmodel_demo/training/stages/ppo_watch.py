"""Warns when a PPO run has gone astray, with what to do: each cause once.

    cap       next to all replies are ended by --max_new_tokens
    constant  all replies have the same score: there is nothing to learn
    far       the policy has left its reference far behind

Exercise it with `pytest tests/test_ppo.py`.
"""

import logging

from finetune_chatmodel_demo.training.settings import Settings

logger = logging.getLogger(__name__)

ROLLOUTS_IN_A_ROW = 5
NEARLY_ALL = 0.95
FAR = 5.0  # times --ppo_target


class RolloutWatch:
    """Looks at the figures of each rollout."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._in_a_row: dict[str, int] = {}

    def look(self, figures: dict[str, float]) -> None:
        """Takes the figures of a rollout; warns where the last ones agree."""
        stage, length = self.settings.stage, self.settings.generation.max_new_tokens
        self._count(
            "cap",
            figures["hit_cap"] >= NEARLY_ALL,
            f"--max_new_tokens {length} ended {figures['hit_cap']:.0%} of the replies; raise it, start from a model "
            "that was fine-tuned (--stage sft), or let it cost something: --ppo_missing_eos_penalty",
        )
        self._count(
            "constant",
            figures["reward_std"] == 0,
            f"all replies have the score {figures['reward']:g}: PPO learns from differences; look at the reward, or "
            "draw more replies a rollout (--ppo_buffer_size)",
        )
        self._count(
            "far",
            max(figures["kl"], figures["kl_k3"]) > FAR * stage.ppo_target,
            f"the KL to the reference is {figures['kl']:.1f} nats a reply (--ppo_target {stage.ppo_target:g}); lower "
            "--learning_rate, raise --ppo_kl_coef, or lower --ppo_kl_horizon, so that the coefficient moves faster",
        )

    def _count(self, cause: str, is_seen: bool, message: str) -> None:
        self._in_a_row[cause] = self._in_a_row.get(cause, 0) + 1 if is_seen else 0
        if self._in_a_row[cause] == ROLLOUTS_IN_A_ROW:
            logger.warning("%d rollouts in a row: %s", ROLLOUTS_IN_A_ROW, message)
            self._in_a_row[cause] = -(10**9)  # each cause once
