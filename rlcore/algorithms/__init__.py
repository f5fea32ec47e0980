"""Policy-gradient algorithms. A run names one, which is a preset of the settings below; each of them can also be set by itself.
The formulas are in the files of this folder, with their papers.

grpo            arXiv 2402.03300, with the token mean that the field has settled on
dr_grpo         arXiv 2503.20783: no division by the standard deviation or by the response's length
dapo            arXiv 2503.14476: wider upper clip, dynamic sampling of groups without signal, soft overlong penalty
gspo            arXiv 2507.18071: one ratio per response, with the clip widths of its experiments
cispo           arXiv 2506.13585: clipped importance weights, no lower limit
rloo            arXiv 2402.14740: leave-one-out baseline, KL (k1) in the reward, sums over tokens
reinforce++     arXiv 2501.03262: advantages normalized over the whole batch, KL (k1) in the reward; its variant with the group
                mean as baseline takes KL (k2) as a loss
ppo             arXiv 1707.06347, with a critic

The presets are in `rlcore/config/algorithm.py`.
"""
