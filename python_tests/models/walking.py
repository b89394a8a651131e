"""What users do to models, one function for each thing, and how a patched model and its stock twin are held together.

An operation takes a Walker, which has one model, and a random generator that draws the same for both models. A change
may return a function that undoes it. A look returns what it has computed, which must be the same for both.
"""

import contextlib
import copy
import functools
import io
import pickle
import random
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree
from transformers import activations
from transformers.integrations.neftune import activate_neftune

import ticketops
from models.conftest import HEADS, LAYERS
from models.test_encoders import NAMES, make
from ticketops.errors import InputError, UnsupportedError
from ticketops.models.handle import find_handle
from ticketops.models.record import kept_neurons
from ticketops.models.registry import find_adapter
from ticketops.tickets import Ticket

ROWS, WIDTH = 4, 13
#: Models that walks begin with.
_NAMES = (
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "ElectraForTokenClassification",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "EuroBertForSequenceClassification",
    "JinaEmbeddingsV3ForSequenceClassification",
    "MPNetForSequenceClassification",
    "MPNetForTokenClassification",
    "NomicBertForSequenceClassification",
    "NomicBertForTokenClassification",
    "ViTForImageClassification",
)
STARTS = tuple(name for name in _NAMES if name.startswith(tuple(NAMES)))
REFUSALS = UnsupportedError, InputError
#: What is refused with a ticket and without one.
ALWAYS_REFUSED = ("attention mask has holes",)

#: All operations by name; those that are a look; those that may be refused where no ticket is applied.
OPERATIONS: dict[str, Callable[..., Any]] = {}
LOOKS: set[str] = set()
REFUSABLE: set[str] = set()


def change(function: Any) -> Any:
    OPERATIONS[function.__name__] = function
    return function


def look(function: Any) -> Any:
    LOOKS.add(function.__name__)
    return change(function)


