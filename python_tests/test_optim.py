import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops.errors import InputError, UnsupportedError
from ticketops.models.freezing import Frozen, freeze
from ticketops.models.indices import Indices
from ticketops.optim import Adamax


def parameter(values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def step(optimizer, *gradients):
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for each, gradient in zip(parameters, gradients, strict=True):
        each.grad = None if gradient is None else torch.as_tensor(gradient, dtype=each.dtype)
    optimizer.step()


def test_three_steps_computed_by_hand():
    weight = parameter([1.0, -2.0])
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.01, "weight_decay": 0.1}
    optimizer = Adamax([weight], **options, max_grad_norm=0)
    # m = 0.1 g;  u = |g| + eps;  w - 0.1 (0.03 / 0.32 + 0.1) and w - 0.1 (-0.04 / 0.42 - 0.2)
    step(optimizer, [0.3, -0.4])
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.03, -0.04], rel=1e-12)
    assert optimizer.state[weight]["exp_inf"].tolist() == pytest.approx([0.31, 0.41], rel=1e-12)
    assert weight.tolist() == pytest.approx([0.980625, -1.97047619047619], rel=1e-12)
    # m = 0.9 m + 0.1 g;  u = max(0.99 u, |g| + eps) grows;  0.087 / 0.62 and 0.044 / 0.82
    step(optimizer, [0.6, 0.8])
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.087, 0.044], rel=1e-12)
    assert optimizer.state[weight]["exp_inf"].tolist() == pytest.approx([0.61, 0.81], rel=1e-12)
    assert weight.tolist() == pytest.approx([0.956786491935484, -1.956137282229965], rel=1e-12)
    # No gradient: momentum goes on, u falls by a hundredth;  0.0783 / 0.6139 and 0.0396 / 0.8119
    step(optimizer, [0.0, 0.0])
    assert optimizer.state[weight]["exp_inf"].tolist() == pytest.approx([0.6039, 0.8019], rel=1e-12)
    assert weight.tolist() == pytest.approx([0.934464107, -1.941453357], rel=1e-9)


def test_each_parameters_gradient_is_clipped_to_its_own_norm():
    # [3, 4] has norm 5 and becomes [0.6, 0.8]; [0.3, 0.4] stays.
    clipped, small = parameter([1.0, 1.0]), parameter([1.0, 1.0])
    optimizer = Adamax([clipped, small], lr=0.1, max_grad_norm=1.0)
    step(optimizer, [3.0, 4.0], [0.3, 0.4])
    assert optimizer.state[clipped]["exp_avg"].tolist() == pytest.approx([0.06, 0.08], rel=1e-6)
    assert optimizer.state[small]["exp_avg"].tolist() == pytest.approx([0.03, 0.04], rel=1e-12)
    # The user's gradient is not touched.
    assert clipped.grad.tolist() == [3.0, 4.0]


def by_element(weights, history, lr, betas, eps, decay, clip):
    """The update rule for one parameter, number by number."""
    weights = list(weights)
    m, u = [0.0] * len(weights), [0.0] * len(weights)
    for gradient in history:
        norm = math.sqrt(sum(g * g for g in gradient))
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for i, g in enumerate(gradient):
            g *= scale
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            u[i] = max(betas[1] * u[i], abs(g) + eps)
            weights[i] -= lr * (m[i] / (u[i] + eps) + decay * weights[i])
    return weights


numbers = st.floats(-10, 10, width=32)
betas = st.floats(0, 0.999)
options = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.5),
        "betas": st.tuples(betas, betas),
        "eps": st.floats(1e-8, 0.1),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "max_grad_norm": st.sampled_from([0.0, 1.0, 7.5]),
    }
)


