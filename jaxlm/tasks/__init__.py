"""What is learned from what: the only room that knows both models and data."""
