"""The exceptions a user is meant to see: what came, what is allowed, what to do."""


class UserError(ValueError):
  """A mistake in a config, a file or a command; ends a run with exit code 2."""


class NumericalError(ArithmeticError):
  """A number that is not finite; ends a run with exit code 3."""


class TransientError(RuntimeError):
  """What another start may mend, such as a peer that does not answer; ends a run with
  exit code 42."""
