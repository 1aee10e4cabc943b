"""Reading weights: the authors' checkpoints and other runs."""
