"""Which task a run has."""

from jaxlm.settings import ModelSettings, Settings
from jaxlm.tasks.bert import Bert
from jaxlm.tasks.causal_lm import CausalLM
from jaxlm.tasks.masked_lm import MaskedLM
from jaxlm.tasks.task import Task
from jaxlm.tasks.text_classification import TextClassification

TASKS: dict[str, type[Task]] = {task.name: task for task in (CausalLM, MaskedLM, Bert, TextClassification)}


def find_task(settings: Settings) -> Task:
    """The task of task.name; null: what a model of this kind is pretrained on."""
    return TASKS[settings.task.name or pretraining(settings.model)](settings)


def pretraining(model: ModelSettings) -> str:
    if model.causal:
        return CausalLM.name
    return Bert.name if model.next_sentence else MaskedLM.name
