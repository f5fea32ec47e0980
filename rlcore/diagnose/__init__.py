"""What is wrong with a machine or a backend: doctor and conformance."""
