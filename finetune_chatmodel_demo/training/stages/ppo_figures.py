"""The figures of a PPO run between two entries of the log: means over updates, and over rollouts."""

from typing import Any


class Figures:
    """Collects figures; what was collected survives in a checkpoint."""

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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""
        vars(self).update(state)
