"""The fine-tune: recipe, loss, optimizer, step, loop, checkpoints."""
