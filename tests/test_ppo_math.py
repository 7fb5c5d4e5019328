"""PPO's formulas against numbers computed by hand, and against plain numpy loops over one reply at a time."""

import math

import numpy as np
import pytest
import torch

from finetune_chatmodel_demo.training.stages import ppo_math
from finetune_chatmodel_demo.training.stages.reference import log_probs_and_entropy

LENGTHS = [5, 1, 3, 4]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


# Moments


def test_moments_by_hand():
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean, variance = ppo_math.masked_moments(values, mask)
    assert (mean.item(), variance.item()) == (3, pytest.approx(14 / 3))  # (4 + 1 + 9) / 3


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_variance_1(mask, shift_mean):
    values = 5 + 3 * draw(0, 4, 5)
    whitened = ppo_math.whiten(values, mask, shift_mean)
    inside, before = whitened[mask].numpy(), values[mask].numpy()
    assert inside.std() == pytest.approx(1, abs=1e-5)
    assert inside.mean() == pytest.approx(0 if shift_mean else before.mean(), abs=1e-5)
    np.testing.assert_allclose(inside - inside.mean(), (before - before.mean()) / before.std(), atol=1e-5)
    assert not whitened[~mask].any()


def test_whitening_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[True, True, False]])
    assert ppo_math.whiten(values, mask).tolist() == [[-1, 1, 0]]
    assert ppo_math.whiten(values, mask, shift_mean=False).tolist() == [[1, 3, 0]]
    assert ppo_math.whiten(torch.full((1, 3), 2.0), mask).tolist() == [[0, 0, 0]]


def test_two_processes_whiten_as_one(mask):
    values = draw(1, 4, 5)
    whole = ppo_math.whiten(values, mask)
    parts = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    count = float(mask.sum())
    mean = sum(float((v * m).sum()) for v, m in parts) / count
    squares = sum(float((((v - mean) ** 2) * m).sum()) for v, m in parts)
    for i, (part, part_mask) in enumerate(parts):
        sums = iter([count, mean * count, squares])  # what an all-reduce would give, in the order of the calls
        got = ppo_math.whiten(part, part_mask, add_up=lambda _, sums=sums: torch.tensor(next(sums)))
        torch.testing.assert_close(got, whole[2 * i : 2 * i + 2])


def test_running_moments_are_those_of_all_scores():
    scores = np.concatenate([np.random.default_rng(i).normal(i, 1 + i, 3 + i) for i in range(5)])
    running, start = ppo_math.RunningMoments(), 0
    for i in range(5):
        batch = scores[start : start + 3 + i]
        running.add(batch.mean(), batch.var(), len(batch))
        start += len(batch)
    assert (running.mean, running.count) == (pytest.approx(scores.mean()), len(scores))
    assert running.variance == pytest.approx(scores.var())
    normalised = running.normalise(torch.tensor(scores))
    np.testing.assert_allclose(normalised, (scores - scores.mean()) / scores.std(), rtol=1e-6)
    again = ppo_math.RunningMoments()
    again.load(running.state())
    assert again.state() == running.state()
    again.add(5.0, 1.0, 0)
    assert again.state() == running.state()


# Probabilities


def test_log_probs_and_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([1, 0]))
    assert log_probs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2)])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy.tolist() == pytest.approx([expected, math.log(2)])
    # At temperature ½ the odds 3:1 become 9:1.
    log_probs, _ = log_probs_and_entropy(logits, torch.tensor([1, 0]), temperature=0.5)
    assert log_probs.tolist() == pytest.approx([math.log(9 / 10), math.log(1 / 2)])


def test_kl_estimators_agree_with_the_exact_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum().item()
    assert exact == pytest.approx(0.5 * math.log(2.5) + 0.2 * math.log(0.4))
    mean = {name: (p * of(p.log(), q.log())).sum().item() for name, of in ppo_math.KL_ESTIMATORS.items()}
    assert mean["k1"] == pytest.approx(exact, abs=1e-6)
    assert mean["k3"] == pytest.approx(exact, abs=1e-6)
    assert mean["k2"] == pytest.approx(0.5 * (0.5 * math.log(2.5) ** 2 + 0.2 * math.log(0.4) ** 2), abs=1e-6)
    assert (ppo_math.kl_k3(p.log(), q.log()) >= 0).all()
    assert (ppo_math.kl_k1(p.log(), q.log()) < 0).any()


# Rewards and advantages


