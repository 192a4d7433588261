"""A transformers model whose MoE layers hold different numbers of experts, or whose output head has a bias: the stock class,
changed to what its configuration says before weights are loaded. Saved beside the weights, it needs nothing but torch and
transformers.
"""

from typing import Any

from torch import nn


class BiasedHead(nn.Linear):
    """An output head with a bias, which is the last column of its weight [V, D + 1]: stock code, which knows of no bias, meets
    another shape and stops, instead of leaving the bias out.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        """Sizes of the stock head."""
        super().__init__(d_model + 1, vocab_size, bias=False)

    def forward(self, x: Any) -> Any:
        """[..., V] from x [..., D]."""
        return nn.functional.linear(x, self.weight[:, :-1], self.weight[:, -1])


class PrunedExperts(nn.Module):
    """Mixed in before a stock class. `config.moeprune` holds, where layers are unequal, per MoE layer the number of experts, the
    tensors that have one entry per expert (path -> dimension) and the attributes that say how many there are; and whether the
    output head has a bias.
    """

    lm_head: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        """Tensors are read and saved under the names of the stock class; transformers knows no names of foreign code."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the stock model and change it."""
        super().__init__(config, *args, **kwargs)
        if config.moeprune.get("head_bias"):
            self.lm_head = BiasedHead(self.lm_head.in_features, self.lm_head.out_features)
        for layer in config.moeprune.get("layers", ()):
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
