"""Recording of importance, |dL/d mask|, from backward passes; passes that belong to the same examples are combined."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ticketops.errors import UnsupportedError
from ticketops.models.indices import Indices
from ticketops.models.state import LayerState
from ticketops.tickets import Importance

#: Partials of a forward pass: (kind of structure, layer) -> [B, structures] or [B].
_Partials = dict[tuple[str, int], Tensor]


class Recording:
    """Collects importance partials and adds them to an Importance.

    Several forward passes can share one backward pass, such as those of the two sentences of a pair. A structure's mask
    is then one number per example for all of them. So the signed partials of forward passes that share a backward pass
    are added, example by example, before the absolute value is taken; and so are the partials that one forward pass
    gets from several backward passes.

    Args:
        importance: Importance to add to.
        skip_overflow: True skips batches with gradients that are not finite. The check waits for the device.
    """

    def __init__(self, importance: Importance, skip_overflow: bool) -> None:
        self.importance = importance
        self._skip_overflow = skip_overflow
        self._groups: list[_Group] = []

    def start(self, layers: list[LayerState], batch: int, device: torch.device) -> "Pass":
        """Starts the recording of a forward pass.

        Args:
            layers: states of the model's layers.
            batch: number of rows of the batch.
            device: device of the model.
        """
        # Outside a backward pass, the earlier backward passes are complete.
        if torch._C._current_graph_task_id() < 0:
            self.settle()
        return Pass(self, layers, batch, device)

    def join(self, one: "Pass", task: int) -> None:
        """Records that a backward pass has reached a forward pass.

        Args:
            one: the forward pass.
            task: autograd's id of the backward pass.
        """
        if any(one in group.passes and task in group.tasks for group in self._groups):
            return
        mine = [group for group in self._groups if one in group.passes or task in group.tasks]
        joined = _Group([*dict.fromkeys([p for group in mine for p in group.passes] + [one])], {task})
        joined.tasks.update(*(group.tasks for group in mine))
        self._groups = [group for group in self._groups if group not in mine] + [joined]
        if len(joined.passes) > 1:
            self._check(joined)

    def _check(self, group: "_Group") -> None:
        if self.importance.granularity == "token":
            raise UnsupportedError(
                "importance per token of several forward passes before one backward pass has no meaning, since their "
                'tokens are not the same: record with granularity "example" or "batch"'
            )
        if self.importance.granularity == "example" and sum(each.within >= 0 for each in group.passes) > 1:
            raise UnsupportedError(
                "forward passes within one backward pass, as cached losses make one for each mini-batch, do not say "
                'whose examples they have: take the loss that is not cached, or record with granularity "batch"'
            )
        rows = sorted({each.batch for each in group.passes})
        if len(rows) > 1 and self.importance.granularity == "example":
            raise UnsupportedError(
                f"forward passes of {' and '.join(map(str, rows))} rows share a backward pass, so their rows are not "
                'the same examples: give them the same rows in the same order, or record with granularity "batch"'
            )

    def settle(self) -> None:
        """Adds the partials of all backward passes so far to the Importance."""
        groups, self._groups = self._groups, []
        for group in groups:
            self._add(group.partials(self.importance.granularity == "batch"))

    def _add(self, partials: _Partials) -> None:
        if self._skip_overflow and not torch.stack([each.isfinite().all() for each in partials.values()]).all():
            self.importance.skipped += 1
            return
        for (kind, layer), each in partials.items():
            add: Callable[..., None] = getattr(self.importance, f"add_{kind}")
            options = {} if kind == "neuron" else {"defer": True}
            add(layer, signed=each, absolute=each, **options)


class _Group:
    """Forward passes that are combined because they share backward passes, and the ids of these."""

    def __init__(self, passes: "list[Pass]", tasks: set[int]) -> None:
        self.passes, self.tasks = passes, tasks

    def partials(self, per_batch: bool) -> _Partials:
        """Returns the combined partials of all passes."""
        first, *others = [each.collect() for each in self.passes]
        for other in others:
            for key, value in other.items():
                mine = first.get(key)
                if mine is None:
                    first[key] = value
                elif per_batch:
                    # The numbers of rows may differ; the rows are summed later.
                    first[key] = torch.cat([mine, value])
                else:
                    first[key] = mine + value
        return first


class Pass:
    """The importance partials of one forward pass.

    Attributes:
        batch: number of rows of the batch.
        within: autograd's id of the backward pass during which the forward pass began; negative for none.
        head_importance, ffn_importance, neuron_importance: layer -> leaf tensor whose gradient is the partials.
    """

    def __init__(self, recording: Recording, layers: list[LayerState], batch: int, device: torch.device) -> None:
        self.recording, self.batch, self._device = recording, batch, device
        self.within: int = torch._C._current_graph_task_id()
        self._task: int | None = None
        self._partials: _Partials = {}
        #: Keys and shapes of pruned structures. They have no gradient, and score 0 once other structures have one.
        self._idle: list[tuple[tuple[str, int], tuple[int, ...]]] = []
        # For layers that compute some structures only: the indices of these, and the number of all structures.
        self._spread: dict[tuple[str, int], tuple[Tensor, int]] = {}
        importance = recording.importance
        self.head_importance = {
            state.index: leaf
            for state in layers
            if (leaf := self._leaf("head", state, state.kept.numbers, importance.num_heads)) is not None
        }
        self.ffn_importance = {
            state.index: leaf
            for state in layers
            if (leaf := self._leaf("ffn", state, None if state.kept.ffn else Indices([]), None)) is not None
        }
        self.neuron_importance: dict[int, Tensor] = {}
        if importance.num_neurons is not None:
            self.neuron_importance = {
                state.index: leaf
                for state in layers
                if (leaf := self._leaf("neuron", state, state.kept.neuron_numbers, importance.num_neurons)) is not None
            }

    def _leaf(self, kind: str, state: LayerState, numbers: Indices | None, total: int | None) -> Tensor | None:
        """Makes a leaf tensor, with a hook that collects its gradient, the importance partials.

        Args:
            kind: kind of structure.
            state: state of the layer.
            numbers: indices of the computed structures; None for all.
            total: number of the layer's structures; None if its partials are [B], as for an FFN.

        Returns:
            The leaf; None if no structure is computed.
        """
        key = kind, state.index
        shape = (self.batch,) if total is None else (self.batch, total)
        if numbers is not None:
            if not numbers:
                self._idle.append((key, shape))
                return None
            assert total is not None
            self._spread[key] = numbers.on(self._device), total
            shape = (self.batch, len(numbers))
        # Uninitialised, because its values are never read.
        leaf = torch.empty(shape, dtype=torch.float32, device=self._device).requires_grad_()
        leaf.register_post_accumulate_grad_hook(partial(self._take, key))
        return leaf

    def _take(self, key: tuple[str, int], leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        # Without `_task`, the backward pass did not go through the model's output (see `follow`).
        self._join(torch._C._current_graph_task_id() if self._task is None else self._task)
        earlier = self._partials.get(key)
        self._partials[key] = gradient if earlier is None else earlier + gradient

    @torch.compiler.disable
    def follow(self, output: Tensor) -> None:
        """Registers a hook on the model's output that notes the id of each backward pass. Reentrant checkpointing
        computes the layers' gradients in nested backward passes with ids of their own; the id at the output identifies
        them.

        Args:
            output: output of the whole model.
        """
        if output.requires_grad:
            output.register_hook(self._arrive)

    def _arrive(self, _: Tensor) -> None:
        self._task = torch._C._current_graph_task_id()
        self._join(self._task)

    def _join(self, task: int) -> None:
        self.recording.join(self, task)
        if self.within >= 0:
            # The gradients of all passes that began there are parts of one loss's.
            self.recording.join(self, self.within)

    def collect(self) -> _Partials:
        """Returns the partials so far, expanded to all structures of their layer, and clears them."""
        found = {}
        for key, value in self._partials.items():
            if key in self._spread:
                index, total = self._spread[key]
                value = value.new_zeros(len(value), total).index_copy_(1, index, value)
            found[key] = value
        if found:
            for key, shape in self._idle:
                found[key] = torch.zeros(shape, device=self._device)
        self._partials = {}
        return found
