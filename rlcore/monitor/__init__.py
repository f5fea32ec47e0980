"""Monitoring of a run: clock, heartbeat, metrics, console, files."""
