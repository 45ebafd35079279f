"""Evaluation of extended models: perplexity, retrieval and lm-evaluation-harness."""
