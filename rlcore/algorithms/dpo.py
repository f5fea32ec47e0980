"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290): pairs of responses instead of rewards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlcore.algorithms.aggregation import means, sums
from rlcore.config.sections import DpoConfig
from rlcore.types import TokenLoss, TokenView


def loss(tokens: TokenView, config: DpoConfig) -> TokenLoss:
    """Responses 0, 2, ... were preferred to 1, 3, ... of the same prompt. A pair's loss is on the first token of its preferred
    response, the rest are 0: the sum over the batch divided by the number of pairs is the mean.

    sigmoid is the paper's with label smoothing (cDPO, Mitchell 2023); ipo is arXiv 2310.12036, on means by token; hinge is
    SLiC's (arXiv 2305.10425).
    """
    assert tokens.ref_logprobs is not None
    ratios = (means if config.loss == "ipo" else sums)(tokens.logprobs - tokens.ref_logprobs, tokens.sequence)
    margin = ratios[0::2] - ratios[1::2]
    pair_loss = _pair_loss(margin, config)
    first = torch.searchsorted(tokens.sequence, torch.arange(0, len(ratios), 2, device=tokens.sequence.device))

    def spread(values: Tensor) -> Tensor:
        return torch.zeros_like(tokens.logprobs).index_add(0, first, values)

    return TokenLoss(spread(pair_loss), {
        "dpo/loss": spread(pair_loss), "dpo/accuracy": spread((margin > 0).float()), "dpo/margin": spread(config.beta * margin),
        "dpo/chosen_reward": spread(config.beta * ratios[0::2]), "dpo/rejected_reward": spread(config.beta * ratios[1::2]),
    })  # fmt: skip


def _pair_loss(margin: Tensor, config: DpoConfig) -> Tensor:
    if config.loss == "ipo":
        return (margin - 1 / (2 * config.beta)).square()
    if config.loss == "hinge":
        return (1 - config.beta * margin).clamp(min=0)
    smooth = config.label_smoothing
    return -(1 - smooth) * logsigmoid(config.beta * margin) - smooth * logsigmoid(-config.beta * margin)
