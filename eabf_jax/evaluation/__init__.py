"""What an extended model is worth: loss by position."""
