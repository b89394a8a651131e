"""How kernels are launched past Triton's own lookup, with stand-ins for Triton and the GPU."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.backends.compiler import BaseBackend

from ticketops.ops import private
from ticketops.ops import triton_common as common
from ticketops.ops.triton_configs import Tile

TILE = Tile(16, 16, 4, 1)


class Kernel:
    """A kernel of two tensors, a number and a constant, which notes what Triton and what its compiled form is given."""

    def __init__(self) -> None:
        self.fn = object()
        self.compiled: list[dict[str, Any]] = []
        self.run: list[tuple[Any, ...]] = []
        # In an order of their own; where p_spans begins does not matter.
        self.params = [
            SimpleNamespace(name=name, do_not_specialize_on_alignment=name == "p_spans", is_constexpr=name == "D")
            for name in ("p_x", "tokens", "p_spans", "D")
        ]

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compile(**arguments: Any) -> Any:
            self.compiled.append(arguments)
            return SimpleNamespace(run=lambda *given: self.run.append(given), function="f", packed_metadata="m")

        return compile


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(common, "INTERPRETED", False)
    for name in ("_compiled", "_launched"):
        monkeypatch.setattr(common, name, {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(private, "raw_stream", lambda device: 77)
    return Kernel()


def arguments(**others: Any) -> dict[str, Any]:
    return {"D": 8, "p_x": torch.zeros(64), "p_spans": torch.zeros(8, dtype=torch.int32), "tokens": 5, **others}


def test_the_second_launch_runs_what_the_first_compiled(kernel):
    common.launch(kernel, 3, TILE, **arguments())
    assert (len(kernel.compiled), kernel.run) == (1, [])
    assert kernel.compiled[0]["num_warps"] == 4
    again = arguments()
    common.launch(kernel, 9, TILE, **again)
    assert len(kernel.compiled) == 1
    # Grid, stream, handles, no hooks, and the arguments in the kernel's order with tensors as addresses.
    addresses = (again["p_x"].data_ptr(), 5, again["p_spans"].data_ptr(), 8)
    assert kernel.run == [(9, 1, 1, 77, "f", "m", None, None, None, *addresses)]


@pytest.mark.parametrize(
    "other",
    [
        {"D": 16},
        {"tokens": 1},
        {"tokens": 32},
        {"tokens": 1 << 31},
        {"tokens": 1 << 63},
        {"tokens": 5.5},
        {"p_x": torch.zeros(64, dtype=torch.float16)},
        {"p_x": torch.zeros(65)[1:]},
        {"p_spans": None},
    ],
    ids=["constant", "one", "sixteens", "64 bits", "unsigned", "float", "dtype", "alignment", "none"],
)
def test_what_triton_may_compile_anew_goes_to_triton(kernel, other):
    for given in (arguments(), arguments(**other), arguments(**other)):
        common.launch(kernel, 3, TILE, **given)
    assert (len(kernel.compiled), len(kernel.run)) == (2, 1)
    common.launch(kernel, 3, Tile(32, 16, 4, 1), **arguments())
    assert len(kernel.compiled) == 3


@pytest.mark.parametrize("others", [(5, 7, 1000), (16, 32, 1 << 20), (1.5, 2.5), (-3, 0x7FFFFFFF)])
def test_what_triton_does_not_ask_of_a_number_is_no_reason_to_ask_it(kernel, others):
    for tokens in others * 2:
        common.launch(kernel, 3, TILE, **arguments(tokens=tokens))
    assert len(kernel.compiled) == 1
    assert [given[10] for given in kernel.run] == list((others * 2)[1:])


def test_triton_asks_no_more_of_a_number():
    # Triton's own answers, of the version that is installed.
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    near = [n + d for n in (0, 16, 1 << 31, -(1 << 31), 1 << 40, 1 << 63) for d in (-16, -1, 0, 1, 16)]
    plan = common._Plan(None, [], None, lambda values: None, [0])
    answers: dict[Any, set[Any]] = {}
    for number in (*near, 0.5, 1.0, True, False):
        answers.setdefault(plan.asked((number,)), set()).add(specialize(BaseBackend, number, False, True, True))
    assert all(len(each) == 1 for each in answers.values())


def test_where_alignment_does_not_matter_it_is_not_looked_at(kernel):
    for spans in (torch.zeros(8, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)[1:]):
        common.launch(kernel, 3, TILE, **arguments(p_spans=spans))
    assert (len(kernel.compiled), len(kernel.run)) == (1, 1)


def test_a_profilers_hook_is_left_to_triton(kernel, monkeypatch):
    monkeypatch.setattr(common.triton.knobs.runtime.launch_enter_hook, "calls", [print])
    for _ in range(2):
        common.launch(kernel, 3, TILE, **arguments())
    assert (len(kernel.compiled), kernel.run) == (2, [])


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(common, "MOST_LAUNCHED", 4)
    for tokens in range(2, 12):
        common.launch(kernel, 3, TILE, **arguments(tokens=tokens))
    assert len(common._launched) <= 4
    assert len(kernel.compiled) == 1


def test_a_part_of_a_tensor_is_an_address_to_the_kernel_and_a_view_to_triton(kernel):
    whole = torch.arange(96.0)[4:].view(4, 23)
    part = common.Part(whole, 8, (4, 8), (23, 1))
    common.launch(kernel, 3, TILE, **arguments(p_x=part))
    (view,) = (given["p_x"] for given in kernel.compiled)
    assert torch.equal(view, whole[:, 8:16])
    assert (view.data_ptr(), view.stride()) == (part.data_ptr(), part.stride())
    common.launch(kernel, 3, TILE, **arguments(p_x=part))
    assert kernel.run[0][9] == whole.data_ptr() + 8 * 4
    # Four elements further on it is aligned as before, one further on it is not.
    for first, compiled in ((12, 1), (9, 2)):
        common.launch(kernel, 3, TILE, **arguments(p_x=common.Part(whole, first, (4, 8), (23, 1))))
        assert len(kernel.compiled) == compiled
    assert torch.equal(common.Part(whole, 2, (3, 2)).view(), whole.flatten()[2:8].view(3, 2))


def test_thirds_are_queries_keys_and_values():
    qkv = torch.randn(5, 3, 2, 4)
    thirds = common.thirds(qkv.flatten(1), (5, 2, 4))
    for part, want in zip(thirds, qkv.unbind(1), strict=True):
        assert torch.equal(part.view(), want)
        assert part.stride() == want.stride()
        assert part.contiguous().is_contiguous()
