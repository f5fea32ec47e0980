"""Ranks, and what passes between them: sharded weights, sequence slices, weight broadcasts, fingerprints."""