def test_the_score_stands_at_the_last_token():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = ppo_math.token_rewards(kl, torch.tensor([2.0, -1.0]), mask, kl_coef=0.5)
    expected = [[-0.05, -0.1, 2 - 0.15], [-1 - 0.2, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert ppo_math.last_token(mask).tolist() == [2, 0]


def test_advantages_by_hand():
    # gamma 0.5, lambda 0.5: deltas 1 + 0.5·2 - 1 = 1, 0 + 0.5·3 - 2 = -0.5, 4 - 3 = 1; then A = δ + 0.25 A'.
    rewards, values = torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo_math.advantages_and_returns(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.9375, -0.25, 1.0]]
    assert returns.tolist() == [[1.9375, 1.75, 4.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_equal_the_sum_of_their_definition(mask, gamma, lam):
    rewards, values = draw(2, 4, 5), draw(3, 4, 5)
    advantages, returns = ppo_math.advantages_and_returns(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].numpy(), np.append(values[row, :length].numpy(), 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        expected = [
            sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)
        ]  # equation 16 of GAE
        np.testing.assert_allclose(advantages[row, :length], expected, atol=1e-5)
        np.testing.assert_allclose(returns[row, :length], np.array(expected) + v[:-1], atol=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_with_lambda_1_returns_are_discounted_sums(mask):
    rewards = draw(4, 4, 5)
    _, returns = ppo_math.advantages_and_returns(rewards, draw(5, 4, 5), mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(expected, abs=1e-5)


# Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "is_clipped"),
    [
        (1.5, 2.0, -2.4, True),  # held at 1.2
        (1.5, -2.0, 3.0, False),  # the worse of both: not clipped
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),  # held at 0.8
        (1.1, 2.0, -2.2, False),
        (1.0, 3.0, -3.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, expected, is_clipped):
    log_probs = torch.tensor([[math.log(ratio), 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    old = torch.tensor([[0.0, -500.0]])
    loss, clipped = ppo_math.policy_loss(log_probs, old, torch.tensor([[advantage, 7.0]]), mask, cliprange=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert clipped.item() == is_clipped
    loss.backward()
    # d(-A r)/d log p = -A r; nothing flows where the clip holds, nor from padding.
    assert log_probs.grad.tolist()[0] == pytest.approx([0 if is_clipped else expected, 0], rel=1e-6)


def test_at_ratio_1_the_gradient_is_the_policy_gradient(mask):
    old, advantages = draw(6, 4, 5) - 3, draw(7, 4, 5)
    log_probs = old.clone().requires_grad_()
    loss, clipped = ppo_math.policy_loss(log_probs, old, advantages, mask, cliprange=0.2)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages * mask)
    assert clipped == 0
    assert loss.item() == pytest.approx(-(advantages * mask).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "is_clipped"),
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, True),  # held at 0.2
        (1.0, 0.9, 2.0, 0.5, False),
        (-1.0, 0.0, 2.0, 4.5, False),  # the held -0.2 is nearer: the larger error counts
    ],
)
def test_value_loss_by_hand(value, old, target, expected, is_clipped):
    values = torch.tensor([[value, 8.0]], requires_grad=True)
    others = [torch.tensor([[number, 1.0]]) for number in (old, target)]
    loss, clipped = ppo_math.value_loss(values, *others, torch.tensor([[True, False]]), cliprange=0.2)
    assert (loss.item(), clipped.item()) == (pytest.approx(expected), is_clipped)
    loss.backward()
    assert values.grad.tolist()[0] == pytest.approx([0 if is_clipped else value - target, 0])


def test_losses_equal_a_loop(mask):
    new, old, advantages = 0.3 * draw(8, 4, 5), 0.3 * draw(9, 4, 5), draw(10, 4, 5)
    policy, policy_clipped = ppo_math.policy_loss(new, old, advantages, mask, 0.2)
    value, value_clipped = ppo_math.value_loss(new, old, advantages, mask, 0.2)
    sums, counts = [0.0, 0.0], [0, 0]
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            n, o, a = (x[row, t].item() for x in (new, old, advantages))
            ratio = math.exp(n - o)
            sums[0] += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
            counts[0] += (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
            held = min(max(n, o - 0.2), o + 0.2)
            sums[1] += 0.5 * max((n - a) ** 2, (held - a) ** 2)
            counts[1] += (held - a) ** 2 > (n - a) ** 2
    assert [policy.item(), value.item()] == pytest.approx(sums, rel=1e-5)
    assert [policy_clipped.item(), value_clipped.item()] == counts
    assert counts[0] > 0 and counts[1] > 0


def test_explained_variance(mask):
    returns = draw(11, 4, 5)
    assert ppo_math.explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert ppo_math.explained_variance(torch.zeros(4, 5), returns, mask).item() == pytest.approx(0, abs=1e-6)
    got = ppo_math.explained_variance(0.5 * returns + 3, returns, mask).item()
    assert got == pytest.approx(0.75, abs=1e-5)  # half of each deviation is left, a quarter of the variance


# The coefficient of the KL


def test_the_coefficient_moves_by_hand():
    def move(coef: float, kl: float, replies: int) -> float:
        return ppo_math.move_kl_coef(coef, kl, target=6.0, replies=replies, horizon=10_000)

    assert move(0.2, kl=12.0, replies=100) == pytest.approx(0.2 * 1.002)  # error 1, held at 0.2
    assert move(0.3, kl=6.6, replies=500) == pytest.approx(0.3 * 1.005)  # error 0.1
    assert move(0.3, kl=-3.0, replies=100) == pytest.approx(0.3 * 0.998)  # error -1.5, held at -0.2
    assert move(0.3, kl=6.0, replies=100) == 0.3
