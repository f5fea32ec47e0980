"""The training commands: grpo, sft and dpo, and the steps they share."""
