"""The family of policy-gradient algorithms. A run names one; it stands for the settings below, and every one of them can be
set by itself. The formulas are in the files of this folder, with their papers.

grpo            arXiv 2402.03300, with the token mean that the field has settled on
dr_grpo         arXiv 2503.20783: no division by the standard deviation or by the response's length
dapo            arXiv 2503.14476: wider upper clip, groups without signal replaced, responses near the limit punished
gspo            arXiv 2507.18071: one ratio a response, with the clip widths of its experiments
cispo           arXiv 2506.13585: clipped weights, no lower limit
rloo            arXiv 2402.14740: leave-one-out baseline, divergence (k1) in the reward, sums over tokens
reinforce++     arXiv 2501.03262: advantages over the whole batch, divergence (k1) in the reward; and its form with the group's
                mean as baseline, which takes k2 as a loss
ppo             arXiv 1707.06347, with a critic

Imports nothing heavy: the run file's schema reads this table.
"""

PRESETS: dict[str, dict[str, object]] = {
    "grpo": {},
    "dr_grpo": {"advantage_std": "none", "aggregation": "constant"},
    "dapo": {"clip_high": 0.28, "max_refills": 3, "overlong_penalty": 1.0},
    "gspo": {"surrogate": "sequence_clip", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    "cispo": {"surrogate": "clipped_weight", "clip_low": 1.0, "clip_high": 4.0},
    "rloo": {"advantage": "leave_one_out", "aggregation": "sequence_sum", "kl_in": "reward", "kl_estimator": "kl"},
    "reinforce++": {"advantage": "batch", "kl_in": "reward", "kl_estimator": "kl"},
    "reinforce++_baseline": {"advantage": "batch_over_group", "kl_estimator": "mse"},
    "ppo": {"advantage": "gae", "kl_in": "reward", "kl_estimator": "kl"},
}

LIMITS: dict[str, tuple[float, float]] = {
    "none": (0.0, 1.0),
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "geometric": (0.99, 1.01),
}
"""Of the ratio trainer / engine, for each correction of `mismatch.py`: the widths their authors report."""