@settings(max_examples=60)
@given(data=st.data())
def test_it_follows_the_rule_element_by_element(data):
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    vectors = [data.draw(st.lists(numbers, min_size=size, max_size=size)) for size in sizes]
    history = [
        [data.draw(st.lists(numbers, min_size=size, max_size=size)) for size in sizes]
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    groups = [{"params": [parameter(vector)], **data.draw(options)} for vector in vectors]
    optimizer = Adamax(groups)
    for gradients in history:
        step(optimizer, *gradients)
    for place, (group, vector) in enumerate(zip(groups, vectors, strict=True)):
        rule = [group[name] for name in ("lr", "betas", "eps", "weight_decay", "max_grad_norm")]
        want = by_element(vector, [gradients[place] for gradients in history], *rule)
        assert group["params"][0].tolist() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_parameters_of_several_dtypes_and_without_gradient_go_together():
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    together, without = [parameter([[1.0, -2.0]], dtype) for dtype in kinds], parameter([5.0])
    # 600 is finite in float16, and its square is not.
    gradient = [[600.0, -800.0]]
    step(Adamax([*together, without], lr=0.1), *[gradient] * 4, None)
    for each in together:
        want = by_element([1.0, -2.0], gradient, 0.1, (0.9, 0.999), 1e-6, 0.01, 1.0)
        # Products of up to five rounded factors.
        assert each.flatten().tolist() == pytest.approx(want, rel=5 * torch.finfo(each.dtype).eps, abs=1e-12)
    assert without.tolist() == [5.0]


def trained(model, optimizer, steps):
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        loss = model(torch.randn(4, 3, generator=generator)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [each.detach().clone() for each in model.parameters()]


def made(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, Adamax(groups, lr=0.1, **options)


def test_a_resumed_run_is_the_undisturbed_one():
    want = trained(*made(), range(6))
    model, optimizer = made()
    trained(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, optimizer = made()
    weights, state = torch.load(file)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert all(map(torch.equal, trained(model, optimizer, range(3, 6)), want))
    model, optimizer = made()
    trained(model, optimizer, range(3))
    model, optimizer = copy.deepcopy((model, optimizer))
    assert all(map(torch.equal, trained(model, optimizer, range(3, 6)), want))


def test_groups_without_decay_and_schedules():
    weight, bias = parameter([1.0]), parameter([1.0])
    optimizer = Adamax([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: [1.0, 0.0][done])
    step(optimizer, [0.0], [0.0])
    assert (weight.item(), bias.item()) == (pytest.approx(0.95), 1.0)
    schedule.step()
    step(optimizer, [1.0], [1.0])
    assert (weight.item(), bias.item()) == (pytest.approx(0.95), 1.0)


def test_a_tensor_as_step_size_is_read_at_each_step():
    rate = torch.tensor(0.1)
    model, optimizer = made()
    for group in optimizer.param_groups:
        group["lr"] = rate
    first = trained(model, optimizer, [0])
    torch.testing.assert_close(first, trained(*made(), [0]))
    rate.zero_()
    assert all(map(torch.equal, trained(model, optimizer, [1]), first))


def test_a_closure_gives_gradients_and_loss():
    model, optimizer = made()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    want = closure().item()
    assert optimizer.step(closure).item() == want
    assert optimizer.step(closure).item() < want


def test_a_step_reads_no_value():
    # Tensors on the meta device have none: reading one raises.
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = Adamax(model.parameters())
    model(torch.ones(4, 3, device="meta")).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["exp_inf"].device.type == "meta"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_shows_in_its_parameter_alone(value, clip):
    broken, sound = parameter([1.0, 1.0]), parameter([1.0, 1.0])
    optimizer = Adamax([broken, sound], max_grad_norm=clip)
    step(optimizer, [value, 0.5], [0.5, 0.5])
    assert not math.isfinite(broken.tolist()[0])
    assert not math.isfinite(optimizer.state[broken]["exp_inf"][0])
    assert torch.isfinite(sound).all()
    step(optimizer, [0.5, 0.5], [0.5, 0.5])
    assert not math.isfinite(broken.tolist()[0])


def test_grad_scaler_skips_an_overflow_and_scales_the_rest_away():
    steps = {}
    for scale in (1.0, 1024.0):
        model, optimizer = made()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for factor in (1.0, math.inf, 2.0):
            before = [each.detach().clone() for each in model.parameters()]
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.ones(4, 3)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, model.parameters(), before)) == math.isinf(factor)
        steps[scale] = list(model.parameters())
    torch.testing.assert_close(*steps.values())


@pytest.mark.parametrize("noise", [1e6, math.nan])
def test_frozen_slices_neither_move_nor_count_in_the_norm(noise):
    weight, alone = parameter([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), parameter([[3.0, 4.0]])
    optimizer, other = Adamax([weight], lr=0.1), Adamax([alone], lr=0.1)
    # Of norm below 1: the kept row starts with the same moments in both.
    step(optimizer, [[0.1, 0.2]] * 3)
    step(other, [[0.1, 0.2]])
    tensors = [weight.detach(), *optimizer.state[weight].values()]
    before = [each.clone() for each in tensors]
    freeze(weight, Frozen(0, 3, Indices([0, 2])))
    step(optimizer, [[noise, noise], [3.0, 4.0], [noise, 1.0]])
    step(other, [[3.0, 4.0]])
    for each, old in zip(tensors, before, strict=True):
        assert torch.equal(each[[0, 2]], old[[0, 2]])
    assert torch.equal(weight[[1]], alone)
    # The user's gradient is not touched.
    assert weight.grad[2, 1] == 1.0
    freeze(weight, Frozen(0, 3, Indices([0, 1, 2])))
    before = [each.clone() for each in tensors]
    step(optimizer, [[1.0, 1.0]] * 3)
    assert all(map(torch.equal, tensors, before))


def test_moments_that_a_step_makes_of_frozen_slices_are_those_of_no_gradient():
    weight = parameter([[1.0], [2.0]])
    freeze(weight, Frozen(0, 2, Indices([1])))
    optimizer = Adamax([weight], eps=1e-6)
    step(optimizer, [[0.5], [1e6]])
    assert optimizer.state[weight]["exp_avg"].tolist() == [[pytest.approx(0.05)], [0.0]]
    assert optimizer.state[weight]["exp_inf"].tolist() == [[pytest.approx(0.5, rel=1e-5)], [1e-6]]


def test_what_it_does_not_serve_is_refused_before_anything_moves():
    table = torch.nn.Embedding(5, 2, sparse=True)
    weight = parameter([1.0])
    weight.grad = torch.ones(1, dtype=torch.float64)
    table(torch.tensor([1, 3])).sum().backward()
    before = table.weight.detach().clone()
    optimizer = Adamax([weight, table.weight])
    with pytest.raises(UnsupportedError, match=r"sparse gradients, and a parameter of shape \[5, 2\].*sparse=False"):
        optimizer.step()
    assert weight.item() == 1.0
    assert torch.equal(table.weight, before)
    with pytest.raises(UnsupportedError, match="complex"):
        step(Adamax([parameter([1j], torch.complex64)]), [1j])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": torch.ones(2)}, r"lr has shape \[2\]"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"max_grad_norm": math.inf}, "max_grad_norm inf"),
        ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Adamax([parameter([1.0])], **options)
    with pytest.raises(InputError, match=message):
        Adamax([{"params": [parameter([1.0])], **options}])
