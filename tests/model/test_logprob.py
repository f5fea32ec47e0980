"""The tiled LM head against full logits."""

import pytest
import torch

from rlcore.model import logprob


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of six tokens and six vocabulary entries."""
    monkeypatch.setattr(logprob.token_logprobs, "__defaults__", (1.0, 4 * 6 * 6, True))


def whole(hidden, weight, targets, temperature):
    logits = (hidden @ weight.T / temperature).log_softmax(-1)
    return logits.gather(1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


def inputs(tokens=13, vocabulary=31, width=8):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_values_and_gradients_equal_the_whole_logits(temperature, entropy_weight):
    hidden, weight, targets = inputs()
    upstream = torch.randn(len(targets))
    results = []
    for function in (logprob.token_logprobs, whole):
        hidden.grad = weight.grad = None
        chosen, entropy = function(hidden, weight, targets, temperature)
        ((chosen * upstream).sum() + entropy_weight * (entropy * upstream).sum()).backward()
        results.append((chosen.detach(), entropy.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_a_weight_in_the_compute_dtype_has_a_gradient_in_it():
    """Also a sharded weight, gathered for its layer; sums over tokens are still float32."""
    hidden, weight, targets = inputs(tokens=400)
    rounded = weight.detach().bfloat16().requires_grad_()
    for each in (rounded, weight := rounded.detach().float().requires_grad_()):
        chosen, entropy = logprob.token_logprobs(hidden.bfloat16(), each, targets)
        (chosen.sum() + entropy.sum()).backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad, weight.grad.bfloat16(), atol=0, rtol=0)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs()
    chosen, entropy = logprob.token_logprobs(hidden * 1e3, weight, targets)
    assert chosen.isfinite().all() and entropy.isfinite().all() and (entropy >= -1e-3).all()


def test_the_gradient_passes_finite_differences():
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, requires_grad=True)
    weight, targets = torch.randn(9, 4), torch.tensor([0, 8, 4])
    chosen, entropy = logprob.token_logprobs(hidden, weight, targets)
    (chosen.sum() + entropy.sum()).backward()
    exact, step = hidden.grad.clone(), 1e-2
    for place in [(0, 0), (1, 2), (2, 3)]:
        values = []
        for sign in (1, -1):
            moved = hidden.detach().clone()
            moved[place] += sign * step
            chosen, entropy = whole(moved.double(), weight.double(), targets, 1.0)
            values.append((chosen.sum() + entropy.sum()).item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(exact[place].item(), abs=2e-3)


def test_no_tensor_of_all_logits_is_ever_made():
    class Watchdog(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Watchdog.largest = max(Watchdog.largest, result.numel())
            return result

    hidden, weight, targets = inputs(tokens=64, vocabulary=128, width=4)
    with Watchdog():
        chosen, _ = logprob.token_logprobs(hidden, weight, targets)
        chosen.sum().backward()
    assert 0 < Watchdog.largest <= 128 * 4 < 64 * 128
