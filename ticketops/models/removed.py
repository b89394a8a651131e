"""Replacement of linear layers that have no inputs or no outputs after shrinking."""

from torch import Tensor, nn
from torch.nn import functional


class RemovedLinear(nn.Module):
    """A linear layer without inputs or without outputs. It has no weight of size 0, for which quantizers return garbage
    and optimizers and norms fail.

    A remaining bias is a parameter under its old name. A layer without a bias is not a submodule but a plain attribute
    of the module that calls it, so that loops over a model's modules do not find it.

    Attributes:
        in_features, out_features: number of inputs and outputs; one of them is 0.
        weight: None.
        bias: [out_features] of a layer without inputs, or None.
    """

    in_features: int
    out_features: int
    weight: None
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Takes [.., in_features], returns [.., out_features]: the bias, or zeros without one."""
        if not self.out_features:
            return x[..., :0]
        # A sum over no inputs is zero. As padding of x it stays in the autograd graph, so that x gets a gradient.
        zeros = functional.pad(x, (0, self.out_features))
        return zeros if self.bias is None else zeros + self.bias


def remove_linear(linear: nn.Linear, dim: int) -> None:
    """Turns a linear layer into a RemovedLinear, in place.

    Args:
        linear: linear layer, whose weight is already removed.
        dim: dimension of size 0 of the weight: 0 for outputs, 1 for inputs.
    """
    if dim:
        linear.in_features = 0
    else:
        linear.out_features = 0
    linear.__class__ = RemovedLinear  # type: ignore[assignment]


def drop_removed(module: nn.Module) -> None:
    """Converts every RemovedLinear without a bias from a submodule to a plain attribute.

    Args:
        module: layer that contains them.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RemovedLinear) and child.bias is None:
                delattr(parent, name)
                # The flag keeps transformers' initialisation of the parent from using the missing weight.
                vars(parent).update({name: child, "_is_hf_initialized": True})
