"""What the log says of a PPO run, and the warnings that follow from it."""

import logging

from finetune_chatmodel_demo.training.settings import Settings

logger = logging.getLogger(__name__)

ROLLOUTS_IN_A_ROW = 5  # before a warning
NEARLY_ALL = 0.95
FAR = 5.0  # times --ppo_target


class Figures:
    """Means over the updates and over the rollouts between two entries of the log; a checkpoint keeps them."""

    def __init__(self) -> None:
        self._updates: dict[str, float] = {}
        self._rollouts: dict[str, float] = {}
        self._update_count = self._rollout_count = 0

    def add_update(self, figures: dict[str, float]) -> None:
        """Adds those of an optimizer update."""
        self._update_count += 1
        for name, value in figures.items():
            self._updates[name] = self._updates.get(name, 0.0) + value

    def add_rollout(self, figures: dict[str, float]) -> None:
        """Adds those of a rollout; they replace what was logged already."""
        if self._rollout_count == 0:
            self._rollouts = {}
        self._rollout_count += 1
        for name, value in figures.items():
            mean = self._rollouts.get(name, 0.0)
            self._rollouts[name] = mean + (value - mean) / self._rollout_count

    def collect(self) -> dict[str, float]:
        """Means since the last call; where no rollout was added since then, those of the last one again."""
        updates = {name: value / max(self._update_count, 1) for name, value in self._updates.items()}
        self._updates, self._update_count, self._rollout_count = {}, 0, 0
        return updates | self._rollouts


class RolloutWatch:
    """Warns when a run has gone astray, with what to do: each cause once, when some rollouts in a row show it."""

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
