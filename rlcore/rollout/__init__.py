"""The core's own rollout engine, in plain torch."""
