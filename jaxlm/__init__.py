"""jaxlm: pretrain BERT and GPT models on any mesh."""

__version__ = "0.1.0"
