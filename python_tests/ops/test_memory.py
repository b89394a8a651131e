import os
import subprocess
import sys
import threading

import pytest
import torch

from ticketops.ops import extension, memory

pytestmark = pytest.mark.skipif(extension.native is None, reason="needs the native extension")

#: More than a mapping at first.
LARGE = (17, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [5, (0,), (3, 0, 2), (1,), (7, 13), [2, 3, 4], (1 << 20,), LARGE])
def test_a_tensor_is_what_torch_makes(shape, dtype):
    x, like = memory.empty(shape, dtype), torch.empty(shape, dtype=dtype)
    assert (x.shape, x.dtype, x.stride(), x.device) == (like.shape, like.dtype, like.stride(), like.device)
    assert x.is_contiguous()
    assert x.data_ptr() % 64 == 0
    assert not x.requires_grad
    assert x.untyped_storage().nbytes() == like.untyped_storage().nbytes()
    assert torch.equal(x.fill_(3), torch.full(like.shape, 3, dtype=dtype))


def test_no_two_tensors_share_memory():
    generator = torch.Generator().manual_seed(0)
    held = []
    for number in range(400):
        size = int(torch.randint(1, 200_000, (), generator=generator))
        held.append((memory.empty(size).fill_(number), number))
        if len(held) > 40:
            held.pop(int(torch.randint(40, (), generator=generator)))
    assert all(bool((x == number).all()) for x, number in held)


@pytest.mark.skipif("sanitize" in getattr(extension.native, "__file__", ""), reason="blocks come from malloc there")
def test_freed_memory_is_used_again():
    whole, pieces = set(), set()
    for _ in range(20):
        x = memory.empty(LARGE)
        whole.add(x.data_ptr())
        part = x[3].fill_(1)
        del x
        # A view keeps it.
        assert memory.empty(LARGE).fill_(2).data_ptr() not in (part.data_ptr() - 3 * part.nbytes, 0)
        assert bool((part == 1).all())
        del part
        # Its pieces become one block again.
        several = [memory.empty(LARGE[1]) for _ in range(LARGE[0])]
        pieces |= {each.data_ptr() for each in several}
        del several[::2]
    assert len(whole) <= 3
    assert len(pieces) <= 3 * LARGE[0]


def test_an_unclaimed_capsule_gives_its_memory_back():
    def mapped():
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    for _ in range(3000):
        extension.native.new_tensor((1 << 20,), False)
    assert mapped() - before < 3000 * 4 * (1 << 20) / 2


def test_threads_share_it():
    failures = []

    def work(number):
        for _ in range(200):
            x = memory.empty(1000 * number).fill_(number)
            y = memory.empty((number, 10)).fill_(-number)
            if not (bool((x == number).all()) and bool((y == -number).all())):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_tensor_outlives_the_interpreter():
    code = (
        "import torch; from ticketops.ops import memory; x = memory.empty(1 << 20); y = torch.nn.Parameter(x); "
        "y.grad = memory.empty(1 << 20).zero_(); import builtins; builtins.kept = y"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_gradient_is_an_ordinary_tensor(tmp_path):
    x = memory.empty((4, 5)).fill_(2).requires_grad_()
    (x * x).sum().backward()
    assert torch.equal(x.grad, torch.full((4, 5), 4.0))
    torch.save(x.detach(), tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt"), x.detach())
    assert torch.equal(x.detach().clone().share_memory_(), x.detach())
