"""How large a vocabulary is, and how many labels there are, before there is a corpus: what the tokenizer's file says,
or else what is usual."""

from dataclasses import replace
from pathlib import Path

from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS, Settings
from jaxlm.tasks.find import find_task

# By a word in the tokenizer's name; the first that fits.
USUAL = {
    "wordpiece": (30522, "BERT's"), "bert": (30522, "BERT's"), "gpt": (50257, "GPT-2's"),
    "llama-3": (128256, "Llama 3's"), "llama3": (128256, "Llama 3's"), "characters": (100, "English text's"),
}
SENTENCEPIECE = (32000, "SentencePiece's")


def with_vocabulary(settings: Settings) -> tuple[Settings, str | None]:
    """The settings with a vocabulary, and a line that says what was assumed; None where the settings have it all.

    Raises:
      UserError: data.tokenizer is a file that is no tokenizer.
    """
    labels = ["task.labels are not said: planned with two"] if find_task(settings).needs_corpus else []
    if settings.model.vocab_size is not None:
        return settings, "; ".join(labels) or None
    name = settings.data.tokenizer
    built_in = name in TRAINED_TOKENIZERS + BUILT_IN_TOKENIZERS
    if name == "bytes" or (not built_in and Path(name).exists()):
        from jaxlm.data.stages import given_tokenizer

        size, whose = given_tokenizer(settings.data).vocab_size, f"{name} has them"
    else:
        size, owner = next((found for word, found in USUAL.items() if word in name.lower()), SENTENCEPIECE)
        whose = f"{owner} usual size; data.tokenizer={name} is " + ("not trained yet" if built_in else "not here")
    line = f"model.vocab_size is not said: planned with {size:,} ({whose})"
    return replace(settings, model=replace(settings.model, vocab_size=size)), "; ".join([line, *labels])
