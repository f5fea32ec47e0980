"""Rollout through HTTP servers of an engine: what is the same for every engine that has one."""
