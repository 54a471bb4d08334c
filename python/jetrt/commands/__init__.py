"""The subcommands of `jetrt`, one module each: ``add_NAME`` fills its parser, which names the function that runs it."""


class UsageError(Exception):
    """The command line makes no sense for this model."""
