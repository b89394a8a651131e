"""What stands where a linear layer was that has no inputs or no outputs left."""

from torch import Tensor, nn
from torch.nn import functional


class RemovedLinear(nn.Module):
    """Computes what a linear layer of no inputs, or of no outputs, does, without a weight of size 0.

    Quantizers answer garbage where a weight has no elements, and optimizers and norms fail on it. Where a bias is left,
    it is a parameter under its old name. Without one nothing is: the layer is then a plain attribute of the module that
    calls it, no submodule, so that what goes over a model's modules does not meet it.

    Attributes:
        in_features, out_features: one of them is 0.
        weight: None.
        bias: [out_features] of a layer without inputs, or None.
    """

    in_features: int
    out_features: int
    weight: None
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Takes [.., in_features], returns [.., out_features]: the bias, zeros without one, or nothing."""
        if not self.out_features:
            return x[..., :0]
        # A sum over no inputs is zero. Padding keeps it in the graph, so that what computed x gets its gradient.
        zeros = functional.pad(x, (0, self.out_features))
        return zeros if self.bias is None else zeros + self.bias


def remove_linear(linear: nn.Linear, dim: int) -> None:
    """Turns a linear layer into a RemovedLinear, in place.

    Args:
        linear: its weight is gone already.
        dim: of the weight, along which nothing is left: 0 for outputs, 1 for inputs.
    """
    if dim:
        linear.in_features = 0
    else:
        linear.out_features = 0
    linear.__class__ = RemovedLinear  # type: ignore[assignment]


def drop_removed(module: nn.Module) -> None:
    """Takes every RemovedLinear without a bias off the list of submodules.

    Args:
        module: a layer.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RemovedLinear) and child.bias is None:
                delattr(parent, name)
                # As no submodule. transformers' initialisation is not to reach through the parent for its weight.
                vars(parent).update({name: child, "_is_hf_initialized": True})
