import time

import pytest
import torch

from rlcore import weight_sync
from rlcore.errors import RunError
from rlcore.weight_sync import compare, fingerprint


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (64, 4096), (33, 4099), ()])
def test_equal_tensors_have_equal_fingerprints(dtype, shape):
    tensor = numbers(*shape, dtype=dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())


def test_an_empty_tensor_has_a_fingerprint():
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0))


def test_a_view_has_the_fingerprint_of_its_copy():
    tensor = numbers(9, 9)
    for view in (tensor.t(), tensor[1:], tensor[:, 1:], tensor[3], tensor.view(-1)[1:]):
        assert fingerprint(view) == fingerprint(view.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_element_is_seen_wherever_it_is(dtype):
    tensor = numbers(3, 5000, dtype=dtype)
    before = fingerprint(tensor)
    for place in [0, 1, 2, 3, 4095, 4096, 8191, 9999, 14999]:
        changed = tensor.clone()
        changed.view(-1)[place] *= 1.01
        assert fingerprint(changed) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_is_seen(dtype):
    tensor = numbers(64, 4096, dtype=dtype)
    before = fingerprint(tensor)
    rows, elements = tensor.clone(), tensor.clone()
    rows[[3, 40]] = rows[[40, 3]]
    elements[0, [5, 9]] = elements[0, [9, 5]]
    assert before not in (fingerprint(rows), fingerprint(elements), fingerprint(tensor.flip(0)), fingerprint(tensor.flip(1)))


def test_the_order_of_whole_blocks_is_seen():
    """Of those that are hashed each by itself."""
    tensor = numbers(4, 2 * weight_sync._COLUMNS)
    assert fingerprint(tensor[[0, 2, 1, 3]]) != fingerprint(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flipped_signs_do_not_cancel(dtype):
    tensor = numbers(2, 4096, dtype=dtype)
    for places in [(1, 3), (0, 2), (7, 4099), (3, 7)]:
        changed = tensor.clone()
        changed.view(-1)[list(places)] *= -1
        assert fingerprint(changed) != fingerprint(tensor)


def test_dtype_and_shape_belong_to_the_fingerprint():
    zeros = torch.zeros(4, 4)
    assert fingerprint(zeros) != fingerprint(zeros.view(torch.int32))
    assert fingerprint(zeros) != fingerprint(zeros.view(2, 8))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    fingerprint(numbers(10))
    assert torch.equal(before, torch.get_rng_state())


def test_fingerprints_cost_a_few_passes_over_memory():
    tensor = numbers(8_000_000)
    fingerprint(tensor)
    started = time.perf_counter()
    fingerprint(tensor)
    assert time.perf_counter() - started < 2  # 0.02 s on a quiet machine


def test_agreement_says_nothing():
    compare({"a": 1, "b": 2}, {"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("sent", "held", "words"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, r"1 missing .*: b;"),
        ({"a": 1, "b": 2}, {"a": 1}, r"1 unexpected .*: b;"),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, r"2 different: a, b;"),
        ({}, {name: 1 for name in "abcde"}, r"5 missing .*: a, b, c and 2 more;"),
    ],
)
def test_disagreement_names_the_tensors(sent, held, words):
    with pytest.raises(RunError, match=words):
        compare(sent, held)


def test_a_tied_head_may_be_left_out_on_either_side():
    tied = {"head": "embedding"}
    compare({"embedding": 1}, {"embedding": 1, "head": 1}, tied)
    compare({"embedding": 1, "head": 1}, {"embedding": 1}, tied)
    with pytest.raises(RunError, match="different: head"):
        compare({"embedding": 1}, {"embedding": 1, "head": 2}, tied)


def test_a_device_without_integer_products_has_the_same_fingerprints(monkeypatch):
    tensor = numbers(33, 4099)
    expected = fingerprint(tensor)
    monkeypatch.setattr(weight_sync, "_weighted", lambda block, weights: (block * weights).sum(1))
    assert fingerprint(tensor) == expected
