"""The yardstick that `jaxlm evaluate --baseline ngram` puts beside a run: which text it is counted on, and where its
figures go."""

from typing import Any

from jaxlm.baselines.yardsticks import Figures, yardsticks
from jaxlm.console.progress import optional, print_line
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus
from jaxlm.errors import UserError
from jaxlm.reporting.report import write_report
from jaxlm.reporting.runs import read_summary
from jaxlm.runtime import processes
from jaxlm.settings import Settings
from jaxlm.storage.files import as_path, write_json
from jaxlm.tasks.find import find_task
from jaxlm.training.corpora import Corpora


def check_baseline(settings: Settings) -> None:
    """Raises UserError for a task that predicts no tokens."""
    task = find_task(settings)
    if not {"targets", "masked_targets"} & task.spec().keys():
        raise UserError(f"--baseline ngram: {task} predicts no tokens; n-grams stand beside causal_lm and masked_lm")


def beside(settings: Settings, saved: dict[str, Any], corpora: Corpora, validation: Batches) -> Figures:
    """Figures of `validation`, the batches of `corpora`, by n-grams of the text that the run was trained on; `saved`
    is what its checkpoint says of itself.

    The first process counts, the others wait for it. Of the run's own validation text, they are kept in summary.json
    and the report, too.

    Raises UserError: that text is not there any more.
    """
    digests, evaluated = [digest for digest, _ in saved["corpora"]], [corpus for corpus, _ in corpora]
    is_own = [corpus.digest for corpus in evaluated] == digests
    train = evaluated if is_own else _trained_on(settings, saved["settings"]["data"]["corpus"], digests)
    figures = {}
    if processes.is_main():
        figures = yardsticks(train, evaluated, validation, settings.data)
        if is_own:
            _keep(settings.run_dir, figures)
    processes.meet()
    return figures


def _trained_on(settings: Settings, corpus: str | dict[str, float] | None, digests: list[str]) -> list[Corpus]:
    folders = list(corpus) if isinstance(corpus, dict) else [corpus or as_path(settings.run_dir) / "corpus"]
    found = [Corpus(folder) for folder in folders]
    for folder, corpus, digest in zip(folders, found, digests, strict=True):
        if corpus.digest != digest:
            raise UserError(f"--baseline ngram is counted on the text that {settings.run_dir} was trained on; {folder} holds "
                            "another by now")
    return found


def _keep(run_dir: str, figures: Figures) -> None:
    path = as_path(run_dir) / "summary.json"
    with optional(f"the baseline is not kept in {path}"):
        if summary := read_summary(path):
            write_json(path, summary | {"baseline": figures})
            print_line(f"kept in {path} and {write_report(run_dir)}")
