"""What rlcore raises. The command line turns each class into its exit status (`status`)."""


class RlcoreError(Exception):
    """Anything rlcore says about a run; the message names the thing, the numbers and the remedy."""

    status = 1


class ConfigError(RlcoreError):
    """The user's mistake: a setting, a file, a row."""

    status = 2


class PluginError(ConfigError):
    """A plugin that is asked for is missing or broken."""


class RunError(RlcoreError):
    """The run failed: a non-finite loss, weights that did not arrive."""
