"""The devices and engines rlcore runs on; found by entry point, never imported by name."""
