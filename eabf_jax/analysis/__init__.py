"""Pictures of evaluation results."""
