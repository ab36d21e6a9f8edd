"""Problems of reasoning-gym, those of its tasks that have one right answer."""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import re
from types import ModuleType
from typing import Any

from r1jax.data.problem import Problem
from r1jax.errors import UserError

VERSION = "0.1.25"  # whose tasks were looked through

TASKS = tuple(
  "ab aiw arc_1d arc_agi base_conversion bf binary_alternation binary_matrix"
  " bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic"
  " color_cube_rotation count_bits count_primes course_schedule decimal_chain_sum dice"
  " emoji_mystery family_relationships game_of_life gcd gsm_symbolic kakurasu"
  " largest_island lcm leg_counting letter_counting manipulate_matrix maze mini_sudoku"
  " modulo_grid needle_haystack number_filtering number_sequence number_sorting"
  " path_star prime_factorization products rearc rectangle_count rotate_matrix"
  " rotten_oranges self_reference simple_equations simple_geometry spell_backward"
  " spiral_matrix string_insertion string_manipulation string_splitting"
  " string_synthesis sudoku syllogism time_intervals word_sequence_reversal"
  " word_sorting".split()
)

_WHY = {
  "it gives no answer": "boxnet graph_color propositional_logic rubiks_cube rush_hour",
  "its answer is one of several right ones": "countdown cryptarithm group_anagrams"
  " intermediate_integration jugs knight_swap letter_jumble n_queens"
  " palindrome_generation palindrome_partitioning polynomial_multiplication puzzle24"
  " quantum_lock sentence_reordering shortest_path simple_integration sokoban survo"
  " tower_of_hanoi tsumego word_ladder",
  "a right answer can be written otherwise than its own": "complex_arithmetic"
  " figlet_font fraction_simplification futoshiki knights_knaves number_format"
  " polynomial_equations pool_matrix zebra_puzzles",
  "its answer is rounded otherwise than the question asks": "advanced_geometry"
  " coin_flip decimal_arithmetic power_function",
  "some of its answers are wrong": "basic_arithmetic mahjong_puzzle",
  "the same seed gives other problems in another process": "acre codeio"
  " isomorphic_strings list_functions ransom_note",
  "nothing but its own scorer, which takes any text for true, speaks for its answers": (
    "game_of_life_halting"
  ),
  "it is a mixture: name one of its tasks": "composite",
}
REFUSED = {task: why for why, tasks in _WHY.items() for task in tasks.split()}

_NUMBER = re.compile(r"-?\d{1,15}(\.\d+)?", re.ASCII)


def generate(
  task: str, count: int, *, seed: int, options: dict[str, Any]
) -> list[Problem]:
  """Draws problems of a task of reasoning-gym.

  Its own scorers are never called: they pass a model's output to `eval` and to sympy's
  parser. So an answer can only be compared, as text unless it is a number; and tasks
  are refused where that would call a right one wrong (`REFUSED`). An item may come
  twice, and one without an answer is passed over.

  Item i of reasoning-gym's seed s is item i + 1 of seed s - 1; the seed is therefore
  spread, and two seeds share nothing but by chance.

  Args:
    task: a name in TASKS.
    count: how many.
    seed: the same gives the same problems, in every process.
    options: of the task's config, such as {"min_terms": 2}.

  Raises:
    UserError: reasoning-gym is missing, no such task, a refused one, or options or a
      count that it does not take.
  """
  _allowed(task)
  if count < 1:
    raise UserError(f"{count} problems of {task} were asked for; ask for at least one.")
  if taken := sorted({"seed", "size"} & options.keys()):
    raise UserError(
      f"options of {task} name {', '.join(taken)}; give the seed and the count instead."
    )
  gym = _module()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # some tasks print
      data = gym.create_dataset(task, seed=_spread(task, seed), size=count, **options)
      problems = _problems(data, count)
  except (TypeError, ValueError, AssertionError, LookupError) as e:
    known = [f.name for f in dataclasses.fields(gym.factory.DATASETS[task][1])]
    raise UserError(
      f"reasoning-gym's {task} does not take {options}: {e!r}. Its options are"
      f" {', '.join(sorted(set(known) - {'seed', 'size'}))}."
    ) from e
  if len(problems) < count:
    raise UserError(
      f"{task} with {options} gave {len(problems)} of {count} problems, the others have"
      " no answer. Ask for fewer or change the options."
    )
  return problems


def _allowed(task: str) -> None:
  if task in TASKS:
    return
  if task in REFUSED:
    raise UserError(f"reasoning-gym's {task} is not used: {REFUSED[task]}.")
  near = difflib.get_close_matches(task, [*TASKS, *REFUSED])
  raise UserError(
    f"reasoning-gym {VERSION} has no task {task!r}."
    + (f" Is it {' or '.join(near)}?" if near else f" Take one of {', '.join(TASKS)}.")
  )


def _module() -> ModuleType:
  try:
    import reasoning_gym
  except ImportError as e:
    raise UserError(
      f"reasoning-gym cannot be imported ({e}): pip install reasoning-gym=={VERSION}"
    ) from e
  return reasoning_gym


def _spread(task: str, seed: int) -> int:
  """31 bits: numpy, which some tasks seed, takes no more than 32."""
  return int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:4]) >> 1


def _problems(data: Any, count: int) -> list[Problem]:
  problems = []
  for i in range(2 * count + 100):
    item = data[i]
    question, answer = item["question"], item["answer"]
    if isinstance(answer, str) and answer.strip():
      kind = "answer" if _NUMBER.fullmatch(answer.strip()) else "text"
      problems.append(Problem(question.strip(), (answer.strip(),), kind))
    if len(problems) == count:
      break
  return problems
