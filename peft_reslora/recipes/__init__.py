"""Complete runs, over transformers' Trainer, that the command line calls."""