class Walker:
    """One of the two models on a walk, with what its user holds of it.

    Attributes:
        model: patched or stock.
        stock: it is the stock twin.
        seen: what hooks have seen since the last comparison.
        padding: how the batches are padded that it is looked at with.
        handle: of the patched model, None where it is stock.
        ticket: that the patched one has, or would have.
    """

    def __init__(self, name: str, stock: bool, unpad: bool, bucket: int | None) -> None:
        self.model: Any = make(name)
        self.stock, self.options = stock, {"unpad": unpad, "bucket": bucket}
        self.seen: list[Any] = []
        self.padding = "right"
        self.ticket: Ticket | None = None
        if not stock:
            ticketops.patch(self.model, **self.options)

    @property
    def handle(self) -> Any:
        return find_handle(self.model)

    @property
    def base(self) -> Any:
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        adapter, base = find_adapter(self.model)
        return getattr(adapter.encoder(base), adapter.stack)

    def parts(self) -> list[Any]:
        adapter, base = find_adapter(self.model)
        return [adapter.parts(layer) for layer in adapter.layers(base)]

    def pick(self, random: random.Random, kinds: Any = nn.Module, within: Any = None) -> tuple[nn.Module, str, Any]:
        """A module inside the model: its parent, its name in the parent, and itself."""
        found = [
            (parent, name, child)
            for parent in (self.model if within is None else within).modules()
            for name, child in parent.named_children()
            if isinstance(child, kinds)
        ]
        return random.choice(found) if found else stop()

    def inputs(self, padding: str | None = None, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if self.model.main_input_name == "pixel_values":
            return {"pixel_values": torch.randn(ROWS, 3, 32, 32, generator=generator).to(dtype)}
        mask = mask_of(padding or self.padding, generator)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(5, min(vocabulary, 90), mask.shape, generator=generator)
        ids = ids.where(mask.bool(), self.model.config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if (padding or self.padding) == "none":
            del batch["attention_mask"]
        return batch

    @property
    def text(self) -> bool:
        return self.model.main_input_name != "pixel_values"


class Stopped(Exception):
    """The operation has nothing to do here."""


def stop() -> Any:
    raise Stopped


def mask_of(padding: str, generator: torch.Generator) -> Tensor:
    lengths = torch.tensor([WIDTH, 3, 9, 1])
    mask = torch.arange(WIDTH) < lengths[:, None]
    if padding == "left":
        mask = mask.flip(1)
    if padding == "none":
        mask = torch.ones_like(mask)
    if padding == "holes":
        mask = torch.rand(ROWS, WIDTH, generator=generator) > 0.4
        mask[:, 0] = True
    return mask.long()


def at_tokens(value: Any, mask: Tensor | None) -> Any:
    """A result at real tokens: what stands at padding means nothing."""

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if mask is not None and leaf.ndim >= 2 and leaf.shape[:2] == mask.shape:
            return leaf[mask.bool()]
        return leaf

    return pytree.tree_map(real, value)


def plain(output: Any) -> Any:
    """A model's output without its class."""
    return dict(output) if hasattr(output, "keys") else output


def floating(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(value: Any) -> Tensor:
    return sum(leaf.double().square().mean() for leaf in floating(value))  # type: ignore[return-value]


def masked(walker: Walker) -> contextlib.ExitStack:
    """The stock twin with the ticket's masks multiplied in while the block runs."""
    stack, ticket = contextlib.ExitStack(), walker.ticket
    if ticket is None or not walker.stock:
        return stack
    masks = (ticket.head_mask, ticket.ffn_mask, kept_neurons(ticket, 64))
    for parts, heads, ffn, neurons in zip(walker.parts(), *masks, strict=False):
        wide = heads.repeat_interleave(12)
        hooks = [
            parts.fc2.register_forward_pre_hook(lambda _, args, by=neurons: (args[0] * by,)),
            parts.output.register_forward_pre_hook(lambda _, args, by=wide: (args[0] * by,)),
            parts.fc2.register_forward_hook(lambda _, args, output, by=ffn: output * by),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
    return stack


# --- flags and numbers that modules have


@change
def flag(walker, random):
    _, _, module = walker.pick(random)
    module.train(not module.training)
    return functools.partial(module.train, not module.training)


@change
def train(walker, random):
    walker.model.train(random.random() < 0.7)


@change
def drop_everything(walker, random):
    parent, _, module = walker.pick(random, nn.Dropout)
    before = module.p, module.training
    module.p = 1.0
    parent.train()
    module.train()

    def undo():
        module.p = before[0]

    if random.random() < 0.8:
        # Seldom kept: nothing else would show behind it.
        raise Undone(undo)
    return undo


class Undone(Exception):
    """The operation is to be looked at once, and then undone."""

    def __init__(self, undo: Callable[[], Any]) -> None:
        self.undo = undo


@change
def scaling(walker, random):
    found = [module for module in walker.model.modules() if isinstance(getattr(module, "scaling", None), float)]
    module, before = random.choice(found or stop()), None
    before, module.scaling = module.scaling, random.choice([0.2, 0.3, 0.4])
    return functools.partial(setattr, module, "scaling", before)


@change
def norm_eps(walker, random):
    _, _, module = walker.pick(random, nn.LayerNorm)
    before, module.eps = module.eps, random.choice([1e-12, 1e-3, 1e-1])
    return functools.partial(setattr, module, "eps", before)


@change
def causal(walker, random):
    found = [module for module in walker.model.modules() if hasattr(module, "is_causal")]
    module = random.choice(found or stop())
    before, module.is_causal = module.is_causal, True
    raise Undone(functools.partial(setattr, module, "is_causal", before))


@change
def buffers(walker, random):
    found = [(m, n) for m in walker.model.modules() for n in ("position_ids", "token_type_ids") if n in m._buffers]
    module, name = random.choice(found or stop())
    before = getattr(module, name)
    changed = (
        before.flip(-1) if name == "position_ids" else (1 - before).clamp_max(walker.model.config.type_vocab_size - 1)
    )
    module.register_buffer(name, changed, persistent=False)
    return functools.partial(module.register_buffer, name, before, persistent=False)


@change
def padding(walker, random):
    walker.padding = random.choice(["right", "right", "left", "holes", "none"])


# --- hooks


def first_tensor(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A value with its first floating tensor replaced."""
    leaves, spec = pytree.tree_flatten(value)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[place] = function(leaf)
            return pytree.tree_unflatten(leaves, spec)
    return value


class Hook:
    """A hook of a user: notes what it sees, and may change it."""

    def __init__(self, kind: str, changes: bool, seen: list[Any]) -> None:
        self.kind, self.changes, self.seen = kind, changes, seen

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        # (args[, kwargs][, output]) or gradients
        value = args[-1] if not self.kind.startswith("pre") else args[0]
        if self.kind.startswith("forward") or self.kind.startswith("pre"):
            self.seen.append([leaf.detach().clone() for leaf in floating(value)[:1]])
        else:
            self.seen.append([tuple(leaf.shape) for leaf in floating(args[-1])])
        if not self.changes:
            return None
        if self.kind == "pre_kwargs":
            return first_tensor(args[0], self.changed), args[1]
        if self.kind.startswith("backward"):
            return first_tensor(args[0], lambda leaf: leaf * 0.5)
        return first_tensor(value, self.changed)

    def changed(self, leaf: Tensor) -> Tensor:
        leaf = leaf * 0.9
        if leaf.ndim == 3:
            # A steering vector on the first token of each row.
            leaf = torch.cat([leaf[:, :1] + 0.5, leaf[:, 1:]], 1)
        return leaf

    def __deepcopy__(self, memo: Any) -> "Hook":
        return self


def register(module: nn.Module, kind: str, hook: Hook, **options: Any) -> Any:
    name = {
        "forward": "register_forward_hook",
        "forward_kwargs": "register_forward_hook",
        "pre": "register_forward_pre_hook",
        "pre_kwargs": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward_pre": "register_full_backward_pre_hook",
    }[kind]
    if kind.endswith("kwargs"):
        options["with_kwargs"] = True
    return getattr(module, name)(hook, **options)


def _hook(walker: Walker, random: random.Random, kind: str, within: Any = None, **options: Any) -> Any:
    module = walker.model if random.random() < 0.05 else walker.pick(random, within=within)[2]
    if isinstance(module, nn.ModuleList):
        stop()
    return register(module, kind, Hook(kind, random.random() < 0.6, walker.seen), **options).remove


@change
def hook_forward(walker, random):
    return _hook(walker, random, "forward")


@change
def hook_on_a_layer(walker, random):
    layer = random.choice(list(walker.layers))
    inside = [layer, *(module for module in layer.children())]
    return register(random.choice(inside), "forward", Hook("forward", random.random() < 0.6, walker.seen)).remove


@change
def hook_in_a_layer(walker, random):
    return _hook(walker, random, random.choice(["forward", "pre"]), within=random.choice(list(walker.layers)))


@change
def hook_before(walker, random):
    return _hook(walker, random, "pre", prepend=random.random() < 0.5)


@change
def hook_with_kwargs(walker, random):
    return _hook(walker, random, random.choice(["forward_kwargs", "pre_kwargs"]))


@change
def hook_prepended(walker, random):
    return _hook(walker, random, "forward", prepend=True)


@change
def hook_always_called(walker, random):
    return _hook(walker, random, "forward", always_call=True)


@change
def hook_backward(walker, random):
    return _hook(walker, random, random.choice(["backward", "backward_pre"]))


@change
def hook_among_the_embeddings(walker, random):
    return _hook(walker, random, random.choice(["forward", "pre"]), within=walker.base.embeddings)


@change
def hooks_removed(walker, random):
    for module in walker.model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]


@change
def hook_for_all_modules(walker, random):
    hook = Hook("forward", False, walker.seen)

    def seeing(module, args, output):
        if isinstance(module, nn.LayerNorm):
            hook(module, args, output)

    raise Undone(nn.modules.module.register_module_forward_hook(seeing).remove)


@change
def hook_on_a_parameter(walker, random):
    parameter = random.choice([p for p in walker.model.parameters() if p.requires_grad] or stop())
    raise Undone(parameter.register_hook(lambda gradient: gradient * 0.5).remove)


@change
def hook_behind_accumulation(walker, random):
    parameter = random.choice([p for p in walker.model.parameters() if p.requires_grad] or stop())
    raise Undone(parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2)).remove)


@change
def neftune(walker, random):
    if not walker.text:
        stop()
    model = walker.model
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0

    def seeded(module, args, output):
        torch.manual_seed(3)

    # The noise is drawn in the hook, for the shape that it is given.
    first = embeddings.register_forward_hook(seeded)
    embeddings.train()
    hook = activate_neftune(model, 5.0)
    if isinstance(hook, nn.Module):
        stop()

    def undo():
        first.remove()
        hook.remove()

    raise Undone(undo)


@change
def input_gradients(walker, random):
    if not walker.text:
        stop()
    walker.model.enable_input_require_grads()
    return walker.model.disable_input_require_grads


# --- modules in the place of others


def put(parent: nn.Module, name: str, new: Any) -> Callable[[], Any]:
    before = getattr(parent, name)
    new = new.to(next(iter(before.parameters()), torch.empty(0)).dtype).train(before.training)
    setattr(parent, name, new)
    return functools.partial(setattr, parent, name, before)


def linear(old: nn.Linear, kind: Any = nn.Linear) -> nn.Linear:
    return kind(old.in_features, old.out_features, bias=old.bias is not None)


class Scaled(nn.Linear):
    """A user's own, as adapters have."""

    def forward(self, value):
        return super().forward(value) * 0.5


class Normed(nn.LayerNorm):
    def forward(self, value):
        return super().forward(value) * 0.5


@change
def linear_anew(walker, random):
    parent, name, module = walker.pick(random, nn.Linear)
    return put(parent, name, linear(module))


@change
def linear_of_another_class(walker, random):
    parent, name, module = walker.pick(random, nn.Linear)
    return put(parent, name, linear(module, Scaled))


@change
def norm_anew(walker, random):
    parent, name, module = walker.pick(random, nn.LayerNorm)
    kind = random.choice([nn.LayerNorm, Normed])
    new = kind(module.normalized_shape, eps=module.eps, bias=module.bias is not None)
    return put(parent, name, new)


@change
def norm_by_rms(walker, random):
    parent, name, module = walker.pick(random, nn.LayerNorm)
    return put(parent, name, nn.RMSNorm(module.normalized_shape))


@change
def dropout_removed(walker, random):
    parent, name, _ = walker.pick(random, nn.Dropout)
    return put(parent, name, random.choice([nn.Identity, nn.Dropout, functools.partial(nn.AlphaDropout, 0.0)])(0.0))


@change
def activation(walker, random):
    kinds = (activations.GELUActivation, nn.GELU, nn.ReLU)
    parent, name, _ = walker.pick(random, kinds)
    return put(parent, name, random.choice([nn.ReLU, nn.GELU, nn.SiLU, activations.NewGELUActivation])())


@change
def embedding_anew(walker, random):
    parent, name, module = walker.pick(random, nn.Embedding)
    return put(parent, name, nn.Embedding(*module.weight.shape, padding_idx=module.padding_idx))


@change
def embedding_that_counts(walker, random):
    _, _, module = walker.pick(random, nn.Embedding)
    before, module.scale_grad_by_freq = module.scale_grad_by_freq, True
    raise Undone(functools.partial(setattr, module, "scale_grad_by_freq", before))


class Speaking(nn.Module):
    """Embeddings of a user's own around the stock ones: one more vector for each row."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.speaker = inner, nn.Embedding(ROWS, size)
        for name in ("word_embeddings", "position_embeddings", "tok_embeddings", "patch_embeddings"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) + self.speaker(torch.arange(ROWS))[:, None]


@change
def embeddings_of_ones_own(walker, random):
    size = walker.parts()[0].fc1.in_features
    raise Undone(put(walker.base, "embeddings", Speaking(walker.base.embeddings, size)))


class Mean(nn.Module):
    def forward(self, states):
        # Behind a row's last token there are zeros, and in a stock model numbers without a meaning.
        return states[:, :1].mean(1)


@change
def pooler(walker, random):
    if getattr(walker.base, "pooler", None) is None:
        stop()
    return put(walker.base, "pooler", random.choice([Mean(), copy.deepcopy(walker.base.pooler)]))


@change
def classifier(walker, random):
    if not isinstance(getattr(walker.model, "classifier", None), nn.Linear):
        stop()
    old = walker.model.classifier
    size = old.in_features
    new = [nn.Identity(), nn.Sequential(nn.Linear(size, 7), nn.Tanh(), nn.Linear(7, 3)), nn.Linear(size, 3)]
    return put(walker.model, "classifier", random.choice(new))


# --- layers


def with_layers(walker: Walker, layers: list[Any]) -> Any:
    adapter, base = find_adapter(walker.model)
    encoder = adapter.encoder(base)
    before = getattr(encoder, adapter.stack)
    setattr(encoder, adapter.stack, nn.ModuleList(layers))
    return functools.partial(setattr, encoder, adapter.stack, before)


def rarely(random: Any, undo: Any) -> Any:
    """Such a change is mostly undone: what is behind it would go by the stock code for ever."""
    if random.random() < 0.7:
        raise Undone(undo)
    return undo


@change
def layers_cut(walker, random):
    layers = list(walker.layers)
    return rarely(random, with_layers(walker, layers[: random.randint(1, len(layers))]))


@change
def layers_reordered(walker, random):
    layers = list(walker.layers)
    random.shuffle(layers)
    return rarely(random, with_layers(walker, layers))


@change
def layers_shared(walker, random):
    layers = list(walker.layers)
    return rarely(random, with_layers(walker, [layers[0], *layers[:-1]]))


@change
def layer_repeated(walker, random):
    layers = list(walker.layers)
    return rarely(random, with_layers(walker, [*layers, random.choice(layers)]))


@change
def layer_skipped(walker, random):
    layers, place = walker.layers, random.randrange(len(walker.layers))
    before = layers[place]
    layers[place] = Skipped()
    raise Undone(functools.partial(layers.__setitem__, place, before))


class Skipped(nn.Module):
    attention_type = "full_attention"

    def forward(self, states, *args, **kwargs):
        return states


@change
def layer_copied(walker, random):
    layers, place = walker.layers, random.randrange(len(walker.layers))
    before = layers[place]
    layers[place] = copy.deepcopy(random.choice(list(layers)))
    return rarely(random, functools.partial(layers.__setitem__, place, before))


@change
def layer_anew(walker, random):
    layers, place = walker.layers, random.randrange(len(walker.layers))
    before = layers[place]
    other = make(type(walker.model).__name__).to(next(before.parameters()).dtype)
    adapter, base = find_adapter(other)
    layers[place] = adapter.layers(base)[place % LAYERS].train(before.training)
    return rarely(random, functools.partial(layers.__setitem__, place, before))


# --- weights


@change
def weights_tied(walker, random):
    found = [module for module in walker.model.modules() if isinstance(module, nn.Linear)]
    first = random.choice(found)
    second = random.choice([m for m in found if m.weight.shape == first.weight.shape and m is not first] or stop())
    before, second.weight = second.weight, first.weight
    return rarely(random, functools.partial(setattr, second, "weight", before))


@change
def data_replaced(walker, random):
    parameter = random.choice(list(walker.model.parameters()))
    parameter.data = parameter.data.flip(0).clone()


@change
def weights_written(walker, random):
    parameter = random.choice(list(walker.model.parameters()))
    with torch.no_grad():
        parameter.mul_(0.9)


@change
def parameter_anew(walker, random):
    _, _, module = walker.pick(random, (nn.Linear, nn.LayerNorm, nn.Embedding))
    name = random.choice([name for name, value in module._parameters.items() if value is not None] or stop())
    setattr(module, name, nn.Parameter(getattr(module, name).detach().flip(0).clone()))


@change
def state_loaded(walker, random):
    state = {name: value.flip(0).clone() if value.ndim else value for name, value in walker.model.state_dict().items()}
    if random.random() < 0.5:
        state = {name: value for name, value in state.items() if random.random() < 0.5}
    walker.model.load_state_dict(state, strict=False, assign=random.random() < 0.5)


@change
def embeddings_resized(walker, random):
    if not walker.text:
        stop()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        walker.model.resize_token_embeddings(random.choice([95, 104]), mean_resizing=False)


@change
def frozen(walker, random):
    _, _, module = walker.pick(random)
    module.requires_grad_(random.random() < 0.4)
    return functools.partial(module.requires_grad_, True)


@change
def frozen_all_but(walker, random):
    word = random.choice(["classifier", "bias", "orm", "layer", "embeddings"])
    for name, parameter in walker.model.named_parameters():
        parameter.requires_grad_(word in name)

    def undo():
        walker.model.requires_grad_(True)

    return undo


@change
def gradients_wanted(walker, random):
    walker.model.requires_grad_(True)


@change
def cast(walker, random):
    dtype = random.choice([torch.bfloat16, torch.double, torch.half])
    walker.model.to(dtype)

    def undo():
        walker.model.float()

    raise Undone(undo)


@change
def cast_in_parts(walker, random):
    dtype = random.choice([torch.bfloat16, torch.double])
    layer = random.choice(list(walker.layers))
    module = random.choice([m for m in layer.modules() if any(True for _ in m.parameters())])
    module.to(dtype)

    def undo():
        module.float()

    raise Undone(undo)


@change
def moved(walker, random):
    walker.model.to("cpu", torch.float32)
    walker.model.apply(lambda module: None)


@change
def pruned_by_torch(walker, random):
    _, _, module = walker.pick(random, nn.Linear)
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        stop()
    prune.l1_unstructured(module, "weight", 0.3)
    raise Undone(functools.partial(prune.remove, module, "weight"))


class Doubled(nn.Module):
    def forward(self, value):
        return value * 1.5


@change
def parametrized(walker, random):
    _, _, module = walker.pick(random, (nn.Linear, nn.LayerNorm, nn.Embedding))
    if module._parameters.get("weight") is None:
        stop()
    how = random.choice(["own", "weight_norm", "spectral"])
    if how == "own" or module.weight.ndim < 2:
        parametrize.register_parametrization(module, "weight", Doubled())
    elif how == "weight_norm":
        parametrizations.weight_norm(module)
    else:
        parametrizations.spectral_norm(module.eval())

    def undo():
        parametrize.remove_parametrizations(module, "weight")

    raise Undone(undo)


# --- forward methods


class Wrapped:
    """What a library puts in place of a module's forward."""

    def __init__(self, inner: Any, factor: float) -> None:
        self.inner, self.factor = inner, factor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return first_tensor(self.inner(*args, **kwargs), lambda leaf: leaf * self.factor)


@change
def forward_wrapped(walker, random):
    module = walker.base if random.random() < 0.1 else walker.pick(random)[2]
    if isinstance(module, nn.ModuleList) or "forward" in vars(module):
        stop()
    module.forward = Wrapped(module.forward, 0.9)

    def undo():
        del module.forward

    raise Undone(undo)


@change
def forward_bound_to_the_instance(walker, random):
    module = walker.pick(random, within=random.choice(list(walker.layers)))[2]
    if "forward" in vars(module):
        stop()
    stock = find_adapter(walker.model)[0]
    del stock
    kind = type(module)
    own = getattr(kind, "_ticketops_stock", kind).forward

    def forward(self, *args, **kwargs):
        return first_tensor(own(self, *args, **kwargs), lambda leaf: leaf * 0.9)

    module.forward = types.MethodType(forward, module)

    def undo():
        del module.forward

    raise Undone(undo)


@change
def class_patched(walker, random):
    module = walker.pick(random, within=random.choice(list(walker.layers)))[2]
    kind = getattr(type(module), "_ticketops_stock", type(module))
    before = kind.forward

    @functools.wraps(before)
    def forward(self, *args, **kwargs):
        return first_tensor(before(self, *args, **kwargs), lambda leaf: leaf * 0.9)

    # The other model is of the same class: each is looked at with its own replacement in force.
    kind.forward = forward

    def undo():
        kind.forward = before

    raise Undone(undo)


# --- copies


@change
def copied(walker, random):
    walker.model = copy.deepcopy(walker.model)


@change
def pickled(walker, random):
    walker.model = pickle.loads(pickle.dumps(walker.model))


@change
def saved_by_torch(walker, random):
    buffer = io.BytesIO()
    torch.save(walker.model, buffer)
    buffer.seek(0)
    walker.model = torch.load(buffer, weights_only=False)


@change
def patched_again(walker, random):
    if walker.stock:
        return
    if walker.handle is not None:
        walker.handle.revert()
    walker.options = {"unpad": random.random() < 0.7, "bucket": None}
    try:
        handle = ticketops.patch(walker.model, **walker.options)
    except UnsupportedError as error:
        raise Refused(str(error)) from error
    handle.apply(walker.ticket if walker.ticket is not None and handle.num_layers == LAYERS else None)


class Refused(Exception):
    """The model goes on in its stock code."""


@change
def checkpointing(walker, random):
    if random.random() < 0.3:
        walker.model.gradient_checkpointing_disable()
        return None
    walker.model.train()
    walker.model.gradient_checkpointing_enable({"use_reentrant": random.random() < 0.5})
    return walker.model.gradient_checkpointing_disable


@change
def attention_function(walker, random):
    before = walker.model.config._attn_implementation
    walker.model.set_attn_implementation(random.choice(["eager", "sdpa"]))
    return functools.partial(walker.model.set_attn_implementation, before)


@change
def configuration(walker, random):
    config = walker.model.config
    name = random.choice(["output_hidden_states", "output_attentions", "return_dict"])
    if name == "output_attentions":
        walker.model.set_attn_implementation("eager")
    before = getattr(config, name)
    setattr(config, name, not before)
    return functools.partial(setattr, config, name, before)


# --- tickets


def draw_ticket(random: random.Random) -> Ticket:
    generator = torch.Generator().manual_seed(random.randrange(1000))
    masks = [torch.rand(*shape, generator=generator) > 0.4 for shape in ((LAYERS, HEADS), (LAYERS,), (LAYERS, 64))]
    return Ticket(*masks[:2], neuron_mask=masks[2] if random.random() < 0.4 else None)


@change
def ticket(walker, random):
    new = draw_ticket(random)
    if not walker.stock and walker.handle is None:
        stop()
    # Where layers were replaced, the ticket is refused.
    walker.ticket = new
    if not walker.stock:
        walker.handle.apply(new)


@change
def ticket_off(walker, random):
    if walker.handle is not None:
        walker.handle.apply(None)
    walker.ticket = None


# --- looks


def run(walker: Walker, **more: Any) -> Any:
    return walker.model(**(walker.inputs() | more))


def real(walker: Walker, output: Any, padding: str | None = None) -> Any:
    return at_tokens(plain(output), walker.inputs(padding).get("attention_mask"))


@look
def without_gradients(walker, random):
    with random.choice([torch.no_grad, torch.inference_mode])():
        return real(walker, run(walker))


@look
def autocast(walker, random):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return [leaf.bfloat16() for leaf in floating(real(walker, run(walker)))]


@look
def embeddings_given(walker, random):
    if not walker.text:
        stop()
    inputs = walker.inputs()
    embeds = walker.model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    output = real(walker, walker.model(inputs_embeds=embeds, **inputs))
    loss = loss_of(output)
    if not loss.requires_grad:
        return output
    return output, at_tokens(torch.autograd.grad(loss, embeds)[0], inputs.get("attention_mask"))


@look
def positions_given(walker, random):
    inputs = walker.inputs()
    if not walker.text or "position_ids" not in accepted(walker):
        stop()
    positions = torch.arange(WIDTH).flip(0)[None] + 2
    if random.random() < 0.5:
        positions = positions.expand(ROWS, -1)
    return real(walker, walker.model(**inputs, position_ids=positions))


@look
def types_given(walker, random):
    if "token_type_ids" not in accepted(walker) or getattr(walker.model.config, "type_vocab_size", 0) < 2:
        stop()
    kinds = torch.arange(WIDTH)[None] % 2
    if random.random() < 0.5:
        kinds = kinds.expand(ROWS, -1).contiguous()
    return real(walker, run(walker, token_type_ids=kinds))


def accepted(walker: Walker) -> Any:
    import inspect

    return inspect.signature(walker.model.forward).parameters


@look
def positional(walker, random):
    return real(walker, walker.model(*walker.inputs().values()))


@look
def masks_of_other_kinds(walker, random):
    if not walker.text:
        stop()
    inputs = walker.inputs(random.choice(["right", "left", "holes"]))
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = random.choice([mask.bool(), mask.float(), mask.int(), mask[:, None, None].bool()])
    inputs["attention_mask"] = (
        inputs["attention_mask"].expand(-1, -1, WIDTH, -1)
        if inputs["attention_mask"].ndim == 4
        else inputs["attention_mask"]
    )
    return at_tokens(plain(walker.model(**inputs)), mask)


@look
def outputs_wanted(walker, random):
    return real(walker, run(walker, **{random.choice(["output_hidden_states", "output_attentions"]): True}))


@look
def tuples(walker, random):
    return real(walker, run(walker, return_dict=False, output_hidden_states=random.random() < 0.5))


@look
def written_into(walker, random):
    output = run(walker, output_hidden_states=True)
    first = floating(plain(output))[0]
    first.mul_(2)
    first[0] += 1
    return real(walker, output)


@look
def kept_outputs(walker, random):
    with torch.no_grad():
        kept = run(walker)
        for seed in (1, 2):
            walker.model(**walker.inputs(seed=seed))
    return real(walker, kept)


@look
def two_passes(walker, random):
    outputs = [
        at_tokens(plain(walker.model(**b)), b.get("attention_mask")) for b in (walker.inputs(), walker.inputs(seed=1))
    ]
    loss = sum(map(loss_of, outputs))
    return outputs, gradients(walker, loss)


def gradients(walker: Walker, loss: Tensor, **options: Any) -> Any:
    wanted = [p for p in walker.model.parameters() if p.requires_grad]
    if not wanted or not loss.requires_grad:
        stop()
    found = torch.autograd.grad(loss, wanted, allow_unused=True, **options)
    return Scaled_([torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)])


class Scaled_(list):
    """Gradients, compared on the scale of the largest."""


@look
def graph_kept(walker, random):
    loss = loss_of(real(walker, run(walker)))
    gradients(walker, loss, retain_graph=True)
    return gradients(walker, loss)


@look
def backward_in_a_backward(walker, random):
    """Another pass and its backward pass in a hook of the first one's."""
    found = []
    output = real(walker, run(walker))

    def inner(gradient):
        with torch.enable_grad():
            found.append(gradients(walker, loss_of(real(walker, run(walker)))))

    tensors = [leaf for leaf in floating(output) if leaf.requires_grad]
    if not tensors:
        stop()
    tensors[0].register_hook(inner)
    outer = gradients(walker, loss_of(output))
    return outer, found


@look
def second_derivatives(walker, random):
    parameters = [p for p in walker.model.parameters() if p.requires_grad]
    loss = loss_of(real(walker, run(walker)))
    if not parameters or not loss.requires_grad:
        stop()
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    penalty = sum(g.double().square().sum() for g in first if g is not None)
    return gradients(walker, penalty)


REFUSABLE.add("second_derivatives")


@look
def accumulated(walker, random):
    walker.model.zero_grad(set_to_none=random.random() < 0.5)
    for seed in range(2):
        batch = walker.inputs(seed=seed)
        loss = loss_of(at_tokens(plain(walker.model(**batch)), batch.get("attention_mask")))
        if not loss.requires_grad:
            stop()
        loss.backward()
    found = Scaled_(torch.zeros_like(p) if p.grad is None else p.grad for p in walker.model.parameters())
    walker.model.zero_grad(set_to_none=random.random() < 0.5)
    return found


@look
def optimized(walker, random):
    kind = random.choice(
        [
            functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-2, weight_decay=0.1),
            functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
            functools.partial(torch.optim.Adagrad, lr=1e-3, eps=1e-1),
        ]
    )
    parameters = list(walker.model.parameters())
    with_closure = random.random() < 0.5
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = kind(parameters)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(real(walker, run(walker)))
        if loss.requires_grad:
            loss.backward()
        return loss

    for _ in range(2):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    walker.model.zero_grad()
    if walker.stock:
        keep_still(walker, parameters, before)
    return Scaled_(parameter.detach().clone() for parameter in parameters)


def keep_still(walker: Walker, parameters: list[Any], before: list[Tensor]) -> None:
    """Puts back what a ticket says no optimizer moves."""
    if walker.ticket is None:
        return
    old = {id(parameter): value for parameter, value in zip(parameters, before, strict=True)}
    ticket = walker.ticket
    masks = (ticket.head_mask, ticket.ffn_mask, kept_neurons(ticket, 64))
    for parts, heads, ffn, neurons in zip(walker.parts(), *masks, strict=False):
        in_qkv, in_fc1 = parts.repeats
        rows, idle = (~heads).repeat_interleave(12).repeat(in_qkv), (~neurons).repeat(in_fc1)
        places = [(linear, name, rows, 0) for linear in parts.qkv for name in ("weight", "bias")]
        places += [(parts.output, "weight", ~heads.repeat_interleave(12), 1), (parts.fc2, "weight", ~neurons, 1)]
        places += [(linear, name, idle, 0) for linear in parts.first for name in ("weight", "bias")]
        places += [] if ffn else [(parts.fc2, "bias", torch.ones(1).bool(), None)]
        for linear_, name, gone, dim in places:
            parameter = getattr(linear_, name)
            if parameter is None:
                continue
            value = old[id(parameter)]
            with torch.no_grad():
                if dim is None:
                    parameter.copy_(value)
                elif dim == 0:
                    parameter[gone] = value[gone]
                else:
                    parameter[:, gone] = value[:, gone]


@look
def importance(walker, random):
    """Recorded, against |dL/d mask| of the stock twin."""
    batch, one = walker.inputs(), random.choice(["example", "batch"])

    def mean_loss():
        output = floating(at_rows(plain(walker.model(**batch)), batch.get("attention_mask")))
        return sum(leaf.double().square().flatten(1).sum(1).mean() for leaf in output)

    if not walker.stock:
        if walker.handle is None:
            stop()
        with walker.handle.record_importance(one) as found:
            loss = mean_loss()
            if not loss.requires_grad:
                stop()
            loss.backward()
        walker.model.zero_grad()
        return Scaled_([found.head.double()]), Scaled_([found.ffn.double()])
    ones = [(torch.ones(ROWS, HEADS, requires_grad=True), torch.ones(ROWS, requires_grad=True)) for _ in walker.layers]
    hooks = []
    for parts, (heads, ffn) in zip(walker.parts(), ones, strict=True):

        def scale_heads(_, args, by=heads):
            return ((args[0].unflatten(-1, (HEADS, -1)) * by[:, None, :, None]).flatten(2),)

        def scale_ffn(_, args, output, by=ffn):
            return output * by[:, None, None]

        hooks += [parts.output.register_forward_pre_hook(scale_heads), parts.fc2.register_forward_hook(scale_ffn)]
    try:
        loss = mean_loss()
        if not loss.requires_grad:
            stop()
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        walker.model.zero_grad()
    scores = []
    for masks in zip(*ones, strict=True):
        terms = torch.stack([torch.zeros_like(m) if m.grad is None else m.grad for m in masks], 1).double()
        terms = (ROWS * terms).abs().mean(0) if one == "example" else terms.sum(0).abs()
        scores.append(Scaled_([terms]))
    return tuple(scores)


def at_rows(output: Any, mask: Tensor | None) -> Any:
    """A result with zeros at padding, each row for itself."""

    def zeroed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and mask is not None and leaf.shape[:2] == mask.shape:
            return leaf.masked_fill(~mask.bool().view(*mask.shape, *[1] * (leaf.ndim - 2)), 0)
        return leaf

    return pytree.tree_map(zeroed, output)


REFUSABLE.add("importance")


@look
def shrunk(walker, random):
    """A small model computes what the masked one does."""
    ticket = walker.ticket
    if ticket is None:
        stop()
    if walker.stock:
        with torch.no_grad():
            return real(walker, run(walker))
    small = ticketops.shrink(copy.deepcopy(walker.model), ticket)
    if random.random() < 0.5 and (handle := find_handle(small)) is not None:
        handle.revert()
    with torch.no_grad():
        return at_tokens(plain(small(**walker.inputs())), walker.inputs().get("attention_mask"))


REFUSABLE.add("shrunk")


@look
def saved(walker, random):
    import tempfile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walker.model.save_pretrained(folder)
        loaded = (
            type(walker.model).from_pretrained(folder)
            if walker.stock
            else getattr(__import__("transformers"), type(walker.model).__name__).from_pretrained(folder)
        )
    ours = {name: value for name, value in walker.model.state_dict().items() if "parametrizations" not in name}
    theirs = loaded.state_dict()
    return sorted(theirs) == sorted(ours), all(torch.equal(theirs[n], ours[n]) for n in theirs if n in ours)


@look
def replicated(walker, random):
    replica = walker.model._replicate_for_data_parallel()
    modules = dict(walker.model.named_modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules.values()}
    for module in modules.values():
        twin = copies[id(module)]
        for name, child in module.named_children():
            twin._modules[name] = copies[id(child)]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter * 1)
                twin._former_parameters[name] = getattr(twin, name)
    del replica
    replica = copies[id(walker.model)]
    output = real(walker, replica(**walker.inputs()))
    return output, gradients(walker, loss_of(output))


@look
def threads(walker, random):
    """Two threads, one in inference and one with gradients."""
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            with torch.set_grad_enabled(number % 2 == 0):
                batch = walker.inputs(seed=number)
                for _ in range(3):
                    output = at_tokens(plain(walker.model(**batch)), batch.get("attention_mask"))
                found[number] = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
        except Exception as error:
            found[number] = error

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each in found.values():
        if isinstance(each, Exception):
            raise each
    return found[0], found[1]


@look
def traced(walker, random):
    batches = [walker.inputs("none", seed) for seed in (0, 1)]
    name = next(iter(batches[0]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(
            lambda value: floating(plain(walker.model(**{name: value})))[0], (batches[0][name],), check_trace=False
        )
        return trace(batches[1][name])


@look
def exported(walker, random):
    batches = [walker.inputs("none", seed) for seed in (0, 1)]
    if random.random() < 0.8:
        stop()
    training = walker.model.training
    program = torch.export.export(walker.model.eval(), (), batches[0])
    walker.model.train(training)
    return plain(program.module()(**batches[1]))


@look
def compiled(walker, random):
    if random.random() < 0.9:
        stop()
    # What was compiled for a model without hooks would serve one that has some now.
    torch.compiler.reset()
    with torch.no_grad():
        return real(walker, torch.compile(walker.model, backend="eager")(**walker.inputs()))


@look
def functional(walker, random):
    parameters = {name: value.detach().clone() * 0.9 for name, value in walker.model.named_parameters()}
    batch = walker.inputs()
    output = torch.func.functional_call(walker.model, parameters, (), batch, tie_weights=True)
    return at_tokens(plain(output), batch.get("attention_mask"))


@look
def func_grad(walker, random):
    parameters = {name: value.detach() for name, value in walker.model.named_parameters()}
    batch = walker.inputs()

    def loss(parameters):
        return loss_of(real(walker, torch.func.functional_call(walker.model, parameters, (), batch)))

    return Scaled_(torch.func.grad(loss)(parameters).values())


@look
def func_jvp(walker, random):
    if not walker.text:
        stop()
    batch = walker.inputs()
    embeds = walker.model.get_input_embeddings()(batch.pop("input_ids")).detach()

    def outputs(embeds):
        return floating(at_tokens(plain(walker.model(inputs_embeds=embeds, **batch)), batch.get("attention_mask")))[0]

    return torch.func.jvp(outputs, (embeds,), (torch.ones_like(embeds),))


@look
def func_vmap(walker, random):
    if not walker.text:
        stop()
    ids = walker.inputs("none")["input_ids"]
    return torch.func.vmap(lambda row: floating(plain(walker.model(input_ids=row[None])))[0][0])(ids)


@look
def interpolated(walker, random):
    """As captum's integrated gradients of a layer: the embeddings' result is replaced in a hook."""
    batch, found = walker.inputs(), []

    def replace(module, args, output):
        found.append((output.detach() * 0.5).requires_grad_())
        return found[-1]

    hook = walker.base.embeddings.register_forward_hook(replace)
    try:
        output = at_tokens(plain(walker.model(**batch)), batch.get("attention_mask"))
    finally:
        hook.remove()
    loss = loss_of(output)
    return output, at_tokens(torch.autograd.grad(loss, found[-1])[0], batch.get("attention_mask"))


@look
def parameters_asked(walker, random):
    """What others read off a model."""
    model = walker.model
    names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    classes = [(type(m).__name__, type(m).__module__, m.training) for m in model.modules()]
    return names, list(model.state_dict()), classes, repr(model), model.num_parameters(), str(model.dtype)


# --- the walk


class Apart(AssertionError):
    """The two models are not the same."""


def tolerance(value: Tensor) -> float:
    return 200 * torch.finfo(value.dtype).eps


def same(got: Any, want: Any, coarse: float = 1.0, what: str = "") -> None:
    """Holds results against each other: tensors to rounding on the scale of the largest value."""
    if isinstance(want, Scaled_):
        scale = max([leaf.abs().max().item() for leaf in want if leaf.numel()] + [1e-12])
        pairs = list(zip(got, want, strict=True))
    elif isinstance(want, (list, tuple)):
        if len(got) != len(want):
            raise Apart(f"{what}: {len(got)} for {len(want)}")
        for place, (a, b) in enumerate(zip(got, want, strict=True)):
            same(a, b, coarse, f"{what}[{place}]")
        return
    elif isinstance(want, dict):
        if list(got) != list(want):
            raise Apart(f"{what}: {list(got)} for {list(want)}")
        for name, value in want.items():
            same(got[name], value, coarse, f"{what}.{name}")
        return
    elif isinstance(want, Tensor):
        scale, pairs = None, [(got, want)]
    else:
        if got != want:
            raise Apart(f"{what}: {got!r} for {want!r}")
        return
    for place, (a, b) in enumerate(pairs):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Apart(f"{what}: {a.dtype} {list(a.shape)} for {b.dtype} {list(b.shape)}")
        if not b.numel() or not b.is_floating_point():
            if not torch.equal(a, b):
                raise Apart(f"{what}: other whole numbers")
            continue
        # Infinite and undefined numbers are to be in the same places. The stock code may overflow alone, as masks of
        # eager attention do in float16 and float64.
        if not torch.logical_or(a.isfinite(), ~b.isfinite()).all():
            raise Apart(
                f"{what}[{place}]: {int((~a.isfinite()).sum())} numbers not finite for {int((~b.isfinite()).sum())}"
            )
        a, b = a[b.isfinite()].detach().double(), b[b.isfinite()].detach().double()
        size = b.abs().max().item() if scale is None and b.numel() else (scale or 0.0)
        apart = (a - b).abs().max().item() if b.numel() else 0.0
        # Where results have become small, those between them have not.
        if apart > coarse * max(size, 0.2):
            raise Apart(f"{what}[{place}]: apart by {apart:.2g} on a scale of {size:.2g}")


def gradients_left(walker: Walker) -> Any:
    found = [parameter.grad for parameter in walker.model.parameters()]
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(walker.model.parameters(), found, strict=True))
    # What a ticket prunes has no gradient here and zeros in the twin.
    return Scaled_(zeros), None if walker.ticket is not None else [g is None for g in found]


def observe(walker: Walker) -> Any:
    """A training step's forward and backward pass."""
    walker.seen.clear()
    walker.model.zero_grad()
    batch = walker.inputs()
    mask = batch.get("attention_mask")
    torch.manual_seed(1)
    output = at_tokens(plain(walker.model(**batch)), mask)
    loss = loss_of(output)
    if loss.requires_grad:
        loss.backward()
    found = output, *gradients_left(walker), at_tokens(list(walker.seen), mask)
    walker.model.zero_grad()
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, found)


def attempt(walker: Walker, masks: bool, function: Callable[[], Any]) -> tuple[str, Any]:
    """What comes of something that is done to a model: ("done", result), ("refused", words) or ("raised", error)."""
    try:
        with masked(walker) if masks else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "done", function()
    except Stopped:
        return "stopped", None
    except Refused as error:
        return "stock", str(error)
    except REFUSALS as error:
        return "refused", str(error)
    except Undone as undone:
        return "undone", undone.undo
    except Exception as error:
        return "raised", error


def perform(walker: Walker, name: str, choice: int) -> list[tuple[str, Any]]:
    """Does one operation to one model, and looks at it behind it; undoes what is to be undone, and looks again."""
    torch.manual_seed(choice)
    generator, is_look = random.Random(choice), name in LOOKS
    kind, result = attempt(walker, is_look, lambda: OPERATIONS[name](walker, generator))
    outcomes = [(kind, result if is_look or kind in ("raised", "refused", "stock") else None)]
    if kind == "stopped":
        return outcomes
    outcomes.append(attempt(walker, True, lambda: observe(walker)))
    undo = result if kind == "undone" else None
    if undo is None and kind == "done" and not is_look and result is not None and generator.random() < 0.4:
        undo = result
    if undo is not None:
        outcomes.append((attempt(walker, False, undo)[0], None))
        outcomes.append(attempt(walker, True, lambda: observe(walker)))
    return outcomes


def coarseness(model: nn.Module) -> float:
    """How far apart results may be, on the scale of the largest."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(
        200 * torch.finfo(kind).eps if kind in (torch.float, torch.double) else 60 * torch.finfo(kind).eps
        for kind in kinds
    )


def walk(name: str, unpad: bool, bucket: int | None, steps: list[tuple[str, int]], counts: Counter) -> None:
    """Does the same to a patched model and to its stock twin; after each step they are the same, or it was refused."""
    both = [Walker(name, stock, unpad, bucket) for stock in (False, True)]
    ours, twin = both
    for step, choice in steps:
        ran = [perform(walker, step, choice) for walker in both]
        counts["steps"] += 1
        hold(ours, twin, step, ran, counts)
        if step == "optimized" and all(kind == "done" for outcomes in ran for kind, _ in outcomes):
            # The same to rounding, which further steps would blow up.
            with torch.no_grad():
                for parameter, other in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
                    parameter.copy_(other)
        if any(kind == "refused" for kind, _ in ran[0]) and ours.ticket is not None:
            # The remedy that the message names.
            for walker in both:
                ticket_off(walker, None)
            hold(
                ours,
                twin,
                f"no ticket after {step}",
                [[attempt(w, True, lambda w=w: observe(w))] for w in both],
                counts,
            )


def hold(ours: Walker, twin: Walker, step: str, ran: list[Any], counts: Counter) -> None:
    got, want = ran
    # Both round to bfloat16 wherever they do; DeBERTa's scores are sums of three products.
    coarse = max(coarseness(ours.model), 0.1 if step == "autocast" else 0)
    if step in ("cast", "cast_in_parts"):
        coarse = max(coarse, 0.5)
    if len(got) != len(want):
        raise Apart(f"{step}: {got} for {want}")
    for (kind, value), (stock_kind, wanted) in zip(got, want, strict=True):
        if kind in ("refused", "stock") and (stock_kind != "raised" or kind == "refused"):
            allowed = ours.ticket is not None or step in REFUSABLE or stock_kind == "raised"
            if kind == "refused" and not allowed and not any(each in value for each in ALWAYS_REFUSED):
                raise Apart(f"{step} was refused without a ticket: {value}")
            counts[words(value)] += 1
            counts["refused"] += kind == "refused"
            if kind == "refused":
                return
            continue
        if kind != stock_kind:
            error = value if isinstance(value, Exception) else wanted if isinstance(wanted, Exception) else None
            both = f"{kind} ({value!r:.300}) where the stock model is {stock_kind} ({wanted!r:.300})"
            raise Apart(f"{step}: {both}") from error
        if kind == "raised":
            counts[f"both raised {type(wanted).__name__}"] += 1
            continue
        if kind == "done":
            same(value, wanted, coarse, step)


def words(message: str) -> str:
    """A message without what differs from place to place."""
    import re

    return re.sub(r"layer \d+|\d+", "N", message)[:110]
