"""Reward functions and the runner that never turns a failure into a 0."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore import registry
from rlcore.config import RewardConfig
from rlcore.errors import ConfigError
from rlcore.rewards.geo3k import geo3k, well_formed
from rlcore.rewards.math import gsm8k, last_boxed, math, math_verify, number, strip_string
from rlcore.rewards.runner import RewardFunctions
from rlcore.rewards.tagged import tagged_answer
from rlcore.types import Group, Prompt, Row, Sample

balanced = st.recursive(
    st.text(alphabet="ab1 $+\n", max_size=5) | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner, max_size=4).map("".join) | inner.map(lambda text: f"{{{text}}}"),
    max_leaves=12,
)


@settings(deadline=None)
@given(before=st.text(alphabet=r"ab{}\$ ", max_size=10), content=balanced, after=st.text(alphabet="ab{} $", max_size=10))
def test_the_content_of_a_box_comes_back_whatever_stands_around_it(before, content, after):
    assert last_boxed(f"{before} \\boxed{{{content}}}{after}") == content


@settings(deadline=None)
@given(content=balanced)
def test_a_box_that_never_closes_is_no_box(content):
    assert last_boxed(f"\\boxed{{{content}") is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"$\boxed 7$ is it", "7"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1} and \boxed{2", None),
        ("5", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\tfrac{1}{2}", r"\dfrac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", "1/2"),
        ("-3/4", r"\frac{-3}{4}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"2\sqrt 2", r"2\sqrt{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$18", "18"),
        (r"50\%", "50"),
        ("x = 5", "5"),
        (r"10\text{ cm}", "10"),
        (r"1\!000", "1000"),
        ("3 ,\n4", "3,4"),
        (r"x+ .5", "x+0.5"),
        (r"{.5}", r"{0.5}"),
    ],
)
def test_what_does_not_change_a_value_is_stripped(given, same):
    assert strip_string(given) == strip_string(same)
    assert math(f"So \\boxed{{{given}}}", same, {}) == 1.0


@pytest.mark.parametrize(
    ("given", "other"), [("1/2", "2/1"), ("xyz=5", "5"), ("x", "y"), ("10", "100"), (r"\frac{1}{23}", r"\frac12")]
)
def test_different_values_stay_different(given, other):
    assert strip_string(given) != strip_string(other)
    assert math(f"\\boxed{{{given}}}", other, {}) == 0.0


@settings(deadline=None)
@given(text=st.text(alphabet="ab01./=%$\\{} ^frcsqt", max_size=30))
def test_stripping_never_fails(text):
    strip_string(text)
    assert math(f"\\boxed{{{text}}}", text, {}) in (0.0, 1.0)


def test_math_without_a_box_is_zero():
    assert math("the answer is 5", "5", {}) == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.25}", r"\frac{1}{4}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{2 \sqrt { 221 }}", r"2\sqrt{221}", 1.0),
        (r"\boxed{3}", "4", 0.0),
        (r"\boxed{}", "4", 0.0),
        ("nothing at all", "4", 0.0),
        (r"\boxed{\frac{}{}}", "4", 0.0),
        ("The answer is $4$.", "4", 1.0),
    ],
)
def test_math_verify_compares_values(response, answer, value):
    assert math_verify(response, answer, {}) == value


def test_math_verify_works_outside_the_main_thread():
    values = []
    thread = threading.Thread(target=lambda: values.append(math_verify(r"\boxed{\frac{2}{4}}", "0.5", {})))
    thread.start()
    thread.join()
    assert values == [1.0]


def test_math_verify_that_takes_too_long_is_a_timeout(monkeypatch):
    import math_verify as package
    from math_verify.errors import TimeoutException

    def slow(*arguments, **options):
        raise TimeoutException

    monkeypatch.setattr(package, "verify", slow)
    with pytest.raises(TimeoutError, match="answer '4' took longer than 5 s"):
        math_verify(r"\boxed{2+3}", "4", {})


@pytest.mark.parametrize(
    ("response", "flexible", "strict"),
    [
        (r"so \boxed{1,018}", 1.0, 1.0),
        ("#### 1018", 1.0, 1.0),
        ("#### $1,018.00", 1.0, 1.0),
        (r"\boxed{\$1018.}", 1.0, 1.0),
        (r"\boxed{1018 \text{ dollars}}", 1.0, 0.0),
        ("He earns $1,018.", 1.0, 0.0),
        ("5 + 1013 = 1018", 1.0, 0.0),
        ("1018 or 7", 0.0, 0.0),
        (r"1018, so \boxed{7}", 0.0, 0.0),
        (r"\boxed{1018, 7}", 0.0, 0.0),
        ("-1018", 0.0, 0.0),
        ("no idea", 0.0, 0.0),
    ],
)
def test_gsm8k_reads_the_final_number(response, flexible, strict):
    assert gsm8k(response, "1018", {}) == flexible
    assert gsm8k(response, "1018", {}, extract="strict") == strict


def test_gsm8k_refuses_an_answer_that_is_no_number():
    with pytest.raises(ValueError, match="the answer 'many' is not a number"):
        gsm8k("5", "many", {})


@settings(deadline=None)
@given(value=st.integers(-(10**9), 10**9))
def test_a_number_is_the_same_however_it_is_written(value):
    for text in (str(value), f"{value:,}", f"{value}.", f"{value}.0", f"${value}".replace("$-", "-$"), f" {value}\\% "):
        assert number(text) == value
    assert number(f"{value} or {value}") is None


@pytest.mark.parametrize("accuracy", ["math", "math_verify"])
@pytest.mark.parametrize(
    ("response", "value"),
    [
        (r"<think>a</think> \boxed{5}", 1.0),
        (r"<think>a</think> \boxed{6}", 0.1),
        (r"\boxed{5}", 0.9),
        (r" <think>a</think> \boxed{5}", 0.9),
        (r"<think>\boxed{5}</think>", 0.9),
        ("<think>a</think> 5", 0.0),
    ],
)
def test_geo3k_is_nine_parts_answer_and_one_part_form(accuracy, response, value):
    assert geo3k(response, "5", {}, accuracy=accuracy) == pytest.approx(value)


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["<think>", "</think>", "\\boxed{", "}", "a", "\n"]), max_size=9))
def test_the_form_is_the_regular_expression_it_stands_for(parts):
    import re

    text = "".join(parts)
    assert well_formed(text) == bool(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", text, re.DOTALL))


@pytest.mark.parametrize(
    ("response", "value", "with_form"),
    [
        ("<answer>5</answer>", 1.0, 1.0),
        ("<answer> 5.0 </answer>", 1.0, 1.0),
        ("<answer>4</answer><answer>5</answer>", 1.0, 0.8),
        ("<answer>5</answer><answer>4</answer>", 0.0, 0.0),
        ("<answer>4</answer>", 0.0, 0.2),
        ("</answer>5<answer>", 0.0, 0.0),
        ("<answer>5", 0.0, 0.0),
        ("5", 0.0, 0.0),
    ],
)
def test_tagged_answer_reads_the_last_tag(response, value, with_form):
    assert tagged_answer(response, "5", {}) == value
    assert tagged_answer(response, "5", {}, format_weight=0.2) == pytest.approx(with_form)


def test_tagged_answer_compares_texts_too():
    assert tagged_answer("<answer>north west</answer>", " north west", {}) == 1.0


def returned(response, answer, fields):
    """A reward that says what its response asks for."""
    if response == "interrupt":
        raise KeyboardInterrupt
    if response == "raise":
        raise RuntimeError("the sandbox is gone")
    if response == "slow":
        raise TimeoutError("5 s")
    return fields["values"][response]


def half(response, answer, fields, *, scale: float = 0.5):
    return scale


class Callable_:
    def __call__(self, response, answer, fields):
        return 2.0


instance, not_a_function = Callable_(), 5


def two_arguments(response, answer):
    return 0.0


VALUES = {"one": 1, "true": True, "none": None, "text": "1", "nan": float("nan"), "inf": float("inf")}


def group(*texts, answer="5"):
    prompt = Prompt(Row("train:7", [], answer=answer, fields={"values": VALUES}), [1], [1])
    return Group(prompt, [Sample([1], [0.0], text, "stop", 0) for text in texts])


def functions(*terms):
    return RewardFunctions([RewardConfig(**term) for term in terms])


def test_scores_are_weighted_sums_with_unweighted_parts():
    rewards = functions({"name": f"{__name__}.returned"}, {"name": f"{__name__}.half", "weight": 2, "options": {"scale": 0.25}})
    ((one, true), (last,)) = rewards.score([group("one", "true"), group("one")])
    assert one.value == true.value == last.value == 1.5 and one.status == "value"
    assert one.parts == {f"{__name__}.returned": 1.0, f"{__name__}.half": 0.25}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "RuntimeError: the sandbox is gone"),
        ("none", "it returned None, not a finite number"),
        ("text", "it returned '1', not a finite number"),
        ("nan", "it returned nan, not a finite number"),
        ("inf", "it returned inf, not a finite number"),
        ("missing", "KeyError: 'missing'"),
    ],
)
def test_a_failed_reward_is_an_error_with_its_reason_and_never_a_value(text, reason):
    rewards = functions({"name": f"{__name__}.half"}, {"name": f"{__name__}.returned"})
    ((failed, fine),) = rewards.score([group(text, "one")])
    assert failed.value is None and failed.status == "error" and fine.value == 1.5
    assert failed.detail.startswith(f"reward '{__name__}.returned', row train:7: ") and reason in failed.detail
    assert failed.parts == {f"{__name__}.half": 0.5}


def test_a_timeout_is_a_timeout():
    ((score,),) = functions({"name": f"{__name__}.returned"}).score([group("slow")])
    assert score.value is None and score.status == "timeout"


def test_an_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        functions({"name": f"{__name__}.returned"}).score([group("interrupt")])


def test_a_callable_object_is_a_reward():
    assert functions({"name": f"{__name__}.instance"}).score([group("x")])[0][0].value == 2.0


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"name": "mth"}], "rewards: nothing is installed under the name 'mth'; did you mean 'math'"),
        ([{"name": "no_such_module.reward"}], "no module 'no_such_module'"),
        ([{"name": f"{__name__}.gone"}], "has no 'gone'"),
        ([{"name": f"{__name__}.not_a_function"}], r"reward\.0\.name: .*is a int, not a function"),
        ([{"name": f"{__name__}.two_arguments"}], r"reward\.0\.name: .*must take \(response, answer, fields\)"),
        ([{"name": "math"}, {"name": "math"}], r"reward\.1\.name: 'math' is already reward\.0"),
        (
            [{"name": "math"}, {"name": "tagged_answer", "options": {"formt_weight": 1}}],
            r"reward\.1\.options\.formt_weight: no such setting; did you mean 'format_weight'\?",
        ),
        ([{"name": "tagged_answer", "options": {"format_weight": 2}}], r"reward\.0\.options\.format_weight: .*it is 2"),
        ([{"name": "geo3k", "options": {"accuracy": "maths"}}], r"reward\.0\.options\.accuracy: .*it is 'maths'"),
    ],
)
def test_a_wrong_reward_setting_is_named(terms, message):
    with pytest.raises(ConfigError, match=message):
        functions(*terms)


def test_every_registered_reward_scores_a_right_answer_with_one():
    response = r"<think>x</think> <answer>5</answer> \boxed{5}"
    for name in registry.names("rewards"):
        ((score,),) = functions({"name": name}).score([group(response)])
        assert score.value == pytest.approx(1.0), (name, score)
