"""The paper's analyses and their pictures."""
