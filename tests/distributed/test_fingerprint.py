import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlcore.distributed import fingerprint as fingerprints
from rlcore.distributed.fingerprint import Constants, compare, fingerprint
from rlcore.errors import RunError


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


@pytest.mark.parametrize("width", [4096, 4096 * 4])  # a row of the hash holds two rows of the first, half a row of the second
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_is_seen(dtype, width):
    tensor = numbers(64, width, dtype=dtype)
    before = fingerprint(tensor)
    rows, elements = tensor.clone(), tensor.clone()
    rows[[3, 40]] = rows[[40, 3]]
    elements[0, [5, 9]] = elements[0, [9, 5]]
    assert before not in (fingerprint(rows), fingerprint(elements), fingerprint(tensor.flip(0)), fingerprint(tensor.flip(1)))


def test_the_order_of_whole_blocks_is_seen():
    """Blocks that are hashed separately."""
    tensor = numbers(4, 2 * fingerprints._COLUMNS)
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


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)  # vLLM, if loaded, has made torch.set_num_threads a no-op
    yield
    torch._C.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_cost_a_few_passes_over_memory(one_thread, dtype):
    """A pass multiplies the same bytes, as 64-bit words, by one row of numbers. Thread CPU time, to be independent of load."""
    tensor, seconds = numbers(8_000_000, dtype=dtype), {}
    words = tensor.view(torch.int64)[: tensor.nbytes // 8 // 4096 * 4096].view(-1, 4096)
    row = torch.ones(4096, dtype=torch.int64)
    for _ in range(7):
        for name, work in (("fingerprint", lambda: fingerprint(tensor)), ("pass", lambda: words.mv(row))):
            started = time.thread_time()
            work()
            seconds[name] = min(seconds.get(name, 9.0), time.thread_time() - started)
    assert seconds["fingerprint"] < 8 * seconds["pass"], seconds  # measured: 3 to 5


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
    monkeypatch.setattr(fingerprints, "_weighted", lambda block, weights: (block * weights).sum(1))
    assert fingerprint(tensor) == expected


class Attention(nn.Module):
    """A layer without weights that holds tensors in every possible way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("positions", numbers(16, 4), persistent=False)
        self.mask = torch.ones(4, dtype=torch.bool)
        self.cache = torch.zeros(8)
        self.tables = {"short": [numbers(3)], "long": (numbers(5),)}
        self.kernel = SimpleNamespace(slopes=numbers(2), scheme=SimpleNamespace(sinks=numbers(6), tables={"a": [numbers(7)]}))
        self.kernel.itself = self.kernel


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.linear = nn.Linear(4, 4)
        self.linear.packed = self.linear.weight.detach().clone()
        self.linear.register_buffer("root", torch.tensor(0.0188), persistent=False)
        self.register_buffer("view", self.linear.weight.detach()[1:], persistent=False)
        self.window = numbers(9)


HELD = {
    "attention.scale": lambda model: model.attention.scale,
    "attention.positions": lambda model: model.attention.positions,
    "linear.root": lambda model: model.linear.root,
    "attention.mask": lambda model: model.attention.mask,
    "attention.tables['short'][0]": lambda model: model.attention.tables["short"][0],
    "attention.tables['long'][0]": lambda model: model.attention.tables["long"][0],
    "attention.kernel.slopes": lambda model: model.attention.kernel.slopes,
    "attention.kernel.scheme.sinks": lambda model: model.attention.kernel.scheme.sinks,
    "attention.kernel.scheme.tables['a'][0]": lambda model: model.attention.kernel.scheme.tables["a"][0],
    "window": lambda model: model.window,
}
BUFFERS = ["attention.scale", "attention.positions", "linear.root"]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def constants(model):
    return Constants(model, [model.attention.cache])


def named(name):
    return rf"weight sync: the event left the engine without .* 1 different: {re.escape(name)}; .* stops here; do this$"


@pytest.mark.parametrize("updated", [True, False])
def test_weights_and_what_sampling_writes_may_change(model, constants, updated):
    constants.note()
    with torch.no_grad():
        model.linear.weight.add_(1)
    model.attention.cache.add_(1)
    model.attention.later = numbers(3)
    constants.check("the event", "do this", updated)


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_what_no_update_sends_is_named_when_it_changes(model, constants, name, updated):
    constants.note()
    HELD[name](model).zero_()
    for _ in range(2):
        with pytest.raises(RunError, match=named(name)):
            constants.check("the event", "do this", updated)


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_is_held_to_what_it_was_when_the_model_was_loaded(model, constants, name):
    HELD[name](model).mul_(1.01)
    constants.note()
    with pytest.raises(RunError, match=named(name)):
        constants.check("the event", "do this")


def test_scratch_of_sampling_is_held_to_what_it_was_before_the_event(model, constants):
    for change in (1, 2):
        model.attention.tables["short"][0].add_(change)
        constants.note()
        constants.check("the event", "do this")


def test_what_a_layer_may_make_of_its_weights_may_change_in_an_update_but_not_asleep(model, constants):
    for updated in (True, False):
        constants.note()
        model.linear.packed = model.linear.packed + 1
        if updated:
            constants.check("the event", "do this", updated)
    with pytest.raises(RunError, match=named("linear.packed")):
        constants.check("the event", "do this")


def test_a_tensor_that_one_of_its_holders_may_make_of_weights_may_change(model):
    model.attention.shared = model.linear.packed
    constants = Constants(model)
    constants.note()
    model.linear.packed.add_(1)
    constants.check("the event", "do this", updated=True)
    constants.note()
    model.linear.packed.add_(1)
    with pytest.raises(RunError, match=named("attention.shared")):
        constants.check("the event", "do this")


def test_a_plugin_says_what_else_is_made_of_weights(model):
    constants = Constants(model, derives=lambda holder: isinstance(holder, SimpleNamespace))
    constants.note()
    model.attention.kernel.slopes.zero_()
    model.attention.kernel.scheme.sinks.zero_()
    constants.check("the event", "do this", updated=True)
    constants.note()
    model.attention.mask.zero_()
    with pytest.raises(RunError, match=named("attention.mask")):
        constants.check("the event", "do this", updated=True)


def test_what_a_sleep_gives_up_with_the_weights_must_be_back_after_the_update(model, constants):
    constants.note()
    kept = model.attention.mask.clone()
    model.attention.mask.zero_()
    constants.check("waking", "do this", given_up=True)
    constants.note()  # another sleep, or the update: the values before the first sleep count
    with pytest.raises(RunError, match=named("attention.mask")):
        constants.check("the event", "do this", updated=True)
    model.attention.mask.copy_(kept)
    constants.check("the event", "do this", updated=True)
    model.attention.scale.zero_()
    with pytest.raises(RunError, match=r"waking left .* different: attention\.scale"):
        constants.check("waking", "do this", given_up=True)


def test_memory_that_is_shared_with_a_weight_stays_shared(model, constants):
    model.view = model.linear.weight.detach()[1:]
    constants.check("the event", "do this")
    model.view = model.linear.weight.detach()[:3]
    with pytest.raises(RunError, match=named("view")):
        constants.check("the event", "do this")
    model.view = model.linear.weight.detach()[1:].clone()
    with pytest.raises(RunError, match=named("view")):
        constants.check("the event", "do this")


def test_what_is_gone_is_named(model, constants):
    constants.note()
    del model.attention.positions, model.attention.mask
    model.attention.scale = model.attention.scale.to("meta")
    words = r"2 gone: attention\.positions, attention\.mask; 1 different: attention\.scale;"
    with pytest.raises(RunError, match=words):
        constants.check("the event", "do this")
