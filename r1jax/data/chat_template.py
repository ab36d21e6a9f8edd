"""Chat templates: the Jinja program of a published model that writes a conversation.

Rendered as transformers does, in a sandbox: a template is code of whoever published the
model. `R1` is ours, for DeepSeek-R1 and its distilled students where their folder
brings none.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import functools
import json
from typing import Any

from r1jax.errors import UserError

Message = Mapping[str, Any]  # {"role": "system", "user" or "assistant", "content": ...}

# DeepSeek-R1's and its students' (arXiv 2501.12948), without tools: system texts first,
# and of what the assistant thought in earlier turns nothing.
R1 = (
  "{{ bos_token }}"
  "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content')"
  " | join('\n\n') }}"
  "{% for message in messages %}"
  "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
  "{% elif message['role'] == 'assistant' %}"
  "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1]"
  " + '<｜end▁of▁sentence｜>' }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
R1_ROLES = ("<｜User｜>", "<｜Assistant｜>")  # tokens of a vocabulary that R1 is for


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  source: str  # Jinja
  # What it may name beside the messages: bos_token, eos_token, ...
  variables: tuple[tuple[str, str], ...] = ()
  where: str = "the chat template"  # for errors

  def __post_init__(self):
    """Raises UserError: it is not Jinja, or there is no jinja2."""
    _compiled(self.source, self.where)

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """The conversation as one text.

    Args:
      messages: the turns.
      add_generation_prompt: end with what the assistant's turn begins with.
      variables: more of them, such as enable_thinking=False of Qwen3.

    Raises:
      UserError: the template refuses the conversation, or fails on it.
    """
    template, errors = _compiled(self.source, self.where)
    try:
      return template.render(
        messages=[dict(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{**dict(self.variables), **variables},
      )
    except errors as error:
      roles = [message.get("role") for message in messages]
      raise UserError(
        f"{self.where} refuses a conversation of the roles {roles}: {error}. Use the"
        " roles it knows, or config.data.template='r1_zero', which needs none."
      ) from error


@functools.lru_cache(maxsize=32)
def _compiled(source: str, where: str) -> tuple[Any, tuple[type[Exception], ...]]:
  """(The template in transformers' environment, what its code may raise.)"""
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as error:
    raise UserError(
      'chat templates need jinja2. Install it: pip install -e ".[hf]"'
    ) from error

  class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant said; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      x,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = tojson  # Jinja's own escapes for HTML
  environment.globals |= {
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
  }
  try:
    template = environment.from_string(source)
  except jinja2.TemplateError as error:
    line = getattr(error, "lineno", None)
    raise UserError(
      f"{where} is not Jinja: {error.message}{f' (line {line})' if line else ''}. Fetch"
      " the file again."
    ) from error
  failures = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
  return template, failures
