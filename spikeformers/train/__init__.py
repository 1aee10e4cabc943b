"""Training: recipes, the loop, checkpoints, evaluation and reports."""
