"""Diagnosis of a machine (doctor) and of a backend (conformance)."""
