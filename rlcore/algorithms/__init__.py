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
