"""The one exception a user is meant to see: what came, what is allowed, what to do."""


class UserError(ValueError):
  """A mistake in a config, a file or a command; ends a run with exit code 2."""
