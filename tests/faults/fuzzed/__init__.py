"""Random run files, targets, raw texts, corpora, checkpoint folders and run directories, and what must be true of each.

`test_fuzz.py` is the short form, `fuzz.py` the long one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis.strategies import SearchStrategy

from fuzzed.corpora import CORPORA, RAW_TEXTS, check_corpus, check_raw_text
from fuzzed.run_files import COMPILED, PLANS, RUN_FILES, check_plan, check_run_file
from fuzzed.runs import CHECKPOINTS, RUN_DIRECTORIES, check_checkpoints, check_run_directory
from fuzzed.world import World


class Kind(NamedTuple):
    """One kind of input: how examples are drawn, and the check of one, which returns the exit code or raises what it
    met."""

    examples: SearchStrategy
    check: Callable[[World, Any], int]
    share: int  # of some 100 examples
    short: int  # examples in the tests


KINDS = {
    "run-files": Kind(RUN_FILES, check_run_file, 40, 50),
    "plans": Kind(PLANS, check_plan, 15, 10),
    "compiled-plans": Kind(COMPILED, check_plan, 1, 2),
    "raw-texts": Kind(RAW_TEXTS, check_raw_text, 10, 10),
    "corpora": Kind(CORPORA, check_corpus, 15, 15),
    "checkpoints": Kind(CHECKPOINTS, check_checkpoints, 15, 10),
    "run-directories": Kind(RUN_DIRECTORIES, check_run_directory, 5, 10),
}
