"""jaxlm: pretrain BERT and GPT models on any mesh."""
