"""The losses of pairs: how much likelier the chosen answer is than the rejected."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora_api.spec.training import PreferenceSpec

_LIKELIEST = -1e-6
"""The largest mean log-likelihood for odds: those of certainty are infinite."""


@dataclass(frozen=True)
class PairLosses:
    """Of each pair of a batch, float32 [pairs]."""

    loss: Tensor
    """In nats, with its graph."""
    chosen_reward: Tensor
    """The implicit reward of the chosen answer, without a graph."""
    rejected_reward: Tensor

    def sums(self) -> tuple[Tensor, ...]:
        """Sums over the pairs: both rewards, their difference, and the share that prefers the chosen one.

        A pair with equal rewards counts half, as for an untrained model.
        """
        margin = self.chosen_reward - self.rejected_reward
        preferred = (margin > 0).float() + 0.5 * (margin == 0).float()
        return self.chosen_reward.sum(), self.rejected_reward.sum(), margin.sum(), preferred.sum()


def dpo(row_losses: Tensor, reference: Tensor, settings: PreferenceSpec) -> PairLosses:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    `row_losses` and `reference` are float32 [2 x pairs]: the negative log-likelihoods of the rows, chosen and rejected
    in turn, under the model and under the reference. With label smoothing the loss is that of conservative DPO
    (Mitchell 2023): the expected loss if the answers were swapped with that probability.
    """
    rewards = settings.beta * (reference - row_losses)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin, swapped = chosen - rejected, settings.label_smoothing
    loss = -(1 - swapped) * logsigmoid(margin) - swapped * logsigmoid(-margin)
    return PairLosses(loss, chosen.detach(), rejected.detach())


def orpo(row_losses: Tensor, targets: Tensor, settings: PreferenceSpec) -> PairLosses:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, equations 3 to 7).

    `row_losses` are divided by `targets`, [2 x pairs], so that an answer's odds are those of its mean token.
    The loss is the mean cross-entropy of the chosen answer and beta times that of the odds ratio.
    """
    likelihoods = (-row_losses / targets).clamp(max=_LIKELIEST)
    odds = likelihoods - torch.log(-torch.expm1(likelihoods))
    chosen, rejected = likelihoods[0::2], likelihoods[1::2]
    loss = -chosen - settings.beta * logsigmoid(odds[0::2] - odds[1::2])
    return PairLosses(loss, settings.beta * chosen.detach(), settings.beta * rejected.detach())
