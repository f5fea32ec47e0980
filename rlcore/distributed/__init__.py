"""Ranks and their communication: sharded weights, sequence slices, weight broadcasts, fingerprints."""
