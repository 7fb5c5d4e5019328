"""The formulas of PPO on replies, as pure functions of tensors.

Shapes: B replies, T the longest reply of the batch. Position t of a reply is its t-th token, the stop token included;
every `mask` is (B, T) bool, True where there is a token of the reply (padding stands on the right).

Sources, by the names used below:
    PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
    Ziegler: Ziegler et al. 2019, arXiv:1909.08593, "Fine-Tuning Language Models from Human Preferences".
    N details: Huang et al. 2024, arXiv:2403.17031, "The N+ Implementation Details of RLHF with PPO", and the earlier
        post "The N Implementation Details of RLHF with PPO" about OpenAI's code.
    KL estimators: Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable

import torch

# Keeps a division by the square root of a variance finite; OpenAI's value.
VARIANCE_EPSILON = 1e-8
# Most that one update may change the coefficient by, Ziegler section 2.2.
LARGEST_KL_ERROR = 0.2

SumOverProcesses = Callable[[torch.Tensor], torch.Tensor]


def this_process_alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over one process: the values themselves."""
    return values


# Moments


def masked_moments(
    values: torch.Tensor, mask: torch.Tensor, add_up: SumOverProcesses = this_process_alone
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (of the population, without Bessel's correction, as in OpenAI's code: N details).

    Args:
        values: (B, T).
        mask: (B, T).
        add_up: sums a tensor over all processes, so that every process gets the moments of the whole batch.

    Returns:
        (), ().
    """
    count = add_up(mask.sum().to(values.dtype)).clamp(min=1)
    mean = add_up((values * mask).sum()) / count
    variance = add_up((((values - mean) ** 2) * mask).sum()) / count
    return mean, variance


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    add_up: SumOverProcesses = this_process_alone,
) -> torch.Tensor:
    """Values with variance 1 and, with `shift_mean`, mean 0; padding becomes 0.

    (x - mean) / √(variance + 1e-8), and without `shift_mean` the mean is added again (N details: rewards keep their
    mean, advantages do not).

    Args:
        values, mask: (B, T).
        shift_mean: whether the mean becomes 0.
        add_up: see `masked_moments`.

    Returns:
        (B, T).
    """
    mean, variance = masked_moments(values, mask, add_up)
    whitened = (values - mean) * torch.rsqrt(variance + VARIANCE_EPSILON)
    return (whitened if shift_mean else whitened + mean) * mask


class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979, the parallel form of Welford's algorithm).

    Attributes:
        mean, variance: of the population of `count` values.
    """

    def __init__(self) -> None:
        self.mean, self.variance, self.count = 0.0, 1.0, 0.0

    def add(self, mean: float, variance: float, count: float) -> None:
        """Merges the moments of a batch of `count` values into the running ones."""
        if count <= 0:
            return
        if self.count == 0:
            self.mean, self.variance, self.count = mean, variance, count
            return
        total = self.count + count
        delta = mean - self.mean
        squares = self.variance * self.count + variance * count + delta**2 * self.count * count / total
        self.mean, self.variance, self.count = self.mean + delta * count / total, squares / total, total

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """(score - mean) / √(variance + 1e-8), any shape."""
        return (scores - self.mean) / (self.variance + VARIANCE_EPSILON) ** 0.5

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load(self, state: dict[str, float]) -> None:
        """Continues from `state()`."""
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]


# The KL


def kl_k1(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log p - log q of tokens drawn from p: KL(p, q) without bias, but it can be negative. Any shape."""
    return log_probs - reference


def kl_k2(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(log p - log q)² / 2: low variance, biased. Any shape."""
    return (log_probs - reference) ** 2 / 2


def kl_k3(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): without bias and never negative. Any shape."""
    difference = reference - log_probs
    return torch.expm1(difference) - difference


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# Rewards and advantages


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """(B,): the position of each reply's last token."""
    return mask.sum(dim=1).clamp(min=1) - 1


def token_rewards(kl: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-β · KL at every token, plus the reply's score at its last token (Ziegler, equation 2; N details).

    Args:
        kl: (B, T), an estimate of the KL to the reference at each token.
        scores: (B,), of whole replies.
        mask: (B, T).
        kl_coef: β.

    Returns:
        (B, T); 0 at padding.
    """
    rewards = -kl_coef * kl * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_token(mask)] += scores.to(rewards.dtype)
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (GAE, equations 11 and 16), and the targets of the value function.

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γλ A_{t+1},  return_t = A_t + V_t.
    A reply is an episode: behind its last token, also where the length limit ended it, value and advantage are 0.

    Args:
        rewards: (B, T).
        values: (B, T), V_t is the value of the text before token t.
        mask: (B, T).
        gamma: discount; 1 for replies (N details).
        lam: λ, between the one-step estimate (0) and the whole return (1).

    Returns:
        advantages (B, T), returns (B, T); 0 at padding.
    """
    rewards, values = rewards * mask, values * mask
    advantage = next_value = torch.zeros_like(values[:, 0])
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, (advantages + values) * mask


# Losses


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate objective (PPO, equation 7), summed over tokens.

    max(-A · r, -A · clip(r, 1 - ε, 1 + ε)) with r = exp(log p - log p_old).

    Args:
        log_probs, old_log_probs, advantages, mask: (B, T); gradients flow into `log_probs` alone.
        cliprange: ε.

    Returns:
        The sum over tokens (), and how many tokens were clipped () (the second term was the larger one).
    """
    # Padding has ratio 1, so that no infinity arises there.
    ratio = torch.exp((log_probs - old_log_probs) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    is_clipped = (clipped > plain) & mask
    return (torch.maximum(plain, clipped) * mask).sum(), is_clipped.sum()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the values, clipped around the old ones (N details), summed over tokens.

    ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²).

    Args:
        values, old_values, returns, mask: (B, T); gradients flow into `values` alone.
        cliprange: ε.

    Returns:
        The sum over tokens (), and how many tokens were clipped ().
    """
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    is_clipped = (clipped > plain) & mask
    return 0.5 * (torch.maximum(plain, clipped) * mask).sum(), is_clipped.sum()


def explained_variance(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    add_up: SumOverProcesses = this_process_alone,
) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value function, 0 one that knows nothing. Returns ()."""
    error = masked_moments(returns - values, mask, add_up)[1]
    return 1 - error / masked_moments(returns, mask, add_up)[1].clamp(min=VARIANCE_EPSILON)


def move_kl_coef(coef: float, kl: float, target: float, replies: int, horizon: float) -> float:
    """The KL's coefficient after a rollout, a proportional controller in log space (Ziegler, 2.2).

    e = clip(KL / target - 1, -0.2, 0.2),  β ← β · (1 + e · replies / horizon).

    Args:
        coef: β.
        kl: mean over the rollout's replies of their KL, summed over tokens.
        target: the KL of a whole reply that is wanted, in nats.
        replies: how many the rollout had.
        horizon: replies over which an error of 1 doubles β (10,000 in OpenAI's code).
    """
    error = max(-LARGEST_KL_ERROR, min(LARGEST_KL_ERROR, kl / target - 1))
    return coef * (1 + error * replies / horizon)
