r"""Where in a completion the answer is: `<answer>`, the last `\boxed{}`, or code."""

import re

# A block ends at a fence that has its line to itself.
_FENCE = re.compile(
  r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "python3", "py")


def spoken(completion: str, *, prefill_think: bool = False) -> str | None:
  """What follows the thinking: the text after the last `</think>`, or all of it where
  nothing was thought; None where the thinking never ends.

  Args:
    completion: the model's text.
    prefill_think: the prompt already ended in `<think>`.
  """
  _, ended, after = completion.rpartition("</think>")
  if "<think>" in after or (prefill_think and not ended):
    return None
  return after


def extract_answer(completion: str, *, prefill_think: bool = False) -> str | None:
  r"""The final answer, stripped; None where there is none or it is empty.

  It is the text between the last `<answer>` and the `</answer>` that follows it, or the
  content of the last `\boxed{}`, and of a box inside the tags if there is one. What
  stands in the thinking does not count.
  """
  text = spoken(completion, prefill_think=prefill_think)
  if text is None:
    return None
  content = _tagged(text)
  if content is None:
    return None if "<answer>" in text else last_box(text) or None
  return (
    content if "\\boxed" not in content else last_box(content) or ""
  ).strip() or None


def extract_program(completion: str, *, prefill_think: bool = False) -> str | None:
  """The last fenced block of the answer that is labelled as Python, or else the last
  without a label; without a block, what the answer's tags hold."""
  text = spoken(completion, prefill_think=prefill_think)
  if text is None:
    return None
  tagged = _tagged(text)
  for part in (tagged or "", text):
    blocks = [(name.strip().lower(), code) for name, code in _FENCE.findall(part)]
    labelled = [code for name, code in blocks if name in _PYTHON]
    bare = [code for name, code in blocks if not name]
    if labelled or bare:
      return (labelled or bare)[-1] or None
  if tagged is None or not tagged.strip() or "```" in text:
    return None
  return tagged


def last_box(text: str) -> str | None:
  r"""The content of the last `\boxed{...}`, its braces balanced, or None."""
  start = text.rfind("\\boxed{")
  if start < 0:
    return None
  start += len("\\boxed{")
  depth, at = 1, start
  for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
    depth += {"{": 1, "}": -1}.get(brace[0], 0)
    if not depth:
      at = start + brace.start()
      return text[start:at].strip()
  return None


def _tagged(text: str) -> str | None:
  _, opened, tail = text.rpartition("<answer>")
  content, closed, _ = tail.partition("</answer>")
  return content if opened and closed else None
