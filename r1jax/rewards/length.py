"""Length: DAPO's soft penalty on outputs that come near the window's end."""


def overlong(length: int, *, window: int, buffer: int) -> float:
  """0 up to window - buffer tokens, then linearly down to -1 at the window.

    R_length = ((window - buffer) - length) / buffer   (arXiv 2503.14476, Eq. 13)

  Args:
    length: tokens of the output. Tokens, never characters.
    window: the most tokens an output can have, L_max.
    buffer: L_cache, tokens; 1 or more.
  """
  over = length - (window - buffer)
  return -min(max(over / buffer, 0.0), 1.0)
