"""The optimizer of the paper's authors, for `--recipe paper` and for any training loop."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ticketops.errors import InputError, UnsupportedError
from ticketops.models.freezing import trainable_gradients


class Adamax(Optimizer):
    """Adamax as the paper's authors train with it: decoupled weight decay and no bias correction.

    For a weight w with gradient g, after g is scaled down to an l2 norm of at most `max_grad_norm`:

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        w = w - lr * (m / (u + eps) + weight_decay * w)

    `torch.optim.Adamax` differs in three ways: it adds the weight decay to the gradient, so that u rescales it; it
    divides m by 1 - beta1**step; and it does not clip. Weights pruned by a ticket are excluded from the norm, m and u.
    A step does not synchronize with the GPU.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that set the options below for a group of parameters.
        lr: learning rate; as a 0-dim tensor on the parameters' device it can be changed inside a CUDA graph.
        betas: decay rates of m and u, each in [0, 1).
        eps: constant added to |g| and to u.
        weight_decay: coefficient of the decoupled weight decay.
        max_grad_norm: maximum l2 norm of each parameter's gradient; 0 disables clipping.

    Raises:
        InputError: an option is out of range.

    Source: arXiv 2105.12002 trains with the Adamax of MT-DNN (module/bert_optim.py).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters.

        Args:
            param_group: "params" and any of the options; missing options take the optimizer's defaults.

        Raises:
            InputError: an option is out of range.
        """
        options = {**self.defaults, **param_group}
        if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
            raise InputError(f"lr has shape {list(options['lr'].shape)}: give one number")
        # Reading a tensor's value would synchronize with the GPU.
        numbers = {name: options[name] for name in ("lr", "eps", "weight_decay", "max_grad_norm")}
        for name, value in numbers.items():
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise InputError(f"{name} {value!r} is not a finite number of at least 0")
        if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
            raise InputError(
                f"betas {options['betas']!r} are not two numbers in [0, 1): (0.9, 0.999) suits most models"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: function that recomputes the gradients and returns the loss; optional.

        Returns:
            The closure's result; None without a closure.

        Raises:
            UnsupportedError: a gradient is sparse or complex; raised before any parameter is updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [
            (group, [parameter for parameter in group["params"] if parameter.grad is not None])
            for group in self.param_groups
        ]
        for _, parameters in with_gradient:
            for parameter in parameters:
                _check(parameter)
        for group, parameters in with_gradient:
            # A foreach function needs one launch for all tensors of the same device and dtype.
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in parameters:
                alike[parameter.device, parameter.dtype].append(parameter)
            for tensors in alike.values():
                self._update(tensors, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, weight_decay, max_grad_norm = group["lr"], group["weight_decay"], group["max_grad_norm"]
        for parameter in parameters:
            if not self.state[parameter]:
                for name in ("exp_avg", "exp_inf"):
                    self.state[parameter][name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        m, u = ([self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_inf"))
        gradients = trainable_gradients(parameters)
        if max_grad_norm:
            # In float32, since the norm of a float16 gradient can overflow. NaN and infinity propagate, as in torch.
            scales = torch._foreach_norm(gradients, 2, dtype=torch.promote_types(gradients[0].dtype, torch.float32))
            torch._foreach_add_(scales, 1e-6)
            torch._foreach_reciprocal_(scales)
            torch._foreach_mul_(scales, max_grad_norm)
            torch._foreach_clamp_max_(scales, 1.0)
            gradients = list(torch._foreach_mul(gradients, scales))
        torch._foreach_lerp_(m, gradients, 1 - group["betas"][0])
        torch._foreach_mul_(u, group["betas"][1])
        # Out of place, since without clipping `gradients` are the user's own tensors.
        sizes = torch._foreach_abs(gradients)
        del gradients
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_maximum_(u, sizes)
        del sizes
        steps = torch._foreach_div(m, torch._foreach_add(u, group["eps"]))
        if weight_decay:
            torch._foreach_add_(steps, parameters, alpha=weight_decay)
        if isinstance(lr, Tensor):
            torch._foreach_mul_(steps, lr)
            torch._foreach_sub_(parameters, steps)
        else:
            torch._foreach_add_(parameters, steps, alpha=-lr)


def _check(parameter: Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise UnsupportedError(
            f"Adamax does not serve sparse gradients, and a parameter of shape {list(parameter.shape)} has one: make "
            "its embedding with sparse=False"
        )
    if gradient.is_complex():
        raise UnsupportedError(f"Adamax does not serve complex parameters, such as one of {list(parameter.shape)}")
