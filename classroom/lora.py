"""LoRA, the reference beside which the experiments set the two methods (Hu et al. 2021, arXiv 2106.09685).

Where a prefix adds a past, LoRA adds to the weights: a matrix W becomes W + (alpha / r) B A; A has r rows, B has r columns.
"""

import torch
from torch import Tensor, nn

from model import Decoder


class LoRA(nn.Module):
    """A frozen linear layer and its update: (…, in) -> (…, out). B starts as zeros: at first nothing is changed."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        bound, device = linear.in_features**-0.5, linear.weight.device
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator).to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.scale * (x.to(self.A.dtype) @ self.A.T @ self.B.T)).to(x.dtype)


def add_lora(model: Decoder, rank: int, alpha: float = 32.0, seed: int = 0) -> Decoder:
    """Gives each layer of a frozen model LoRA on its queries and values, as in the paper (GPT-2: on c_attn) -> the model.

    Train it as `train.tune(model, [], …)`: only A and B ask for gradients. alpha is the paper's for GPT-2 (its table 11).
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.h:
        for name in ("q_proj", "v_proj", "c_attn"):
            if linear := getattr(block.attn, name, None):
                setattr(block.attn, name, LoRA(linear, rank, alpha, generator))
    return model
