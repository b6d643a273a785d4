"""The losses of pairs are those of the papers, pair by pair, in float64."""

import pytest
import torch
from torch import Tensor

from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.model.losses.preference import PairLosses, dpo, orpo
from tests.support.models.plain_preference import plain_dpo, plain_orpo

# Five pairs, chosen and rejected in turn, in nats: clear both ways, close, and one as likely as the other.
LOSSES = torch.tensor([3.0, 9.0, 8.5, 2.0, 4.1, 4.0, 6.0, 6.0, 0.5, 12.0])
REFERENCE = torch.tensor([4.0, 7.0, 9.0, 3.5, 4.0, 4.5, 5.0, 5.0, 1.0, 10.0])
# Of unequal lengths, and of the pair that is as likely equal ones.
TARGETS = torch.tensor([2, 5, 4, 1, 3, 7, 4, 4, 6, 8])
SETTINGS = [(0.1, 0.0), (0.5, 0.2), (2.0, 0.5)]


def same(found: PairLosses, losses: Tensor, expected: Tensor, likelihoods: Tensor, rewards: Tensor) -> None:
    """Check the losses of pairs, their gradients and their rewards."""
    torch.testing.assert_close(found.loss, expected.float(), rtol=1e-5, atol=0)
    found.loss.sum().backward()
    expected.sum().backward()
    assert losses.grad is not None
    assert likelihoods.grad is not None
    torch.testing.assert_close(losses.grad, -likelihoods.grad.flatten().float(), rtol=1e-5, atol=1e-7)
    shown = torch.stack([found.chosen_reward, found.rejected_reward], dim=1)
    torch.testing.assert_close(shown, rewards.detach().float(), rtol=1e-5, atol=1e-7)
    chosen, rejected = rewards.detach().T
    means = [chosen.sum(), rejected.sum(), (chosen - rejected).sum()]
    assert [float(part) for part in found.sums()] == pytest.approx([*map(float, means), 2.5])


def in_float64(losses: Tensor) -> Tensor:
    """The log-likelihoods of answers, [pairs, 2], to differentiate."""
    return (-losses.double()).reshape(-1, 2).requires_grad_()


@pytest.mark.parametrize(("beta", "smoothing"), SETTINGS)
def test_dpo_is_the_papers(beta: float, smoothing: float) -> None:
    losses, likelihoods, reference = LOSSES.clone().requires_grad_(), in_float64(LOSSES), -REFERENCE.double().view(5, 2)
    found = dpo(losses, REFERENCE, PreferenceSpec(beta=beta, label_smoothing=smoothing))
    pairs = zip(likelihoods, reference, strict=True)
    expected = torch.stack([plain_dpo(model, base, beta, smoothing) for model, base in pairs])
    same(found, losses, expected, likelihoods, beta * (likelihoods - reference))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_orpo_is_the_papers(beta: float) -> None:
    losses, likelihoods, tokens = LOSSES.clone().requires_grad_(), in_float64(LOSSES), TARGETS.view(5, 2)
    found = orpo(losses, TARGETS, PreferenceSpec(beta=beta))
    expected = torch.stack([plain_orpo(*pair, beta) for pair in zip(likelihoods, tokens, strict=True)])
    same(found, losses, expected, likelihoods, beta * likelihoods / tokens)


def test_pairs_that_the_model_does_not_tell_apart_count_half() -> None:
    """So that a run shows 50 % before it has learned anything."""
    equal = torch.full((10,), 7.0)
    untrained = [dpo(LOSSES, LOSSES, PreferenceSpec()), orpo(equal, torch.full((10,), 3), PreferenceSpec())]
    assert [float(losses.sums()[-1]) / 5 for losses in untrained] == [0.5, 0.5]


@pytest.mark.parametrize("certain", [[0.0, 8.0], [8.0, 0.0], [0.0, 0.0]])
def test_answers_that_the_model_is_certain_of_have_a_finite_loss_and_gradient(certain: list[float]) -> None:
    """The odds of certainty are infinite."""
    losses = torch.tensor(certain, requires_grad=True)
    found = orpo(losses, torch.tensor([4, 4]), PreferenceSpec())
    found.loss.sum().backward()
    assert losses.grad is not None
    assert bool(found.loss.isfinite().all())
    assert bool(losses.grad.isfinite().all())
