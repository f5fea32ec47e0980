"""The rollout engine of the core itself: plain torch."""
