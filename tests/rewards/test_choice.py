"""Rewards for lettered choices: what counts as picking one, and RLinf's rule to the letter."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.config.sections import EVERY, RewardConfig
from rlcore.rewards.choice import choice, listed
from rlcore.rewards.robo2vlm import robo2vlm
from rlcore.rewards.runner import RewardFunctions
from rlcore.types import Group, Prompt, Row, Sample

OFFERED = ["Yes", "No", "Cannot be determined", "A cup", "Yes, but slowly"]
PICKED = [  # responses, and whether they pick A of OFFERED
    ("A", 1), ("a", 1), ("(A)", 1), ("(a)", 1), ("A.", 1), ("A)", 1), ("A!", 1), ("**A**", 1), ("`A`", 1), ("$A$", 1),
    ("A. Yes", 1), ("A: Yes", 1), ("(A) Yes", 1), ("A Yes", 1), ("A. Yes\n", 1), ("Option A", 1), ("Yes", 1), ("yes.", 1),
    ("A. Yes, there is no obstacle", 1), ("A, because it is open", 1), ("B", 0), ("F", 0), ("E", 0), ("B. Yes", 0),
    ("A. No", 0), ("A. Yes, but slowly", 0), ("Yes, but slowly", 0), ("No", 0), ("", 0), (" ", 0), ("AB", 0),
    ("A B C D E", 0), ("A or B", 0), ("A, B", 0), ("A and C", 0), ("not A", 0), ("A. B is wrong", 0), (r"\boxed{A}", 1),
    (r"so \boxed{A. Yes}", 1), (r"\boxed{\text{A}}", 1), (r"\boxed{\textbf{A}}", 1), (r"\boxed{Yes}", 1),
    (r"The answer is B. \boxed{A}", 1), (r"\boxed{B} no, \boxed{A}", 1), (r"\boxed{B}", 0), (r"\boxed{A, B}", 0),
    (r"\boxed{A} or \boxed{B}", 0), (r"\boxed{}", 0), (r"\boxed{A", 0), (r"The answer is A. \boxed{B}", 0),
    ("The answer is A", 1), ("The answer is A.", 1), ("The answer is (A).", 1), ("The answer is option A.", 1),
    ("The answer is A. Yes", 1), ("The answer is Yes.", 1), ("The answer is Yes. The gripper is open.", 1),
    ("The answer is **A**, because it is open.", 1), ("The answer is A because the gripper is open", 1), ("Answer: A", 1),
    ("**Answer:** A", 1), ("answer is: A", 1), ("Answer:\nA", 1), ("Answer: A - Yes", 1), ("答: the answer：A", 1),
    ("The correct option is A", 1), ("Final choice: A", 1), ("The answer is B. Wait, the answer is A.", 1),
    ("The answer is A or B", 0), ("The answer is either A or B", 0), ("The answer is not A", 0),
    ("The answer is B, not A", 0), ("The answer is A.\nThe answer is B.", 0), ("The answer is A cup", 0),
    ("Answer: A. B is wrong", 0), ("Answer: ", 0), ("<think>B or C</think>A", 1), ("B or C</think>\n\nA", 1),
    ("<answer>A</answer>", 1), ("<answer>A. Yes</answer>", 1), ("<answer>B</answer> no <answer>A</answer>", 1),
    ("The gripper is open.\nA", 1), ("A\nThe gripper is open.", 1), ("<think>The answer is A", 0),
    ("<answer>B</answer>", 0), ("A\nB", 0), ("A. Yes\nB. No\nC. Cannot be determined", 0), ("One\nA\nmore", 0),
    ("I think A is right", 0), ("The answer is clearly A", 0), ("Answer: A (Yes)", 0), ("The answer is A, not B", 0),
]  # fmt: skip
RLINF = [  # responses, and RLinf's verdict where the answer is `A. Yes`
    ("A. Yes", 1), ("a. yes", 1), ("  A.   Yes  ", 1), ("A. Yes.", 1), ("A. Yes/", 1), ("A. Yes...", 1), ("`A. Yes`", 1),
    ("```\nA. Yes\n```", 0), ("``` A. Yes ```", 1), ("A.\tYes", 1), ("A", 0), ("Yes", 0), ("(A) Yes", 0), ("A) Yes", 0),
    ("A. No", 0), ("B. Yes", 0), ("", 0), ("A. Yes, it is", 0), ("**A. Yes**", 0), ("A. Yes/.", 1), ("A. Yes./", 0),
    ("A. Yes /", 1), ("A. Yes .", 1), ("A.Yes", 0), ("It is open.\nA. Yes", 1), ("A. Yes\nIt is open.", 0),
    ("A. Yes\n\n  \n", 1), ("B. No\nA. Yes", 1), ("The answer is A. Yes", 1), ("The answer is: A. Yes", 1),
    ("the final answer is A. Yes", 1), ("The answer is：A. Yes", 1), ("So THE ANSWER IS A. Yes.", 1),
    ("The answer is\nA. Yes", 1), ("The answer is A. Yes\nB. No", 1), ("The answer is A", 0), ("My answer is A. Yes", 0),
    ("The answer is B. No. The answer is A. Yes", 0), ("The answer is A. Yes\nThe answer is B. No", 1),
    ("Answer: A. Yes", 1), ("answer：A. Yes", 1), ("Answer : A. Yes", 1), ("Answer A. Yes", 0),
    ("Answer:\n\nA. Yes\nbecause", 1), ("Answer:", 0), ("Answer: B. No\nAnswer: A. Yes", 0),
    ("Answer: B. No. The answer is A. Yes", 1), ("Answer: **A. Yes**", 0), (r"\boxed{A. Yes}", 1),
    (r"$\boxed{A. Yes}$ it is", 1), (r"\boxed{B. No} \boxed{A. Yes}", 1), (r"\boxed A. Yes$", 1), ("boxed{A. Yes}", 1),
    (r"\boxed{A. Yes", 1), (r"\boxed{}A. Yes", 0), (r"\boxed{{A. Yes}}", 0), (r"\boxed{A. Yes} so the answer is B. No", 0),
    (r"The answer is \boxed{A. Yes}.", 1), (r"\boxed{B. No\nA. Yes}", 0), ("\\boxed{B. No\nA. Yes}", 1),
    ("The boxed parts are red.\nA. Yes", 1), ("A. Yes, boxed", 0), ("<think>B. No</think>A. Yes", 1),
    ("<THINK>b</THINK>\nA. Yes", 1), ("B</think>A. Yes", 0), ("B</think>\nA. Yes", 1),
    ("<think>The answer is B. No</think>A. Yes", 1), ("<think>A. Yes", 0),
    ("<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA. Yes<|im_end|>", 1),
    ("<|im_start|>assistant\nB. No<|im_end|><|im_start|>assistant\nA. Yes<|im_end|>", 1),
    ("<|assistant|> A. Yes<|end|>", 1), ("<|assistant|>A. Yes", 1), ("A. Yes<|im_end|>", 0),
    ("The answer is A. Yes<|im_end|>", 1),
]  # fmt: skip
RLINF_ENDS = [("A. Yes.", "A. Yes.", 0), ("A. Yes", "A. Yes.", 0), ("A. m/s", "A. m/s", 1)]  # answers that end in its signs


@pytest.mark.parametrize(("response", "score"), PICKED)
def test_a_choice_is_picked_by_its_letter_or_its_text(response, score):
    assert choice(response, "A. Yes", {"choices": OFFERED}) == score


@pytest.mark.parametrize(("response", "answer", "score"), [(text, "A. Yes", score) for text, score in RLINF] + RLINF_ENDS)
def test_rlinfs_rule_holds_to_the_letter(response, answer, score):
    assert robo2vlm(response, answer, {}) == score


def test_both_tables_are_long_and_have_both_verdicts():
    for verdicts in ([score for _, score in PICKED], [score for _, score in RLINF]):
        assert len(verdicts) >= 60 and min(verdicts.count(0), verdicts.count(1)) > 25


@settings(deadline=None)
@given(right=st.integers(0, 4), picked=st.integers(0, 4), form=st.sampled_from(["{0}", "{1}", "{0}. {1}", r"\boxed{{{0}}}"]))
def test_every_choice_is_right_for_its_own_letter_and_text_only(right, picked, form):
    response = form.format("ABCDE"[picked], OFFERED[picked])
    assert choice(response, f"{'ABCDE'[right]}. {OFFERED[right]}", {"choices": OFFERED}) == (right == picked)


@settings(deadline=None)
@given(text=st.text(alphabet="AByesno .,:()\n*$`{}\\<>/", max_size=30))
def test_grading_never_fails(text):
    assert choice(text, "A. Yes", {"choices": OFFERED}) in (0.0, 1.0)
    assert robo2vlm(text, "A. Yes", {}) in (0.0, 1.0)


@pytest.mark.parametrize("answer", ["B", "B. No", "B) No", "No", "no."])
def test_the_answer_may_be_a_letter_a_text_or_both(answer):
    assert [choice(text, answer, {"choices": OFFERED}) for text in ("B", "No", "A")] == [1, 1, 0]
    assert choice("B", answer, {"choices": str(OFFERED)}) == 1


def test_without_the_choices_the_answers_own_letter_and_text_are_known():
    assert [choice(text, "B. No", {}) for text in ("B", "B. No", "No", "A", "C. No", "Yes")] == [1, 1, 1, 0, 0, 0]
    assert [choice(text, "B", {}) for text in ("B", "(b)", "A", "No")] == [1, 1, 0, 0]


def test_a_lone_letter_that_is_another_choices_text_picks_none():
    assert choice("A", "A. B", {"choices": ["B", "A"]}) == 0
    assert choice("A. B", "A. B", {"choices": ["B", "A"]}) == 1
    assert choice("A", "A. A", {"choices": ["A", "B"]}) == 1


def test_choices_beyond_the_letters_are_never_picked():
    offered = [str(number) for number in range(30)]
    assert [choice(text, "Z. 25", {"choices": offered}) for text in ("Z", "25", "29")] == [1, 1, 0]
    with pytest.raises(ValueError, match="the answer '29' is none of the 30 choices"):
        choice("29", "29", {"choices": offered})


def test_two_choices_with_the_same_text_are_told_apart_by_the_letter():
    assert [choice(text, "A. Left", {"choices": ["Left", "left."]}) for text in ("Left", "A", "A. Left", "B")] == [0, 1, 1, 0]


@pytest.mark.parametrize("answer", ["F. Yes", "A. No", "Maybe", "", "F"])
def test_an_answer_outside_the_choices_is_an_error_and_no_score(answer):
    prompt = Prompt(Row("r:1", (), answer=answer, fields={"choices": OFFERED}), [], [])
    rewards = RewardFunctions({EVERY: [RewardConfig(name="choice")]})
    ((score,),) = rewards.score([Group(prompt, [Sample([1], [0.0], "A", "stop", 0)])])
    assert score.status == "error" and "is none of the 5 choices" in score.detail


@pytest.mark.parametrize("value", [["Yes", 5], "['Yes', 5]", ("Yes", 5), ' ("Yes", 5)', ["Yes", " 5 "]])
def test_choices_come_as_a_list_or_as_pythons_text_of_one(value):
    assert listed(value) == ["Yes", "5"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Yes, No", "holds 'Yes, No'; it is a list of choices"),
        ("__import__('os').getcwd()", "it is a list of choices"),
        ("{'A': 'Yes'}", "it is a list of choices"),
        ("[" * 5000, "it is a list of choices"),
        (None, "holds 'None'"),
        (["Yes", None], "holds 'None' as choice 2 of 2"),
        (["Yes", " "], "as choice 2 of 2; a choice is a text or number"),
        ([["Yes"], "No"], "as choice 1 of 2"),
    ],
)
def test_what_is_no_list_of_choices_is_said(value, message):
    with pytest.raises(ValueError, match=message):
        listed(value)
