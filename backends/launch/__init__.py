"""The launcher: nodes that come together as one Ray cluster."""
