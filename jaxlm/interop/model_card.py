"""README.md of an export: what was trained, on what, how, and how well, from the run's own report."""

import yaml

from jaxlm.errors import UserError
from jaxlm.reporting.report import results, table, what_ran
from jaxlm.reporting.runs import read_run
from jaxlm.settings import Settings, changed, to_dict
from jaxlm.storage.files import name_of

PIPELINES = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask",
             "ForPreTraining": "fill-mask", "ForSequenceClassification": "text-classification"}


def model_card(settings: Settings, step: int, architecture: str, model_type: str) -> str:
    """Markdown, with the lines that the hub reads before it. The license is for the owner to say."""
    pipeline = next((name for ending, name in PIPELINES.items() if architecture.endswith(ending)), None)
    about = {"library_name": "transformers", "license": "unknown", "tags": ["jaxlm", model_type]}
    if pipeline:
        about["pipeline_tag"] = pipeline
    name = name_of(settings.run_dir)
    sections = [f"---\n{yaml.safe_dump(about, sort_keys=False)}---", f"# {name}",
                f"`{architecture}`, exported by jaxlm from step {step:,} of the run `{name}`. License: not known; whoever "
                "publishes this names it.", "## Data", _data(settings)]
    try:
        run = read_run(settings.run_dir)
        sections += ["## Training", table(what_ran(run)), "## Figures", table(results(run))]
    except UserError as error:
        sections += ["## Training", f"Not known: {error}"]
    told = {key: value for key, value in changed(settings).items() if key not in ("run_dir", "out", "max_shard", "devices")}
    written = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    sections += ["## Settings", f"What differs from jaxlm's defaults:\n\n```yaml\n{written}```"]
    return "\n\n".join(sections) + "\n"


def _data(settings: Settings) -> str:
    data = to_dict(settings)["data"]
    told = {"text": data["raw"], "corpus": data["corpus"], "held out": data["validation"], "tokenizer": data["tokenizer"]}
    return table({name: str(value) for name, value in told.items() if value is not None})
