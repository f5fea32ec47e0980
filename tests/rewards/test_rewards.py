"""Reward functions, and the runner, which never turns a failure into a score of 0."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_rows import shared

from rlcore import registry
from rlcore.config.sections import EVERY, RewardConfig
from rlcore.errors import ConfigError
from rlcore.rewards.bounded import Bounded
from rlcore.rewards.geo3k import geo3k, well_formed
from rlcore.rewards.math import gsm8k, last_box, last_boxed, math, math_verify, strip_string
from rlcore.rewards.numbers import last_number, number
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


ENDLESS = r"\boxed{7^{999999999}}"


def in_a_thread(function):
    """Run it in a thread; its result or exception."""
    results = []

    def target():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("reward", [math_verify, gsm8k])
def test_an_answer_that_takes_too_long_is_a_timeout_in_a_thread_and_the_next_one_is_scored(reward):
    assert reward(r"\boxed{2 + 2}", "4", {}) == 1.0
    start = time.monotonic()
    error = in_a_thread(lambda: reward(ENDLESS, "4", {}, timeout_seconds=1))
    assert isinstance(error, TimeoutError) and "answer '4' took longer than 1 s" in str(error)
    assert time.monotonic() - start < 30
    assert reward(r"\boxed{2 + 2}", "4", {}) == 1.0


def test_an_answer_that_takes_too_long_in_the_main_thread_is_a_timeout():
    rewards = functions({"name": "math_verify", "options": {"timeout_seconds": 1}})
    ((late, fine),) = rewards.score([group(ENDLESS, r"\boxed{5}")])
    assert late.status == "timeout" and late.value is None and fine.value == 1.0


def test_threads_take_turns_in_one_process_and_each_gets_its_own_result():
    values = {}

    def score(number):
        values[number] = [math_verify(rf"\boxed{{{number} + {n} - {n}}}", str(number + n % 2), {}) for n in range(6)]

    threads = [threading.Thread(target=score, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {number: [1.0, 0.0] * 3 for number in range(6)}


def test_one_process_is_used_again_and_another_after_its_end():
    bounded = Bounded("rlcore.rewards.symbolic")
    try:
        assert bounded.call("equal", "x+1", "1+x", seconds=60)
        first = bounded._process.pid
        assert not bounded.call("equal", "x+1", "2+x", seconds=60) and bounded._process.pid == first
        with pytest.raises(RuntimeError, match="no_such_function"):
            bounded.call("no_such_function", seconds=60)
        assert bounded._process.pid == first
        bounded._process.kill()
        bounded._process.wait()
        assert bounded.call("equal", "x+1", "1+x", seconds=60) and bounded._process.pid != first
    finally:
        bounded.close()
        bounded._release()


def test_a_module_that_does_not_import_says_so(capfd):
    bounded = Bounded("rlcore.rewards.no_such_module")
    with pytest.raises(RuntimeError, match=r"rlcore\.rewards\.no_such_module ended with status 1"):
        bounded.call("equal", "1", "1", seconds=60)
    assert "No module named" in capfd.readouterr().err
    bounded._release()


PROGRAM = """
import sys, threading, time
from rlcore.rewards import math
assert not math.math_verify(r"\\boxed{x+1}", "x", {})
assert "torch" not in sys.modules and "sympy" not in sys.modules
print(math._SYMBOLIC._process.pid, flush=True)
if "busy" in sys.argv:
    endless = lambda: math.math_verify(r"\\boxed{7^{99999999999}}", "4", {}, timeout_seconds=0)
    threading.Thread(target=endless, daemon=True).start()
    time.sleep(1)
print("here", flush=True)
if "exit" in sys.argv:
    sys.exit()
if "raise" in sys.argv:
    raise KeyError
