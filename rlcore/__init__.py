"""rlcore: reinforcement learning after pre-training, for language and vision-language models, on any device."""

__version__ = "0.1.0"
