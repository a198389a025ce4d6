"""jaxlm: pretrain and fine-tune BERT and GPT models on any mesh."""
