"""LoRA (Hu et al. 2021, arXiv 2106.09685), with which the experiments compare the two methods.

Where a prefix adds a past, LoRA adds to the weights. A matrix W becomes W + (alpha / r) B A, where
A has r rows and B has r columns.
"""

import torch
from torch import Tensor, nn

from model import Decoder


class LoRA(nn.Module):
    """(…, in) -> (…, out): a frozen linear layer and its update, which is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        bound, device = linear.in_features**-0.5, linear.weight.device
        A = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        update = x.to(self.A.dtype) @ self.A.T @ self.B.T
        return self.linear(x) + (self.scale * update).to(x.dtype)


def add_lora(model: Decoder, rank: int, alpha: float = 32.0, seed: int = 0) -> Decoder:
    """Adds LoRA to the queries and values of each layer of a frozen model -> the model.

    In GPT-2 these are rows of c_attn, so keys get it too. Train it as `train.tune(model, [], …)`:
    only A and B ask for gradients. alpha is the paper's for GPT-2 (its table 11).
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.h:
        for name in ("q_proj", "v_proj", "c_attn"):
            if hasattr(block.attn, name):
                linear = getattr(block.attn, name)
                setattr(block.attn, name, LoRA(linear, rank, alpha, generator))
    return model
