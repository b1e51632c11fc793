"""A recipe's run in this process: set-up, rounds, evaluation, run folder, comparison."""
