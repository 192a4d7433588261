"""A transformers model whose MoE layers hold different numbers of experts: the stock class, cut to the numbers in its
configuration before weights are loaded. Saved beside the weights, it needs nothing but torch and transformers.
"""

from typing import Any

from torch import nn


class PrunedExperts(nn.Module):
    """Mixed in before a stock class. `config.moeprune` holds per MoE layer the number of experts, the tensors that have one entry
    per expert (path -> dimension) and the attributes that say how many there are.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the stock model and cut it."""
        super().__init__(config, *args, **kwargs)
        for layer in config.moeprune["layers"]:
            for path, dim in layer["tensors"].items():
                owner, _, name = path.rpartition(".")
                module = self.get_submodule(owner)
                tensor = getattr(module, name)
                cut = tensor.detach().narrow(dim, 0, layer["n_experts"]).clone()
                if isinstance(tensor, nn.Parameter):
                    cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
                setattr(module, name, cut)
            for path, name in layer["attributes"]:
                setattr(self.get_submodule(path), name, layer["n_experts"])