time.sleep(60)
"""


@pytest.mark.parametrize("busy", ["busy", "idle"])
@pytest.mark.parametrize("end", ["exit", "raise", signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_run_however_that_ends(end, busy):
    command = [sys.executable, "-c", PROGRAM, str(end), busy]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with run:
        process = Path("/proc", run.stdout.readline().strip())
        assert run.stdout.readline() == "here\n" and process.exists()
        if isinstance(end, signal.Signals):
            run.send_signal(end)
        run.wait(30)
    deadline = time.monotonic() + 30
    while _runs(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(process)


def _runs(process):
    try:
        return ") Z " not in process.joinpath("stat").read_text()
    except OSError:
        return False


def test_a_forked_process_has_a_grader_of_its_own():
    assert math_verify(r"\boxed{x+1}", "1+x", {}) == 1.0
    program = (
        "import os\nfrom rlcore.rewards.math import _SYMBOLIC, math_verify\n"
        "assert math_verify(r'\\boxed{x+1}', '1+x', {}) == 1.0\nfirst = _SYMBOLIC._process.pid\n"
        "if (pid := os.fork()) == 0:\n"
        "    os._exit(int(math_verify(r'\\boxed{x+1}', '1+x', {}) != 1.0 or _SYMBOLIC._process.pid == first))\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert math_verify(r'\\boxed{x+2}', '2+x', {}) == 1.0 and _SYMBOLIC._process.pid == first\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr


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
    """A reward that returns whatever its response asks for."""
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
    return RewardFunctions({EVERY: [RewardConfig(**term) for term in terms]})


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
    lettered = Prompt(Row("a:1", [], answer="A. 5", fields={"choices": ["5", "6"]}), [1], [1])
    chosen = Group(lettered, [Sample([1], [0.0], "A. 5", "stop", 0)])
    for name in registry.names("rewards"):
        ((score,),) = functions({"name": name}).score([chosen if name in ("choice", "robo2vlm") else group(response)])
        assert score.value == pytest.approx(1.0), (name, score)


GRADERS = {"math": math, "math_verify": math_verify, "gsm8k": gsm8k, "geo3k": geo3k, "tagged_answer": tagged_answer}
DISPUTED = {  # (response, answer) of published cases that we grade differently, and why
    (r"So the answer is $\boxed{\sqrt{1/n}}$.", r"\frac{1}{\sqrt n}"): "equal for positive n alone, which neither text says",
    (r"So the answer is $\boxed{52}$.", "52_8"): "52 is not 42; another case of the same file says so too",
    (r"$x=\boxed{1}$ and $y=\boxed{2}$", "(1,2)"): "the last box is the answer, never one before it",
    ("range 40-42", "42"): "without a box math_verify reads expressions, and this one is -2",
}


def test_the_published_cases_are_graded_right():
    rows = [json.loads(line) for line in shared("cases", "graders.jsonl").read_text().splitlines()]
    wrong, disputed = [], set()
    for row in rows:
        value = GRADERS[row["grader"]](row["response"], row["answer"], {})
        key = (row["response"], row["answer"])
        if row["grader"] == "math":  # follows its data set's rule, right or wrong
            row["expected"] = row["got"]
        if value != row["expected"]:
            disputed.add(key) if key in DISPUTED else wrong.append(row)
    assert wrong == [] and disputed == set(DISPUTED) and len(rows) == 981


LOSSY_CASES = ("text_tail_dropped", "unclosed_last_box", "degree_sign_and_dot")
NUMBER_CASES = ("latex_thousands_gsm8k", "gsm8k_number_traps")


@pytest.mark.parametrize("case", [*LOSSY_CASES, *NUMBER_CASES])
def test_each_fault_that_was_found_is_gone(case):
    for line in shared("cases", case, "cases.jsonl").read_text().splitlines():
        row = json.loads(line)
        reward = gsm8k if case in NUMBER_CASES else math_verify
        assert reward(row["response"], row["answer"], {}) == row["right"], row
        if case in LOSSY_CASES:
            assert geo3k(row["response"], row["answer"], {}) == 0.9 * row["right"], row


SAME = [
    ("58\u00b0", "58"), (r"58^{\circ}", "58"), (r"58\degree", "58"), ("58 degrees", r"58^\circ"), ("58.", "58"), ("$58$", "58"),
    (r"10\,000", "10000"), (r"10{,}000", "10000"), (r"10,\!000", "10000"), (r"10\ 000", "10000"), ("10,000", "10000"),
    ("100,101,102", "102,101,100"), (r"\text{5 cm}", "5"), ("5", r"5\text{ cm}"), (r"50\text{ mm}", r"5\text{ cm}"),
    (r"3\text{ square feet}", r"3\text{ ft}^2"), (r"1\text{ m}^2", r"10000\text{ cm}^2"), (r"\$0.50", r"50\text{ cents}"),
    (r"60\text{ miles per hour}", r"60\text{ mph}"), ("\u22125", "-5"), ("1e3", "1000"), ("18.0", "18"), ("18", "18.0"),
    (r"\frac \pi4", r"\frac{\pi}{4}"), (r"\sin 30^\circ", "0.5"), (r"180^\circ", r"\pi"), (r"50\%", r"\frac12"),
    ("50", r"50\%"),
    ("42", "52_8"), ("52_8", "42"), (r"0.11_{2}", "0.75"), ("1A_{16}", "26"), (r"\sqrt{-1}", "i"), (r"x \le 3", r"(-\infty,3]"),
    ("June 20", r"\text{June 20}"), ("(A)", r"\text{A}"), (r"2 \text{ and } 3", "3, 2"), (r"\sqrt2 \approx 1.41", r"\sqrt{2}"),
    (r"6 \times 7 = 42", "42"), ("x = 42", "42"), (r"\varnothing", r"\emptyset"), (r"\{1, 2\}", "2, 1"),
]  # fmt: skip
OTHER = [
    ("12", r"12\text{ and }13"), (r"2 \text{ or } 7", r"2 \text{ or } 3"), ("", r"\text{ even}"), (r"\text{ }", r"\text{ }"),
    (r"\%", r"\%"), (r"\text{ odd}", r"\text{ even}"), ("x=5", "y=5"), ("0.5", r"0.5\%"), ("7, -2,", r"7, -2, \text{ and } -5"),
    ("52", "52_8"), ("52_9", "52_8"), ("40_0", "40_9"), (r"1_{2}", "x_{2}"), (r"5\text{ m}", r"5\text{ km}"),
    (r"45\text{ units}^3", r"45\text{ units}^2"), (r"10\text{ a.m.}", r"10\text{ p.m.}"), ("6:05", "6:15"), ("3t", "3"),
    ("5c", "5"),
    (r"3\text{x}", "3"), ("f'(x)", "f(x)"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), (r"e^{-40}", "0"),
    (".0000673", ".0000672"),
    (r"\frac{1}{2005!}", r"\frac{1}{2004!}"), ("0.333333333333", r"\frac13"),
    (r"\{e^{-400}, 1\}", r"\{e^{-401}, 1\}"), ("1213", "12,13"),
    (r"42 \approx 42.1", "42"), (r"\pm 2", "2"), ("(2,1)", "(1,2)"), ("(0,1]", "[0,1)"), ("2^10", "1024"),
    ("7^{40}", "7^{41}"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "answer"), SAME)
def test_one_answer_written_in_two_ways_is_right(given, answer):
    assert math_verify(rf"\boxed{{{given}}}", answer, {}) == 1.0
    assert geo3k(rf"\boxed{{{given}}}", answer, {}) == 0.9


@pytest.mark.parametrize(("given", "answer"), OTHER)
def test_another_answer_is_wrong_however_close_it_looks(given, answer):
    assert math_verify(rf"\boxed{{{given}}}", answer, {}) == 0.0
    assert geo3k(rf"\boxed{{{given}}}", answer, {}) == 0.0


@pytest.mark.parametrize("reward", [math, math_verify, gsm8k, geo3k])
@pytest.mark.parametrize("tail", [r"\boxed{5", r"\boxed{5\}", r"\boxed{{5}", r"\boxed{", r"\boxed", r"\boxed{}", r"\boxed{ }"])
def test_a_box_that_never_closes_or_is_empty_is_no_answer_and_neither_is_the_one_before_it(reward, tail):
    assert reward(rf"\boxed{{5}} and {tail}", "5", {}) == 0.0
    assert reward(rf"so 5: {tail}", "5", {}) == 0.0


@pytest.mark.parametrize(
    "box", ["\\boxed\n{42}", r"\boxed {42}", r"\framebox{42}", r"\fbox{42}", r"$\boxed 42$", r"\boxed{\boxed{42}}"]
)
def test_a_box_is_found_however_it_is_spaced(box):
    assert last_box(f"\\boxed{{1}} {box} on") == "42"
    assert math_verify(f"\\boxed{{1}} {box} on", "42", {}) == gsm8k(f"\\boxed{{1}} {box} on", "42", {}) == 1.0


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        *[(rf"\boxed{{10{mark}000}}", "10000", 1.0) for mark in (",", "{,}", r",\!", r"\,", r"\ ", " ", "~", "\u202f")],
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{1 \frac12 \text{ cups}}", "1.5", 1.0),
        (r"\boxed{36\text{ feet}^2}", "36", 1.0),
        (r"\boxed{6 \times 7 = 42}", "42", 1.0),
        (r"\boxed{42 apples, sold}", "42", 1.0),
        ("#### 42 (since 6*7=42)", "42", 1.0),
        ("#### 42 (43)", "42", 0.0),
        ("\\boxed{\u221242}", "42", 0.0),
        ("\\boxed{\u221242}", "-42", 1.0),
        ("It is \u221242.", "-42", 1.0),
        ("It is 10{,}000 or \\frac{1}{2}.", "0.5", 1.0),
        ("It is not 42.", "42", 0.0),
        ("He has 42, not 41.", "42", 1.0),
        ("It is 12,13.", "1213", 0.0),
        (r"\boxed{12,13}", "1213", 0.0),
        (r"\boxed{0,123}", "123", 0.0),
        (r"\boxed{13,12}", "12,13", 1.0),
        (r"\boxed{\pm 2}", "2", 0.0),
        (r"\boxed{2\pi}", "2", 0.0),
        (r"\boxed{5!}", "5", 0.0),
        (r"\boxed{\sqrt{4}}", "4", 0.0),
        (r"\boxed{\sqrt{4}}", "2", 1.0),
        (r"\boxed{4 hours 300 minutes}", "4300", 0.0),
        (r"\boxed{0.5}", r"0.5\%", 0.0),
        (r"\boxed{18}", "18.0", 1.0),
        ("7 and \\boxed{}", "7", 0.0),
        (rf"\boxed{{{'9' * 5000}}}", "9", 0.0),
        (r"\boxed{1/0}", "1", 0.0),
    ],
)
def test_gsm8k_reads_numbers_as_they_are_written(response, answer, value):
    assert gsm8k(response, answer, {}) == value


@pytest.mark.parametrize(("text", "value"), [("from 40-42", 42), ("3,5,7", 7), ("84/2.", 42), ("x.5", 0.5), ("none", None)])
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


scalar = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.builds(r"\frac{{{}}}{{{}}}".format, st.integers(-99, 99), st.integers(1, 99)),
    st.builds(r"{}\sqrt{{{}}}".format, st.integers(1, 9), st.integers(2, 99)),
    st.builds("{}^{{{}}}+{}".format, st.sampled_from("xyn"), st.integers(2, 5), st.integers(1, 9)),
    st.sampled_from([r"\pi", r"\infty", "i", r"2^{100}", r"\text{east}", "52_8", "3:05", r"5\text{ cm}", r"30^\circ", r"20\%"]),
)
answers = st.one_of(
    scalar,
    st.lists(scalar, min_size=2, max_size=3).map(", ".join),
    st.builds(r"\left({}, {}\right)".format, scalar, scalar),
    st.builds(r"{} \text{{ and }} {}".format, scalar, scalar),
)


@settings(deadline=None, max_examples=300)
@given(answer=answers)
def test_every_answer_equals_itself_whatever_surrounds_its_box(answer):
    assert math_verify(rf"\boxed{{{answer}}}", answer, {}) == math(rf"\boxed{{{answer}}}", answer, {}) == 1.0
    assert math_verify(rf"so $\boxed{{ {answer} }}$.", answer, {}) == 1.0


@settings(deadline=None, max_examples=200)
@given(first=scalar, second=scalar)
def test_which_of_two_answers_is_the_given_one_does_not_matter(first, second):
    one, other = math_verify(rf"\boxed{{{first}}}", second, {}), math_verify(rf"\boxed{{{second}}}", first, {})
    assert one == other


@settings(deadline=None, max_examples=300)
@given(answer=scalar, given=scalar, tail=st.text(alphabet="ab 0123456789.,$%{}\\#\n", max_size=20))
def test_what_follows_a_closed_box_changes_nothing(answer, given, tail):
    for reward in (math, math_verify, geo3k):
        assert reward(rf"\boxed{{{given}}} {tail}", answer, {}) == reward(rf"\boxed{{{given}}}", answer, {})


@settings(deadline=None, max_examples=300)
@given(value=st.integers(-(10**9), 10**9), tail=st.text(alphabet="ab 0123456789.,$%{}\\#\n", max_size=20))
def test_what_follows_a_closed_box_changes_no_number(value, tail):
    assert gsm8k(rf"\boxed{{{value:,}}} {tail}", str(value), {}) == 1.0
    assert gsm8k(rf"\boxed{{{value + 1}}} {value} {tail}", str(value), {}) == 0.0


def test_geo3k_knows_from_the_prompt_that_the_tag_is_open():
    response = r"two</think> \boxed{5}"
    assert geo3k(response, "5", {}) == geo3k(response, "5", {}, prompt="5? <think> </think>") == pytest.approx(0.9)
    assert geo3k(response, "5", {}, prompt="5?\n<think>\n") == pytest.approx(1.0)
    assert geo3k(r"two \boxed{5}", "5", {}, prompt="<think>") == pytest.approx(0.9)


def sees_the_prompt(response, answer, fields, *, prompt, scale: float = 1.0):
    return scale * len(prompt)


def test_a_reward_that_asks_for_the_prompt_is_handed_it_and_it_is_no_option():
    name = f"{__name__}.sees_the_prompt"
    prompt = Prompt(Row("r", [], answer="5"), [1], [1], text="<think>")
    groups = [Group(prompt, [Sample([1], [0.0], r"a</think> \boxed{5}", "stop", 0)])]
    ((score,),) = functions({"name": name, "options": {"scale": 2}}, {"name": "geo3k"}).score(groups)
    assert score.parts == {name: 14.0, "geo3k": pytest.approx(1.0)}
    with pytest.raises(ConfigError, match=r"reward\.0\.options\.prompt: no such setting"):
        functions({"name": name, "options": {"prompt": "x"}})
